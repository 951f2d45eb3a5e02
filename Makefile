# `make` alone lists the commands.
#
# Everything runs in .venv. The first command makes it, and a later one makes it anew when a list of requirements
# changed, another DEVICES is asked for, or the set-up was cut short: .venv/ready-* is written last.
#   DEVICES=cpu|gpu|tpu   the JAX to install; without it the one already installed, or what this machine has
#   PYTHON=…              the interpreter to use
#   ARGS=…                further arguments for pytest, such as ARGS='-k towers', or those of `compiled`

PYTHON ?= python3 python3.13 python3.12 python3.11

ifndef DEVICES
DEVICES := $(patsubst .venv/ready-%,%,$(wildcard .venv/ready-*))
endif
ifeq ($(DEVICES),)
# The device files answer at once where nvidia-smi takes seconds; only WSL has the one without the other.
# /dev/accel (a folder, no number) may be any accelerator, /dev/accel0 is a TPU.
DEVICES := $(shell \
  if ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo gpu; \
  elif [ -n "$$TPU_NAME$$TPU_ACCELERATOR_TYPE" ] || ls -d /dev/accel[0-9]* >/dev/null 2>&1; then echo tpu; \
  else echo cpu; fi)
endif

requirements_cpu := requirements-cpu.txt
requirements_gpu := requirements.txt
requirements_tpu := requirements-tpu.txt
requirements := $(requirements_$(DEVICES))
ifeq ($(requirements),)
$(error DEVICES is '$(DEVICES)'; it can be cpu, gpu or tpu)
endif
size_cpu := 3 GB of disk, one to three minutes
size_gpu := 8 GB of disk, 3 GB of it CUDA to download, five to fifteen minutes
size_tpu := 4 GB of disk, one to five minutes

ready := .venv/ready-$(DEVICES)
python := .venv/bin/python
# A few workers are enough: each one's XLA uses all cores when it has work.
workers := -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# Compilers for accelerators that need not be here, each in an environment of its own.
target := $(patsubst --target=%,%,$(filter --target=%,$(ARGS)))
compiler := $(if $(filter v4 v5e v5p v6e,$(target)),tpu,$(if $(filter a100 h100,$(target)),gpu))
size_compiler_tpu := 1.5 GB of disk, one to three minutes
size_compiler_gpu := 6 GB of disk, 3 GB of it CUDA to download, five to fifteen minutes
compiled := .venv-compiled-$(compiler)
ifneq ($(filter compiled,$(MAKECMDGOALS)),)
ifeq ($(compiler),)
$(error ARGS='$(ARGS)' must name a target: --target=v4, v5e, v5p, v6e, a100 or h100)
endif
endif

# Without an accelerator the demo shows the two towers on two simulated devices.
demo_flags_cpu := --cpu_devices=2

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf 'make %-10s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(ready)  ## set up, build a small data set and train on it, afresh each time
	rm -rf runs/demo
	$(python) main.py --config=configs/demo.py --workdir=runs/demo $(demo_flags_$(DEVICES))

.PHONY: test
test: $(ready)  ## set up and run the tests, except the slow ones
	$(python) -m pytest -m "not slow" $(workers) $(ARGS)

.PHONY: test-slow
test-slow: $(ready)  ## the tests that take minutes
	$(python) -m pytest -m slow $(ARGS)

.PHONY: compiled
compiled: $(compiled)/ready  ## what XLA says of TPUs and GPUs that are not here: ARGS='--target=v5e --devices=2 …'
	@$(compiled)/bin/python -m benchmarks.compiled $(ARGS)

.PHONY: lint
lint: $(ready)  ## check format and style
	$(python) -m ruff format --check .
	$(python) -m ruff check .

.PHONY: format
format: $(ready)  ## format, and mend what can be mended
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

.PHONY: setup
setup: $(ready)  ## make .venv; the commands above do it when needed

.PHONY: clean
clean:  ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv .venv-compiled-* .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./data -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -print | xargs rm -rf

# Answers "ok PATH" or the reason why this Python cannot be used. PATH is the interpreter below any environment that is
# active: it may be this very .venv, which is about to be removed.
define check_python
import sys
version = ".".join(map(str, sys.version_info[:3]))
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(print("Python 3.11, 3.12 or 3.13 is needed, and this machine has " + version + "; name one with PYTHON=PATH"))
try:
    import ensurepip, venv
except ImportError:
    sys.exit(print("Python " + version + " here cannot make environments: install python3-venv "
                   "(Debian, Ubuntu: apt-get install python3-venv)"))
print("ok " + getattr(sys, "_base_executable", sys.executable))
endef
export check_python

# Makes an environment: its folder, what it is for, what it costs, and the lists to install.
define set_up
	@problem=; for name in $(PYTHON); do \
	  said=$$($$name -c "$$check_python" 2>/dev/null); \
	  case $$said in \
	    ok*) break ;; \
	    *environments*) problem=$$said ;; \
	    ?*) problem=$${problem:-$$said} ;; \
	  esac; \
	done; \
	case $$said in ok*) ;; *) echo "$${problem:-Python 3.11, 3.12 or 3.13 is needed, and there is no python3}." >&2; exit 1 ;; esac; \
	python=$${said#ok }; \
	echo "Setting up $(1) for $(2) with $$python ($(3))"; \
	rm -rf $(1) && "$$python" -m venv $(1)
	@install="$(1)/bin/python -m pip install -c constraints.txt $(4)"; \
	PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $$install -qq || { \
	  echo "The set-up stopped. Is the package index in reach? This tells more: $$install" >&2; exit 1; }
	@touch $@
endef

ifneq ($(shell [ -x $(python) ] && echo whole),whole)
.PHONY: $(ready)
endif
$(ready): $(requirements) requirements-core.txt requirements-common.txt requirements-cpu.txt requirements-dev.txt constraints.txt
	$(call set_up,.venv,the $(DEVICES),$(size_$(DEVICES)),-r $(requirements) -r requirements-dev.txt)

ifneq ($(shell [ -x $(compiled)/bin/python ] && echo whole),whole)
.PHONY: $(compiled)/ready
endif
$(compiled)/ready: requirements-compiled-$(compiler).txt requirements-core.txt constraints.txt
	$(call set_up,$(compiled),the compiler of $(target),$(size_compiler_$(compiler)),-r requirements-compiled-$(compiler).txt)

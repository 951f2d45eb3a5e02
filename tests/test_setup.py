"""The set-up a newcomer meets: requirement lists, `make` and the CI script."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
SETS = {"cpu": "requirements-cpu.txt", "gpu": "requirements.txt", "tpu": "requirements-tpu.txt"}
COLAB = "requirements-colab.txt"
COMPILERS = {kind: f"requirements-compiled-{kind}.txt" for kind in ("tpu", "gpu")}
# What markers look at on the machines this project names.
MACHINES = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "arm": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "mac": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
PYTHONS = ["3.11", "3.12", "3.13"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(name):
    """Returns the requirements in a list and in those it includes."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            found += read_requirements(line.removeprefix("-r "))
        elif line:
            found.append(Requirement(line))
    return found


def applying(requirements, python, machine):
    environment = {"python_version": python, "python_full_version": f"{python}.0", **machine}
    return [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]


def environment(**changes):
    """This environment without what an outer make, or a person's choice of devices, put there."""
    ours = ("MAKE", "MFLAGS", "DEVICES", "PYTHON", "ARGS", "TPU_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | changes


# ---- the lists


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("listed", [*SETS.values(), *COMPILERS.values(), "requirements-dev.txt"])
def test_each_requirement_has_one_tested_version_within_its_bounds(listed, machine, python):
    pins = applying(read_requirements("constraints.txt"), python, MACHINES[machine])
    for requirement in applying(read_requirements(listed), python, MACHINES[machine]):
        versions = [p.specifier for p in pins if normal(p.name) == normal(requirement.name)]
        assert len(versions) == 1, f"{requirement}: tested versions {versions}"
        (pin,) = versions[0]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} was tested at {pin}"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("listed", [*SETS.values(), COLAB])
def test_no_requirement_can_fall_back_to_an_old_release(listed, machine):
    requirements = applying(read_requirements(listed), "3.12", MACHINES[machine])
    for name in {normal(r.name) for r in requirements}:
        bounds = SpecifierSet(",".join(str(r.specifier) for r in requirements if normal(r.name) == name))
        assert any(b.operator == ">=" for b in bounds), f"{name} has no lower bound"


def test_each_machine_gets_the_jax_and_the_tensorflow_made_for_it():
    def got(devices, machine):
        requirements = applying(read_requirements(SETS[devices]), "3.12", MACHINES[machine])
        extras = set().union(*(r.extras for r in requirements if r.name == "jax"))
        names = {r.name for r in requirements}
        return extras, names & {"tensorflow", "tensorflow-cpu"}

    assert got("cpu", "linux") == (set(), {"tensorflow-cpu"})
    assert got("gpu", "linux") == ({"cuda12"}, {"tensorflow-cpu"})
    assert got("gpu", "arm") == ({"cuda12"}, {"tensorflow"})
    assert got("tpu", "linux") == ({"tpu"}, {"tensorflow-cpu"})
    assert got("gpu", "mac") == (set(), {"tensorflow"})


@pytest.mark.parametrize("machine", MACHINES)
def test_the_list_for_colab_has_what_a_cpu_needs_and_keeps_the_tensorflow_that_is_there(machine):
    def names(listed):
        return {normal(r.name) for r in applying(read_requirements(listed), "3.12", MACHINES[machine])}

    assert names(SETS["cpu"]) - {"tensorflow-cpu"} | {"tensorflow"} <= names(COLAB)
    assert "tensorflow-cpu" not in names(COLAB)
    (bounds,) = (r.specifier for r in read_requirements(COLAB) if r.name == "tensorflow")
    assert bounds.contains("2.19.0"), "what Colab has had"


def imports(tree):
    """Yields the top-level names a module imports; what `except ImportError` guards is optional."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try):
            caught = {n.id for h in node.handlers for n in ast.walk(h.type or h) if isinstance(n, ast.Name)}
            if caught & {"ImportError", "ModuleNotFoundError"}:
                continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module.split(".")[0]
        else:
            yield from imports(node)


def python_files():
    hidden = {p.name for p in ROOT.iterdir() if p.name.startswith(".")} | {"data", "runs"}
    return [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in hidden]


def test_every_import_is_in_the_requirements():
    packages = metadata.packages_distributions()
    own = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in python_files()}
    needed = {normal(r.name) for r in read_requirements("requirements-cpu.txt")}
    checks = needed | {normal(r.name) for r in read_requirements("requirements-dev.txt")}
    for path in python_files():
        allowed = checks if path.is_relative_to(ROOT / "tests") else needed
        if path.is_relative_to(ROOT / "benchmarks"):
            allowed = needed | {normal(r.name) for r in read_requirements("requirements-benchmarks.txt")}
        for name in set(imports(ast.parse(path.read_text()))) - own - sys.stdlib_module_names:
            if not path.is_relative_to(ROOT / "tests") or not (path.parent / f"{name}.py").exists():
                found = {normal(d) for d in packages.get(name, [name])}  # by its own name where it is not installed
                assert found & allowed, f"{path.relative_to(ROOT)} imports {name}: list what has it"


# ---- make


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a stand-in for Python, which notes its calls in calls.txt, as the only one on PATH."""
    shared = ["requirements-core.txt", "requirements-common.txt", "requirements-dev.txt"]
    lists = [*shared, *SETS.values(), *COMPILERS.values()]
    for name in ["Makefile", "constraints.txt", *lists]:
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ["sh", "rm", "mkdir", "cp", "touch", "cat", "sed", "grep", "ls", "find", "xargs"]:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def add_python(checkout, name, says):
    path = checkout / "bin" / name
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then echo "{says}"; exit; fi\n'
        f'echo "$@" >> {checkout}/calls.txt\n'
        f'case "$*" in\n  "-m venv "*) mkdir -p "$3/bin" && cp {path} "$3/bin/python" ;;\n'
        f"  *pip*) [ ! -e {checkout}/offline ] ;;\nesac\n"
    )
    path.chmod(0o755)


def make(checkout, *arguments):
    calls = checkout / "calls.txt"
    calls.write_text("")
    done = subprocess.run(
        [shutil.which("make"), "--no-print-directory", *arguments],
        cwd=checkout,
        env=environment(PATH=str(checkout / "bin")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done, calls.read_text().splitlines()


def good_python(checkout, name="python3"):
    add_python(checkout, name, f"ok {checkout}/bin/{name}")


DEMO = "main.py --config=configs/demo.py --workdir=runs/demo"


def test_make_sets_up_once_and_again_when_a_list_changes(checkout):
    good_python(checkout)
    done, calls = make(checkout, "demo", "DEVICES=cpu")
    assert done.returncode == 0, done.stderr
    venv, pip, demo = calls
    assert venv == "-m venv .venv"
    assert "-c constraints.txt -r requirements-cpu.txt -r requirements-dev.txt" in pip
    assert demo == f"{DEMO} --cpu_devices=2"

    assert make(checkout, "demo")[1] == [demo]
    later = (checkout / ".venv/ready-cpu").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert make(checkout, "demo")[1] == [venv, pip, demo]


def test_another_set_of_devices_replaces_the_environment(checkout):
    good_python(checkout)
    make(checkout, "setup", "DEVICES=cpu")
    done, (_, pip, demo) = make(checkout, "demo", "DEVICES=gpu")
    assert done.returncode == 0, done.stderr
    assert "-r requirements.txt" in pip
    assert demo == DEMO
    assert [p.name for p in (checkout / ".venv").glob("ready-*")] == ["ready-gpu"]
    assert make(checkout, "demo")[1] == [DEMO], "later calls keep the choice"


def test_a_set_up_that_was_cut_short_is_repeated_not_used(checkout):
    good_python(checkout)
    (checkout / "offline").touch()
    done, calls = make(checkout, "demo", "DEVICES=cpu")
    assert done.returncode != 0
    assert len(calls) == 2, "the demo does not run"
    assert "This tells more: .venv/bin/python -m pip install" in done.stderr
    (checkout / "offline").unlink()
    done, calls = make(checkout, "demo", "DEVICES=cpu")
    assert done.returncode == 0
    assert calls[0] == "-m venv .venv"


@pytest.mark.parametrize(("target", "kind"), [("v5e", "tpu"), ("h100", "gpu")])
def test_each_compiler_has_an_environment_that_is_set_up_once(checkout, target, kind):
    good_python(checkout)
    compile_for = ("compiled", f"ARGS=--target={target} --devices=2")
    folder, said = f".venv-compiled-{kind}", f"-m benchmarks.compiled --target={target} --devices=2"
    (checkout / "offline").touch()
    done, calls = make(checkout, *compile_for)
    assert done.returncode != 0 and "The set-up stopped" in done.stderr
    assert len(calls) == 2, "nothing is compiled"
    (checkout / "offline").unlink()
    done, (venv, pip, compiled) = make(checkout, *compile_for)
    assert done.returncode == 0, done.stderr
    assert venv == f"-m venv {folder}"
    assert pip.endswith(f"-c constraints.txt -r {COMPILERS[kind]} -qq"), "no TensorFlow, no tools"
    assert compiled == said
    assert make(checkout, *compile_for)[1] == [said]
    assert not (checkout / ".venv").exists()
    make(checkout, "clean")
    assert not (checkout / folder).exists()


@pytest.mark.parametrize("arguments", ["", "--target=v9", "--devices=2"])
def test_without_a_known_target_nothing_is_set_up(checkout, arguments):
    good_python(checkout)
    done, calls = make(checkout, "compiled", f"ARGS={arguments}")
    assert done.returncode != 0 and not calls
    assert f"ARGS='{arguments}' must name a target: --target=v4, v5e" in done.stderr


def test_an_environment_whose_python_is_gone_is_made_anew(checkout):
    good_python(checkout)
    make(checkout, "setup", "DEVICES=cpu")
    (checkout / ".venv/bin/python").unlink()
    assert make(checkout, "setup", "DEVICES=cpu")[1][0] == "-m venv .venv"


def test_an_unsuitable_python3_gives_way_to_a_named_one(checkout):
    add_python(checkout, "python3", "Python 3.11, 3.12 or 3.13 is needed, and this machine has 3.9.2")
    good_python(checkout, "python3.12")
    done, _ = make(checkout, "setup", "DEVICES=cpu")
    assert done.returncode == 0
    assert f"with {checkout}/bin/python3.12 " in done.stdout


@pytest.mark.parametrize(
    "says",
    [
        "Python 3.11, 3.12 or 3.13 is needed, and this machine has 3.14.0",
        "Python 3.11.2 here cannot make environments: install python3-venv",
    ],
)
def test_without_a_suitable_python_one_sentence_says_why(checkout, says):
    add_python(checkout, "python3", says)
    done, calls = make(checkout, "demo", "DEVICES=cpu")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == f"{says}."
    assert not calls


def test_the_check_of_python_accepts_what_pyproject_accepts():
    """The real check, run by the interpreter of these tests with its version replaced."""
    source = re.search(r"define check_python\n(.*?)endef", (ROOT / "Makefile").read_text(), re.S)[1]
    requires = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    for minor in range(9, 17):
        fake = f"import sys; sys.version_info = (3, {minor}, 0)\n{source}"
        said = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True).stdout
        assert said.startswith("ok ") == SpecifierSet(requires).contains(f"3.{minor}.0"), said
    blocked = f"import sys; sys.modules['ensurepip'] = None\n{source}"
    said = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True).stdout
    assert "apt-get install python3-venv" in said


def test_unknown_devices_are_refused(checkout):
    done, _ = make(checkout, "demo", "DEVICES=gpus")
    assert done.returncode != 0
    assert "'gpus'; it can be cpu, gpu or tpu" in done.stderr


# ---- the CI script


@pytest.mark.parametrize(
    ("lines", "passes", "message"),
    [
        (
            [{"step": 8, "test/top1_error": 0.5}, {"test/top1_error": 0.04}, {"step": 9}],
            True,
            "0.0400",
        ),
        ([{"test/top1_error": 0.04}, {"test/top1_error": 0.10}], False, "must be below 0.1"),
        ([{"test/top1_error": float("nan")}], False, "nan"),
        ([{"eval/top1_error": 0.01}], False, "did not reach its end"),
        (None, False, "wrote no metrics"),
    ],
)
def test_ci_fails_when_the_demo_misses_its_bound(tmp_path, lines, passes, message):
    """`.ci/run` as it is, with a `make` that only writes what a demo would, and no need of a browser."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    fake = tmp_path / "bin/make"
    fake.write_text('#!/bin/sh\necho "make $1" >> made.txt\n')
    fake.chmod(0o755)
    for program in ("chromium", "slurmctld"):  # so that nothing is installed
        (tmp_path / "bin" / program).symlink_to("/bin/true")
    if lines is not None:
        metrics = tmp_path / "runs/demo/metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [tmp_path / ".ci/run"],
        env=environment(PATH=path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert (tmp_path / "made.txt").read_text().split("\n")[:-1] == [
        f"make {target}" for target in ("setup", "lint", "test", "test-slow", "demo")
    ]
    assert " s  make demo" in done.stdout

"""What the command lines of this project share: reading a config, and ending every mistake in one sentence.

Exit codes: 0 done, 2 a mistake of the user's, 130 and 143 stopped by SIGINT and SIGTERM, once training has begun with
the state saved.
"""

import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

from absl import app, flags, logging
from ml_collections import config_flags

from errors import UserError, nearest

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake, not its sentence alone.")


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE[:VARIANT]` with overrides `--config.FIELD=VALUE`; fields can be changed, not added."""
    return config_flags.DEFINE_config_file(
        "config", None, "The recipe, as configs/alexnet.py or configs/alexnet.py:one_gpu."
    )


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls `main(argv)`, and turns a `UserError` into one sentence and exit code 2."""

    def guarded(argv):
        logging.set_verbosity(logging.ERROR)  # libraries' notices are not for the user of a command
        try:
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is no flag; options begin with two dashes.")
            return main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT

    app.run(guarded, flags_parser=_parse)


def _fail(sentence: str):
    if (flags.FLAGS.is_parsed() and DEBUG.value) or "--debug" in sys.argv:
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; says what is wrong with a config or an override, where ml_collections gives a traceback."""
    file, _, variant = _config_flag(argv).partition(":")
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].value  # noqa: B018 -- reading it raises what went wrong in loading
        return rest
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"--config={file} cannot be loaded: {str(error).strip().splitlines()[-1].strip()}")
    except (AttributeError, KeyError):
        _fail(_unknown_field(argv, file, variant) or traceback.format_exc())
    except flags.Error as error:
        sentence = " ".join(str(error).split())
        missing = re.findall(r"flag --(\w+)=None", sentence)
        if missing:
            sentence = f"{' and '.join(f'--{name}=…' for name in missing)} must be given; --help lists all flags."
        elif "get_config() takes 0 positional" in sentence:
            sentence = f"{file} has no variants, so none called {variant!r}."
        elif "before a value for --config" in sentence:
            sentence = "--config=FILE must come before its overrides, --config.FIELD=VALUE."
        _fail(re.sub(r"^flag --", "--", sentence))


def _config_flag(argv: list[str]) -> str:
    """The value of --config in `argv`, or ''."""
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument):
            return match[2] if match[1] else "".join(argv[i + 1 : i + 2])
    return ""


def _unknown_field(argv: list[str], file: str, variant: str) -> str | None:
    """The sentence on the first override in `argv` whose field is not in the config."""
    known = list(field_names(runpy.run_path(file)["get_config"](*[variant] * bool(variant))))
    for argument in argv:
        if (match := re.match(r"--?config\.([^=\[]+)", argument)) and match[1] not in known:
            section, _, _ = match[1].rpartition(".")
            near = [field for field in known if section and field.startswith(section + ".")] or known
            return f"{file} has no field {match[1]!r}; {nearest(match[1], near)}"
    return None


def field_names(config: Mapping, prefix: str = "") -> Iterator[str]:
    """All fields of a config, dotted: 'model', 'model.lrn', …"""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from field_names(value, f"{prefix}{key}.")

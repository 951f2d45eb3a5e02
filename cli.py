"""What the command lines of this project share: reading a config, and ending every mistake in one sentence.

Exit codes: 0 done, 2 a mistake of the user's, 130 and 143 stopped by SIGINT and SIGTERM with the state saved.
"""

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

from absl import app, flags
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
        try:
            return main(argv)
        except UserError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=_parse)


def _fail(sentence: str):
    if (flags.FLAGS.is_parsed() and DEBUG.value) or "--debug" in sys.argv:
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; says what is wrong with a config or an override, where ml_collections gives a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except config_flags.FlagOrderError:
        _fail("--config=FILE must come before its overrides, --config.FIELD=VALUE.")
    except flags.Error as error:
        _fail(re.sub(r"^flag --", "--", str(error)))
    except AttributeError as error:
        _fail(_unknown_field(argv) or str(error))
    except UserError as error:
        _fail(str(error))
    if len(rest) > 1 and rest[1].startswith("--config."):
        _fail("--config=FILE must come before its overrides, --config.FIELD=VALUE.")
    if "config" in flags.FLAGS and (flag := flags.FLAGS["config"]).present:
        try:
            flag.value  # noqa: B018 -- a file that did not load fails here
        except OSError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            _fail(f"--config={_config_file(argv)} cannot be loaded: {reason}")
    return rest


def _config_file(argv: list[str]) -> str:
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument):
            return match[2] if match[1] else "".join(argv[i + 1 : i + 2])
    return ""


def _unknown_field(argv: list[str]) -> str | None:
    """The sentence on the first override in `argv` whose field is not in the config."""
    config = flags.FLAGS["config"].value
    if config is None:
        return None
    known = list(field_names(config))
    for argument in argv:
        if (match := re.match(r"--?config\.([^=\[]+)", argument)) and match[1] not in known:
            name = match[1]
            section, _, _ = name.rpartition(".")
            near = [field for field in known if section and field.startswith(section + ".")] or known
            return f"{_config_file(argv)} has no field {name!r}; {nearest(name, near)}"
    return None


def field_names(config: Mapping, prefix: str = "") -> Iterator[str]:
    """All fields of a config, dotted: 'model', 'model.lrn', …"""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from field_names(value, f"{prefix}{key}.")

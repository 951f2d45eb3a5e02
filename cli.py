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

from errors import UserError, fail, leave, nearest, shortened, shown

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake, not its sentence alone.")


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE[:VARIANT]` with overrides `--config.FIELD=VALUE`; fields can be changed, not added."""
    try:
        return config_flags.DEFINE_config_file(
            "config", None, "The recipe, as configs/alexnet.py or configs/alexnet.py:one_gpu."
        )
    except (flags.Error, ValueError) as error:
        _fail(f"--flagfile cannot be read: {error}")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls `main(argv)`, and turns a `UserError` into one sentence and exit code 2."""

    def guarded(argv):
        if not DEBUG.value:  # libraries' notices, and their threads' tracebacks, are not for the user of a command
            logging.set_verbosity(logging.FATAL)
            sys.unraisablehook = _only_ours
        try:
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is no flag; options begin with two dashes.")
            return main(argv)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno is None:
                raise
            _fail(f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}.")
        except KeyboardInterrupt:
            leave(128 + signal.SIGINT)
        except Exception:  # a mistake of ours
            traceback.print_exc()
            leave(1)

    app.run(guarded, flags_parser=_parse)


def _fail(sentence: str):
    if (flags.FLAGS.is_parsed() and DEBUG.value) or "--debug" in sys.argv:
        traceback.print_exc()
    sentence = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in sentence)
    fail(sentence)


def _only_ours(unraisable):
    """Prints an error, unless it is TensorStore's, from threads that outlive a checkpoint that could not be written."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; whatever is wrong with one of them, or with the config's file, ends in a sentence."""
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if config is not None and not hasattr(config, "to_dict"):  # which raises what went wrong in opening the file
            raise UserError(f"--config={_config_flag(argv)}: get_config() returns no ConfigDict: {shown(config)}.")
        return rest
    except Exception as error:
        _fail(_explained(error, argv))


def _explained(error: Exception, argv: list[str]) -> str:
    """The sentence on an error in parsing `argv`; absl and ml_collections raise anything."""
    file, _, variant = _config_flag(argv).partition(":")
    message = shortened(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        reason = str(error).rpartition("failure to load: ")[2].strip() or "OSError"
        return f"--config={file} cannot be loaded: {reason.splitlines()[-1].strip()}"
    if in_file := _mistake_in(file, error):
        return f"--config={file} cannot be loaded: {in_file}"
    if not isinstance(error, flags.Error):
        being_parsed = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [f"--{flag.name} cannot be read: " for flag in being_parsed if isinstance(flag, flags.Flag)]
        return _unknown_field(argv, file, variant) or f"{names[-1] if names else ''}{message or type(error).__name__}"
    if missing := re.findall(r"flag --(\w+)=None", message):
        return f"{' and '.join(f'--{name}=…' for name in missing)} must be given; --help lists all flags."
    if "get_config() takes 0 positional" in message:
        return f"{file} has no variants, so none called {variant!r}."
    if "before a value for --config" in message:
        return "--config=FILE must come before its overrides, --config.FIELD=VALUE."
    return re.sub(r"^flag --", "--", message)


def _mistake_in(file: str, error: BaseException | None) -> str | None:
    """What went wrong in the config's own code, if it was there, with the line."""
    while error:
        message = f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
        if isinstance(error, SyntaxError) and error.filename == file:
            return message
        if lines := [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]:
            return f"{message} (line {lines[-1]})"
        error = error.__context__
    return None


def _config_flag(argv: list[str]) -> str:
    """The value of --config in `argv`, or ''."""
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument):
            return match[2] if match[1] else "".join(argv[i + 1 : i + 2])
    return ""


def _unknown_field(argv: list[str], file: str, variant: str) -> str | None:
    """The sentence on the first override in `argv` whose field is not in the config."""
    try:
        known = list(field_names(runpy.run_path(file)["get_config"](*[variant] * bool(variant))))
    except Exception:  # whatever it is, it is not the field
        return None
    for argument in argv:
        if (match := re.match(r"--?(?:no)?config\.([^=]*)", argument)) and match[1] not in known:
            section, _, _ = match[1].rpartition(".")
            near = [field for field in known if section and field.startswith(section + ".")] or known
            return f"{file} has no field {shown(match[1])}; {nearest(match[1], near)}"
    return None


def field_names(config: Mapping, prefix: str = "") -> Iterator[str]:
    """All fields of a config, dotted: 'model', 'model.lrn', …"""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from field_names(value, f"{prefix}{key}.")

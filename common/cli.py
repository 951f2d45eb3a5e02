"""What the command lines of this project share: reading a config, and ending every mistake in one sentence."""

import ast
import contextlib
import functools
import inspect
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from common import exits
from common.errors import KINDS, UserError, nearest, require, shortened, shown

HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake, not its sentence alone.")


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE[:VARIANT]` with overrides `--config.FIELD=VALUE`; fields can be changed, not added."""
    try:
        return config_flags.DEFINE_config_file(
            "config", None, "The recipe, such as configs/alexnet.py or configs/alexnet.py:one_gpu."
        )
    except (flags.Error, ValueError) as error:
        _fail(f"--flagfile cannot be read: {error}")


def run(main: Callable[[list[str]], int | None], takes: str = "", passes: tuple[str, ...] = ()) -> None:
    """Parses the flags, calls `main(argv)`, and ends the process; see `exits` for the codes.

    A `UserError`, and an `OSError` with a reason, end in one sentence. `--help` prints the docstring of the program's
    module and its flags.

    Args:
      main: the program.
      takes: the arguments that are no flags, as help shows them, such as 'FILE …'; '' for a program without.
      passes: arguments that begin so are no flags of the program but are for others, and reach `main` as they are.
    """

    def guarded(argv):
        if not DEBUG.value:  # notices of libraries, and tracebacks of their threads, do not help a user
            logging.set_verbosity(logging.FATAL)
            sys.unraisablehook = _without_tensorstore
        for stream in (sys.stdout, sys.stderr):
            if stream:  # None if it was closed
                stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
        try:
            stray = [argument for argument in argv[1:] if not argument.startswith(passes)]
            if stray and not takes:
                raise UserError(f"{stray[0]!r} is no flag; options begin with two dashes.")
            code = main(argv)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # on the way out it would only print a traceback
            return code
        except UserError as error:
            _fail(str(error))
        except BrokenPipeError:
            exits.leave(exits.NO_READER)
        except KeyboardInterrupt:
            exits.leave(exits.SIGNALS[signal.SIGINT])
        except MemoryError:
            _fail("This machine has too little memory for it.")
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                _fail(f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}.")
            traceback.print_exc()
            exits.leave(exits.DEFECT)

    if any(argument in HELP for argument in _options(sys.argv)):
        with contextlib.suppress(BrokenPipeError):  # its reader may be `head`
            print(_help(main, takes), flush=True)
        exits.leave(0)
    app.run(guarded, flags_parser=functools.partial(_parse, passes))


def _options(argv: list[str]) -> list[str]:
    """The arguments before a lone `--`, which ends the flags."""
    return argv[1 : argv.index("--")] if "--" in argv else argv[1:]


def _help(main: Callable, takes: str) -> str:
    """The docstring of the module of `main`, and a line for each of its flags and those of this module."""
    program, modules = sys.modules[main.__module__], flags.FLAGS.flags_by_module_dict()
    # absl files the flags of a program that was started by its path, and not imported, under that path.
    found = [*modules.get(main.__module__, ()), *modules.get(sys.argv[0], ()), *modules.get(__name__, ())]
    rows = [(takes, "")] if takes else []
    for flag in sorted(found, key=lambda flag: (flag.name == "debug", flag.name != "config")):
        default = "" if flag.default in (None, "", False, 0, -1) else f" [{flag.default_unparsed}]"
        rows.append((f"--{flag.name}{'' if flag.boolean else '=…'}", f"{flag.help}{default}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([inspect.cleandoc(program.__doc__), "", *lines])


def _fail(sentence: str):
    if (flags.FLAGS.is_parsed() and DEBUG.value) or "--debug" in sys.argv:
        traceback.print_exc()
    exits.fail("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in sentence))


def _without_tensorstore(unraisable):
    """Hides the error of TensorStore's threads, which outlive a checkpoint that could not be written."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(passes: tuple[str, ...], argv: list[str]) -> list[str]:
    """Parses flags; any mistake in them or in the config's file ends in a sentence."""
    known = {}
    passed = [argument for argument in argv if argument.startswith(passes)]
    argv = [argument for argument in argv if argument not in passed]
    try:
        if "config" in flags.FLAGS and (name := _config_flag(argv)) is not None:
            # Read before absl does, whose errors do not tell the file's mistakes from those of the flags.
            known = dict(field_names(load_config(name)))
            check_overrides(argv, name, known)
        return flags.FLAGS(argv) + passed
    except UserError as error:
        _fail(str(error))
    except Exception as error:  # absl and ml_collections raise anything
        _fail(_explained(shortened(" ".join(str(error).split())) or type(error).__name__, known))


def _explained(message: str, known: Mapping) -> str:
    """The sentence for an error message of absl's."""
    if missing := re.findall(r"flag --(\w+)=None", message):
        return f"{' and '.join(f'--{name}=…' for name in missing)} must be given; --help lists all flags."
    if "before a value for --config" in message:
        return "--config=FILE must come before its overrides, --config.FIELD=VALUE."
    if (match := re.match(r"flag --config\.([\w.]+)=(.*?): ", message)) and type(known.get(match[1])) in KINDS:
        return f"{match[1]}={match[2]} must be {KINDS[type(known[match[1]])][1]}."
    return message.removeprefix("flag ")


def _config_flag(argv: list[str]) -> str | None:
    """The value of --config in `argv`, or None; raises `UserError` if there are two."""
    found = []
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument, re.DOTALL):
            found.append(match[2] if match[1] else "".join(argv[i + 1 : i + 2]))
    require(len(found) < 2, f"--config is given {len(found)} times; a run has one recipe.")
    return found[0] if found else None


def load_config(name: str) -> Mapping:
    """The config of FILE or FILE:VARIANT; raises `UserError`, with the line, if the file has a mistake."""
    config = call_file("config", name)
    if not hasattr(config, "to_dict"):
        raise UserError(f"--config={name}: get_config() returns no ConfigDict: {shown(config)}.")
    return config


def call_file(kind: str, name: str) -> Any:
    """Calls get_KIND() of a file, such as get_config(); `name` is FILE or FILE:VARIANT, the value of the flag --KIND.

    Raises:
      UserError: the file has a mistake; it names the line.
    """
    file, _, variant = name.partition(":")
    try:
        function = runpy.run_path(file).get(f"get_{kind}")
        if not function:
            raise UserError(f"--{kind}={file} has no function get_{kind}().")
        if variant and not inspect.signature(function).parameters:
            raise UserError(f"{file} has no variants, so none called {variant!r}.")
        return function(*[variant] * bool(variant))
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        message = f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
        raise UserError(
            f"--{kind}={file} cannot be loaded: {message}{f' (line {lines[-1]})' if lines else ''}"
        ) from error


def check_overrides(argv: list[str], name: str, known: Mapping) -> None:
    """Raises `UserError` for an override of a field that is not there, or of a tuple too deep to parse."""
    for argument in argv:
        if not (match := re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", argument, re.DOTALL)):
            continue
        field, value = match.groups()
        if field not in known:
            section, _, _ = field.rpartition(".")
            near = [other for other in known if section and other.startswith(section + ".")] or known
            raise UserError(f"{name} has no field {shown(field)}; {nearest(field, near)}")
        if isinstance(known[field], tuple):
            try:
                with contextlib.suppress(SyntaxError, ValueError, TypeError):  # ml_collections takes these as text
                    ast.literal_eval(value)
            except (MemoryError, RecursionError):
                raise UserError(f"{field}={shown(value)} is too deep.") from None


def field_names(config: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """All fields of a config with their values: ('model', …), ('model.lrn', True), …"""
    for key, value in config.items():
        yield prefix + key, value
        if hasattr(value, "items"):
            yield from field_names(value, f"{prefix}{key}.")

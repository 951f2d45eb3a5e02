"""Runs of main.py and of tools as a user starts them: their command lines, and what they leave behind."""

import atexit
import contextlib
import json
import multiprocessing.reduction
import os
import pathlib
import pty
import runpy
import socket
import subprocess
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp
from absl import flags

import data

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = ("a", "b", "c")
# A narrow network on small views: seconds a run, all of them start-up.
NARROW = [
    "--config.input.resize=80",
    "--config.input.crop=67",
    "--config.model.width=0.125",
    "--config.model.num_classes=3",
    "--config.model.init=he",
    "--config.input.scale=0.0156",
    "--config.batch_size=8",
]
SMALL = [
    *NARROW,
    "--config.eval_batch_size=16",
    "--config.dataset.eval_split=test",
    "--config.log_every.steps=1",
    "--config.eval_every.steps=5",
    "--config.checkpoint_every.steps=5",
]
TIMES = ("train/images_per_second", "train/input_wait")


def photographs(root):
    """A folder of photographs, which `command` takes, and beside which it is prepared."""
    data.make_folder(root / "photos", {"train": 30, "test": 12}, CLASSES)
    return root


def command(folder, workdir, *arguments, devices=2, cache="cache"):
    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'configs/alexnet.py'}",
        f"--workdir={workdir}",
        f"--cpu_devices={devices}",
        f"--config.dataset.name={folder / 'photos'}",
        f"--config.dataset.data_dir={folder / cache}",
        *SMALL,
        *arguments,
    ]


# A start of Python that imports JAX and TensorFlow takes five seconds. So a server imports them once, and each run is a
# process of its own that the server forks. It runs the same `main.py`, from the parsing of the flags to its exit code.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


def _main(arguments, out, err, folder, variables, stdin=None):
    if stdin:
        os.dup2(stdin.fileno(), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 -- multiprocessing has put an empty one there
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    # New ones, because the old take a pipe for the file that they began with.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear(), os.environ.update(variables)
    sys.argv = arguments
    import main
    from common import cli

    try:
        if arguments[0].endswith("main.py"):
            cli.run(main.main)
        else:
            for flag in ("config", *(flag.name for flag in flags.FLAGS.flags_by_module_dict()["main"])):
                delattr(flags.FLAGS, flag)
            runpy.run_module(f"tools.{pathlib.Path(arguments[0]).stem}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process leaves it out, and several processes shut JAX down there
        sys.stdout.flush(), sys.stderr.flush()


class Forked:
    """A run of main.py in a forked process, with what tests use of `subprocess.Popen`."""

    def __init__(self, arguments, out, err, env=None, cwd=None, stdin=None):
        variables, folder = dict(env or os.environ), cwd or pathlib.Path.cwd()
        self._process = _context.Process(target=_main, args=(arguments, out, err, folder, variables, stdin))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def is_alive(self):
        """Whether it has not ended."""
        return self._process.is_alive()

    def send_signal(self, number):
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout=300):
        """Returns the exit code; minus the number of the signal for a killed process."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode

    returncode = property(wait)


def run(*args, expect=0, prefix=(), env=None, cwd=None, **options):
    """A run on `photographs`, see `command` and `run_main`."""
    return run_main(*command(*args, **options)[2:], expect=expect, prefix=prefix, env=env, cwd=cwd)


def run_main(*arguments, expect=0, prefix=(), env=None, cwd=None):
    """Runs main.py to its end; `prefix` stands before the command. With one, or with `cwd`, Python starts anew."""
    main = str(ROOT / "main.py")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if prefix or cwd:
            command = [*prefix, sys.executable, main, *arguments]
            code = subprocess.run(command, stdout=out, stderr=err, timeout=300, env=env, cwd=cwd).returncode
        else:
            code = Forked([main, *arguments], _Descriptor(out), _Descriptor(err), env).wait()
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(arguments, code, out.read(), err.read())
    assert code == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_tool(name, *arguments, expect=0, stdin=b"", cwd=None):
    """Runs `python -m tools.NAME` to its end in a forked process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile() as given:
        given.write(stdin), given.seek(0)
        command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
        code = Forked(command, *map(_Descriptor, (out, err)), cwd=cwd, stdin=_Descriptor(given)).wait()
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(arguments, code, out.read(), err.read())
    assert code == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def on_terminal(name, *arguments):
    """What `python -m tools.NAME` shows on a terminal, a few kilobytes at most."""
    ours, theirs = pty.openpty()
    command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    code = Forked(command, _Descriptor(theirs), _Descriptor(theirs)).wait()
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours), os.close(theirs)
    assert code == 0, shown
    return shown


class _Descriptor:
    """An open file that can be passed to a forked process."""

    def __init__(self, file):
        self._descriptor = file if isinstance(file, int) else file.fileno()

    def __getstate__(self):
        return multiprocessing.reduction.DupFd(self._descriptor)

    def __setstate__(self, passed):
        self._descriptor = passed.detach()

    def fileno(self):
        """The number of the descriptor."""
        return self._descriptor


@contextlib.contextmanager
def start(*args, env=None, **options):
    """A run under way, killed at the end; stdout is a pipe, to be read with `until`, and stderr comes with it."""
    arguments = command(*args, **options)
    readable, writable = os.pipe()
    with os.fdopen(readable) as said:
        process = Forked(arguments[1:], _Descriptor(writable), _Descriptor(writable), env)
        os.close(writable)
        process.stdout = said
        try:
            yield process
        finally:
            process.kill()
            process.wait(60)


def until(process, step):
    """Reads what a run says until it has logged `step`, and returns it."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step ") and int(line.split()[1]) >= step:
            break
    return "".join(said)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sentence(said):
    """The one sentence with which a command ended."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said[-3000:]
    assert "Traceback" not in said
    return errors[0]


def metrics(workdir, times=False):
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if times or name not in TIMES} for line in lines]


def checkpoints(workdir):
    """The steps that have a complete checkpoint."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def leftovers(*folders):
    """What looks temporary in these folders."""
    signs = ("tmp", "partial", "replaced", "damaged", "surplus")
    return [path for folder in folders for path in folder.rglob("*") if any(sign in path.name for sign in signs)]


def parameters(workdir, step):
    """The arrays of a checkpoint, by path, as Orbax itself reads them."""
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return {"/".join(map(str, path)): leaf for path, leaf in _leaves(state)}


def assert_same(workdir, other, step):
    """Both runs have the same state at `step` bit for bit, and the same metrics up to it."""
    mine, theirs = parameters(workdir, step), parameters(other, step)
    assert mine.keys() == theirs.keys() and len(mine) > 30
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert metrics(workdir) == metrics(other)


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return [(path, np.asarray(tree))] if tree is not None else []
    return [found for key, value in items for found in _leaves(value, (*path, key))]

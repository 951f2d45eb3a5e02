"""The shape of the code: imports go one way, TensorFlow stays where it is needed, files stay readable."""

import ast
import builtins
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# CONTRIBUTING.md has a table of the rooms, from the top down: a room imports from later rows only, or from its own.
ROWS = re.findall(r"^\| (`.+?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
FLOORS = [[name.removesuffix(".py").rstrip("/") for name in re.findall("`(.+?)`", row)] for row in reversed(ROWS)]
MOST_LINES = 350


def sources():
    """The Python files of the project but its tests, by module name."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in files.stdout.splitlines() if not line.startswith(("tests/", ".ci/"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


SOURCES = {name: path for name, path in sources().items() if path.exists()}


def imports(name, at_import=False):
    """The modules that a module imports, of the project or not; `at_import`: those outside of functions alone."""
    tree = ast.parse(SOURCES[name].read_text())
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else node.module


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name.partition(".")[0] in rooms)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name):
    for other in imports(name):
        if other in SOURCES:
            assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"


def test_imports_go_in_no_circle():
    left = {name: set(imports(name)) & SOURCES.keys() - {name} for name in SOURCES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_is_readable_at_a_sitting(name):
    assert len(SOURCES[name].read_text().splitlines()) <= MOST_LINES


def test_only_a_few_rooms_import_tensorflow_and_none_before_it_is_used():
    """A model, a step or a checkpoint loads without it."""
    heavy = {"tensorflow", "tensorflow_datasets"}
    for name in SOURCES:
        if heavy & {other.partition(".")[0] for other in imports(name)}:
            assert name.partition(".")[0] in ("input_pipeline", "datasets", "run", "benchmarks"), name
        # The generated set is a class of TFDS, and is imported by name only.
        if name != "datasets.shapes":
            assert not heavy & {other.partition(".")[0] for other in imports(name, at_import=True)}, name


def test_the_loop_loads_without_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, train; print(*(m for m in sys.modules if m.startswith('tensorflow')))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stdout.strip()


def test_jax_pmap_and_axis_names_are_known_to_one_file():
    for name, path in SOURCES.items():
        if name != "parallel":
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not names & {"pmap", "psum", "pmean", "all_gather", "axis_index"}, name


@pytest.mark.parametrize("name", SOURCES)
def test_no_parameter_hides_a_builtin_or_a_module(name):
    tree = ast.parse(SOURCES[name].read_text())
    bound = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if isinstance(node, ast.Import) or f"{node.module}.{alias.name}" in SOURCES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            assert not hasattr(builtins, node.arg), f"line {node.lineno}: {node.arg}"
            assert node.arg not in bound, f"line {node.lineno}: {node.arg}"

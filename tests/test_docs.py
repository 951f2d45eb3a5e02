"""The documents: what they name exists, links hold, their Python runs, and their numbers are those of the networks."""

import ast
import builtins
import doctest
import functools
import itertools
import re
from pathlib import Path

import pytest

import models
from common import cli
from configs import alexnet
from configs.sweeps import claims
from drawing import page

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
GUIDE = ROOT / "docs/alexnet.md"
REPRODUCTION = ROOT / "docs/reproduction.md"
RECIPES = {path.stem: path for path in ROOT.glob("configs/*.py") if path.stem not in ("__init__", "base", "finetune")}


def prose(document):
    """The text of a document outside of its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.S | re.M)


def names(document):
    """What stands in backticks in the prose of a document."""
    return re.findall(r"`([^`]+)`", prose(document))


def commands():
    """Yields (file, line) for each command of the documents, the Makefile and the CI script."""
    for document in DOCUMENTS:
        blocks = re.findall(r"```\w*\n(.*?)```|`((?:make|python)\s[^`]*)`", document.read_text(), re.S)
        for line in itertools.chain(*(re.split(r"(?<!\\)\n", a or b) for a, b in blocks)):
            yield document.name, line
    for name in ["Makefile", ".ci/run"]:
        for line in (ROOT / name).read_text().splitlines():
            yield name, line


# ---- what a document may name


@functools.cache
def defined(path):
    """The names that a file defines: functions, classes, constants, and Class.member."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= own(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member}" for part in node.body for member in own(part)}
    return found


def own(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@functools.cache
def fields():
    """The fields of all recipes, and their sections."""
    return frozenset(name for path in RECIPES.values() for name, _ in cli.field_names(cli.load_config(str(path))))


PASSED = {"slurm"}  # what follows the dot goes to sbatch


@functools.cache
def flags(path):
    """The flags that a command defines, with those that it shares with others."""
    shared = [ROOT / "common/cli.py", ROOT / "tools/shared.py"]
    text = "".join(file.read_text() for file in [path, *shared])
    return set(re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?(\w+)"', text)) | {"help"}


def is_known(dotted):
    """Whether a dotted name is a module of the project, something in one, a member of a class, or a config field."""
    parts = dotted.split(".")
    if dotted in fields():
        return True
    if parts[0][0].isupper():
        return any(dotted in defined(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    for count in range(len(parts), 0, -1):
        stem = ROOT.joinpath(*parts[:count])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return count == len(parts) or ".".join(parts[count:]) in defined(path)
    return False


SUFFIXES = ("npz", "tar", "html", "json", "jsonl", "csv", "svg", "png", "cff")  # of what a run writes, and the like
OURS = {name.partition(".")[0] for name in fields()} | {
    path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_functions_and_fields_exist(document):
    for name in set(names(document)) - {"results.md"}:  # which a sweep writes
        if match := re.fullmatch(r"([\w./]+\.(?:py|md|txt))(:[a-z]\w*)?", name):
            places = [ROOT / match[1], ROOT / "tests" / match[1], document.parent / match[1]]
            assert any(place.exists() for place in places), f"{name} is not there"
            if match[2]:
                cli.load_config(name)
        elif match := re.fullmatch(r"([A-Za-z]\w*(?:\.\w+)+)(=.*)?", name):
            first, _, rest = match[1].partition(".")
            if (first in OURS or first[0].isupper()) and rest not in SUFFIXES:
                assert is_known(match[1]), f"{name} is not known"
    for path, inside in re.findall(r"`([\w/]+\.py)`((?:,?\s+`(?!\w+\.py`)[A-Za-z_]\w*(?:\.\w+)?`)+)", prose(document)):
        for name in re.findall(r"`(.+?)`", inside):
            assert name in defined(ROOT / path), f"{path} has no {name}"


def test_commands_name_files_flags_and_targets_that_exist():
    targets = set(re.findall(r"^\.PHONY: ([\w-]+)$", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for name, line in commands():
        wanted = re.findall(r"(?:python|\$\(python\)) ([\w./]+\.py)\b", line)
        modules = re.findall(r"(?:python|\$\(python\)) -m ((?:tools|benchmarks)\.[a-z]\w*)", line)
        wanted += [module.replace(".", "/") + ".py" for module in modules]
        for path in [*wanted, *re.findall(r"--(?:config|sweep)=([\w./]+\.py)\b", line)]:
            assert (ROOT / path).exists(), f"{name} names {path}: {line}"
        for path in wanted:
            for flag in re.findall(r"--([a-z]\w*)", line):
                assert flag in flags(ROOT / path) | PASSED, f"{name}: {path} has no --{flag}: {line}"
        made = re.findall(r"^\s*(?:part )?make ([a-z-]+)", line)
        assert set(made) <= targets, f"{name}: {line}"
        seen += len(wanted) + len(made)
    assert seen >= 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(document):
    files = [ROOT / "main.py", *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    everywhere = set().union(*map(flags, files))
    for name in names(document):
        if match := re.match(r"--([a-z]\w*)", name):
            assert match[1] in everywhere | PASSED, f"no command has {name}"
    for field in re.findall(r"--config\.([\w.]+)", document.read_text()):
        assert field in fields() or field == "FIELD", f"no recipe has {field}"


# ---- links


def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_hold(document):
    text = prose(document)
    for target in re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("http"):
            aim = (document.parent / path) if path else document
            assert aim.exists(), f"{path} is not there"
            assert not anchor or anchor in anchors(aim), f"{aim.name} has no heading #{anchor}"
    given = set(re.findall(r"^\[(\w+)\]: \S+$", text, re.M))
    assert set(re.findall(r"\]\[(\w+)\]", text)) == given


def test_pictures_are_used_and_small():
    pictures = set((ROOT / "docs/pictures").iterdir())
    text = "".join(path.read_text() for path in ROOT.glob("docs/*.md"))
    shown = {ROOT / "docs" / name for name in re.findall(r'["(](pictures/[^")]+)', text)}
    assert pictures == shown
    assert max(path.stat().st_size for path in pictures) < 150_000


# ---- docs/alexnet.md


def test_the_python_of_the_guide_runs_and_prints_what_it_says(monkeypatch):
    monkeypatch.setattr(builtins, "_", None, raising=False)  # an example that is printed sets it; undone at the end
    text = re.sub(r"^```.*$", "", GUIDE.read_text(), flags=re.M)  # the end of a block would count as output
    examples = doctest.DocTestParser().get_doctest(text, {}, GUIDE.name, str(GUIDE), 0)
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted > 30 and not result.failed


def test_each_section_has_its_code_its_config_and_something_to_type():
    sections = re.split(r"^## ", GUIDE.read_text(), flags=re.M)[1:]
    assert len(sections) > 12
    for section in sections:
        title, text = section.split("\n", 1)
        if title != "The pictures":
            assert re.search(r"^Code: `", text, re.M), title
            assert re.search(r"\bConfig: ", text), title
            assert re.search(r"^(?:python|tensorboard) ", text, re.M), title


def test_the_table_of_the_guide_is_that_of_the_network():
    config = alexnet.get_config()
    table = re.search(r"^\| layer .*?\n\n", GUIDE.read_text(), re.M | re.S)[0].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table)
    expected = page.layers(models.layer_table(config.model, config.input.crop), config.model.towers)
    columns = [page.LAYERS.index(name) for name in header]
    assert rows == [[cells[column] for column in columns] for cells in expected]


def test_the_formulas_have_the_numbers_of_the_recipe():
    config, text = alexnet.get_config(), " ".join(GUIDE.read_text().split())
    network, rule, pixels = config.model, config.optimizer, config.input
    for formula in (
        f"k = {network.lrn_k:g}, α = {network.lrn_alpha:g}, β = {network.lrn_beta:g}",
        f"the n = {network.lrn_n} maps around",
        f"v ← {rule.momentum:g} · v − {rule.weight_decay:g} · ε · w − ε · g",
        f"begins with ε = {rule.learning_rate:g}.",
        f"a *batch* of {config.batch_size} images",
        f"takes {network.pool_window}×{network.pool_window} pixels every {network.pool_stride} pixels",
        f"to {pixels.resize} pixels, and the central {pixels.resize}×{pixels.resize} square",
        f"a {pixels.crop}×{pixels.crop} part, at one of {pixels.resize - pixels.crop + 1} ×",
        f"normal distribution of standard deviation {pixels.lighting_std:g}",
    ):
        assert formula in text, formula


def test_large_numbers_are_those_of_the_networks():
    """What a comma divides into thousands; a few numbers have other sources."""
    known = {"1,000", "2,048", "2,178", "1,500"}  # classes; views, as the paper and as the code count; levels
    for recipe, variants in {"alexnet": ("", *alexnet.VARIANTS), "torchvision": ("",)}.items():
        for variant in variants:
            config = cli.load_config(f"{RECIPES[recipe]}:{variant}".rstrip(":"))
            cells = page.layers(models.layer_table(config.model, config.input.crop), config.model.towers)
            known |= {cell for row in cells for cell in row}
    assert 33 * 33 * 2 == 2178 and round(0.1 * 122**2, -2) == 1500
    assert set(re.findall(r"\d{1,3}(?:,\d{3})+", GUIDE.read_text())) <= known


# ---- docs/reproduction.md


def test_the_tests_of_the_table_exist():
    written = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = {name for name in names(REPRODUCTION) if re.fullmatch(r"test_\w+", name)}
    assert len(named) > 20
    for name in named:
        assert f"\ndef {name}(" in written, name


def test_every_arm_is_in_the_table_with_what_was_published():
    arms = claims.get_sweep().arms
    table = re.search(r"^\| the paper or a log .*?\n\n", REPRODUCTION.read_text(), re.M | re.S)[0]
    found = {}
    for _, published, cell, *_ in (row.strip("| \n").split(" | ") for row in table.strip().splitlines()[2:]):
        numbers = [float(number.replace("−", "-")) for number in re.findall(r"[+−]\d+(?:\.\d+)?(?= |,|$)", published)]
        found |= dict.fromkeys(re.findall(r"`(\w+)`", cell), numbers)
    known = {
        name: [pytest.approx(100 * value, abs=0.006) for value in arm.published.values()] for name, arm in arms.items()
    }
    assert found == {name: numbers for name, numbers in known.items() if name != "base"}

"""tools/figures.py: its choices worked out by hand, its files, and the report in a browser, as a reader sees it."""

import html
import re
import shutil

import numpy as np
import PIL.Image
import pytest

import data
import runs
from configs import base
from predictor import Predictor
from tools import figures

# Names that a page or a picture must not take for its own signs.
CLASSES = ("<script>alert(1)<", "$x_{", "a" * 60)
ALWAYS = ("curves", "diagram", "kernels", "activations")
WITH_DATA = ("predictions", "neighbours", "layers", "augmentation")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    data.make_folder(folder / "photos", {"train": 30, "test": 12}, CLASSES)
    return folder


@pytest.fixture(scope="module")
def workdir(folder):
    runs.run(folder, folder / "<script>run<", "--config.num_steps=10")
    return folder / "<script>run<"


@pytest.fixture(scope="module")
def drawn(workdir):
    """What the tool says, and the folder of what it draws."""
    return runs.run_tool("figures", f"--workdir={workdir}"), workdir / "figures"


# What is chosen.


def test_even_numbers():
    assert figures.evenly(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert figures.evenly(10, 4).tolist() == [0, 2, 5, 7]


def test_photographs_are_chosen_evenly_over_the_classes():
    labels = np.array([2, 0, 0, 1, 2, 0, 1])
    assert figures.choose(labels, 3).tolist() == [1, 3, 0]  # the first of each
    assert figures.choose(labels, 5).tolist() == [1, 2, 3, 6, 0]  # then the second of each
    assert figures.choose(labels, 99).tolist() == [1, 2, 5, 3, 6, 0, 4]
    assert figures.choose(np.arange(10), 2).tolist() == [0, 5]


def test_neighbours_are_nearest_in_euclidean_distance():
    vectors = np.array([[3.0, 4], [0, 1], [0, 0], [0, -1]], np.float32)
    assert figures.nearest(np.zeros(2, np.float32), vectors, 3) == [(2, 0.0), (1, 1.0), (3, 1.0)]
    assert figures.nearest(np.zeros(2, np.float32), vectors, 9)[-1] == (0, 5.0)


def test_the_nearest_to_a_training_image_is_itself(workdir):
    network = Predictor(workdir)
    records = network.data()
    squares, labels = zip(*figures.images(records, "train", np.arange(30)), strict=True)
    known = np.stack([row["fc7"] for row in network.features(squares, ["fc7"])])
    for number in (0, 7, 29):
        (found, distance), *_ = figures.nearest(known[number], known, 3)
        assert (found, distance) == (number, 0)
    for number, (square, label) in zip((29, 4), figures.images(records, "train", np.array([29, 4])), strict=True):
        np.testing.assert_array_equal(square, squares[number])
        assert label == labels[number]


def test_augmentation_is_that_of_training(workdir):
    """Each row is what an independent crop, reflection and shift of the photograph give."""
    records = Predictor(workdir).records
    options = base.get_config().input
    options.update(resize=80, crop=67, random_crop=True, reflect=True, lighting_std=0.1)
    photo = np.random.default_rng(0).integers(60, 200, (80, 80, 3), np.uint8)
    rows = figures.augmented(photo, records, options)
    assert list(rows) == ["crops", "reflections", "lighting", "together"]
    windows = [photo[top : top + 67, left : left + 67] for top in range(14) for left in range(14)]
    centre = photo[6 : 6 + 67, 6 : 6 + 67]
    assert all(any(np.array_equal(view, window) for window in windows) for view in rows["crops"])
    assert len({view.tobytes() for view in rows["crops"]}) > 2
    assert {view.tobytes() for view in rows["reflections"]} == {centre.tobytes(), centre[:, ::-1].tobytes()}
    for view in rows["lighting"]:
        change = view.astype(int) - centre
        assert np.ptp(change, axis=(0, 1)).max() <= 1 and change.any()  # one shift of all pixels, rounded
    for view, crop in zip(rows["together"], rows["crops"], strict=True):
        change = min((view.astype(int) - way for way in (crop, crop[:, ::-1])), key=lambda change: np.ptp(change))
        assert np.ptp(change, axis=(0, 1)).max() <= 1


def test_views_of_random_areas_are_shown(workdir):
    options = base.get_config().input
    options.update(resize=80, crop=40, random_crop=True, crop_area=(0.3, 1.0))
    photo = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, :, None] * 3, (80, 80, 3))
    (shown,) = figures.augmented(photo, Predictor(workdir).records, options).values()
    slopes = [np.ptp(view[20, :, 0].astype(int)) for view in shown]  # how much of the width a view has
    assert all(view.shape == (40, 40, 3) for view in shown)
    assert min(slopes) > 3 * (np.sqrt(0.3) * 80 - 4)
    assert len(set(slopes)) > 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"crop_area": (0.5, 1.0)}, ["crops"]),
        ({"reflect": True}, ["reflections"]),
        ({"random_crop": True, "crop": 80}, []),  # there is one crop only
        ({"random_crop": True, "lighting_std": 0.1}, ["crops", "lighting", "together"]),
    ],
)
def test_augmentation_that_is_off_is_not_shown(workdir, fields, expected):
    options = base.get_config().input
    options.update({"resize": 80, "crop": 67} | fields)
    assert list(figures.augmented(np.zeros((80, 80, 3), np.uint8), Predictor(workdir).records, options)) == expected


# What is written.


def test_every_figure_is_written_twice_and_named(drawn):
    done, out = drawn
    expected = [f"{name}.{suffix}" for name in (*ALWAYS, *WITH_DATA) for suffix in ("png", "svg")]
    assert done.stdout.split("\n")[:-1] == [str(out / name) for name in (*expected, "report.html")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*expected, "report.html"])
    for name in expected:
        if name.endswith("png"):
            with PIL.Image.open(out / name) as image:
                image.load()
        else:
            assert "<svg" in (out / name).read_text()


def test_the_report_is_one_file_that_escapes_every_name(drawn, workdir):
    _, out = drawn
    text = (out / "report.html").read_text()
    assert len(text) < 3_000_000
    assert "<script" not in text and "&lt;script&gt;run&lt;" in text
    assert not re.findall('(?:src|href)=(?!"data:)', text) and not re.findall(r"@import|url\(", text)
    said = html.unescape(text)
    for row in Predictor(workdir).table:
        assert f">{row.name}<" in text and f"{row.parameters:,}" in said
    for field in ("input.resize", "schedule.name", "optimizer.momentum"):
        assert field in said
    last = [line for line in runs.metrics(workdir) if "test/loss" in line][-1]
    assert f"{last['test/top1_error']:.2%}" in said and f"{last['test/loss']:.4f}" in said
    for name in ("figure 1", "figure 2", "figure 3", "figure 4 (left)", "figure 4 (right)", "section 4.1"):
        assert name in said


def test_without_its_data_the_rest_is_drawn(workdir, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved, ignore=shutil.ignore_patterns("figures"))
    (moved / "metrics.jsonl").unlink()
    empty = tmp_path / "empty"
    done = runs.run_tool("figures", f"--workdir={moved}", f"--data_dir={empty}", f"--out={tmp_path / 'out'}")
    left_out = [line for line in done.stderr.splitlines() if "left out" in line]
    assert len(left_out) == 2 and left_out[0].startswith("curves is left out")
    assert left_out[1].startswith("predictions, neighbours, layers and augmentation are left out: The records of")
    found = {path.stem for path in (tmp_path / "out").glob("*.svg")}
    assert found == set(ALWAYS) - {"curves"}
    assert "Config" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    done = runs.run_tool("figures", f"--workdir={workdir}", f"--out={tmp_path / 'file' / 'out'}", expect=2)
    assert "cannot be written" in runs.sentence(done.stderr)


# The report in a browser.


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium; .ci/run installs it")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_the_report_reads_well(browser, drawn, size, scheme):
    _, out = drawn
    viewport = dict(zip(("width", "height"), size, strict=True))
    view = browser.new_page(viewport=viewport, color_scheme=scheme, is_mobile=size[0] < 600)
    problems, requests = [], []
    view.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.on("requestfailed", lambda request: problems.append(request.url[:200]))
    view.on("request", lambda request: requests.append(request.url[:5]))
    view.goto((out / "report.html").as_uri(), wait_until="load")
    assert not problems and set(requests) <= {"file:", "data:"} and requests.count("file:") == 1
    assert view.evaluate("innerWidth") == size[0] >= view.evaluate("document.documentElement.scrollWidth")
    widths = view.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == len(ALWAYS) + len(WITH_DATA) and min(widths) > 0
    back, ink, card = view.evaluate(
        """["body", "body", ".card"].map((name, i) =>
        getComputedStyle(document.querySelector(name))[i == 1 ? "color" : "backgroundColor"])"""
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (back, ink, card)]
    assert (light[0] > 200 > light[1]) if scheme == "light" else (light[0] < 60 < 200 < light[1])
    assert light[2] == 255  # pictures are drawn for white
    view.close()

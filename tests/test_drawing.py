"""Pictures: pixels and numbers worked out by hand, the data read back from the figures, and files written whole."""

import itertools
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest

import models
from common.errors import UserError
from configs import caffe
from drawing import canvas, diagram, grids, page, plots

RNG = np.random.default_rng(0)


def photographs(count, size=16):
    return list(RNG.integers(0, 256, (count, size, size, 3), np.uint8))


def texts(figure):
    """All that a figure says."""
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
    return [text for text in found if text]


def inside(figure):
    """Whether no text of the figure is cut by its edge."""
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else figure._get_renderer()
    edge = figure.bbox
    boxes = [text.get_window_extent(renderer) for text in (*figure.texts, *(t for a in figure.axes for t in a.texts))]
    return all(edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0 and b.y1 <= edge.y1 for b in boxes)


# Grids.


def test_a_tile_has_its_images_row_by_row():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = grids.tile(images, columns=2, gap=1, background=255)
    assert grid.shape == (5, 7, 3)
    expected = [
        [10, 10, 10, 255, 20, 20, 20],
        [10, 10, 10, 255, 20, 20, 20],
        [255] * 7,
        [30, 30, 30, 255, 255, 255, 255],
        [30, 30, 30, 255, 255, 255, 255],
    ]
    np.testing.assert_array_equal(grid[..., 1], expected)


@pytest.mark.parametrize(
    ("count", "aspect", "columns"), [(1, 2, 1), (2, 2, 2), (8, 2, 4), (48, 16 / 3, 16), (96, 8 / 3, 16), (1, 16, 1)]
)
def test_columns(count, aspect, columns):
    assert grids.columns_of(count, aspect) == columns


def test_kernels_are_scaled_each_and_split_by_tower():
    kernel = np.zeros((1, 1, 3, 4), np.float32)
    kernel[0, 0, :, 0] = (2, -2, 0)
    kernel[0, 0, :, 3] = (0, 0, 0.5)
    first, second = grids.kernels(kernel, towers=2)
    np.testing.assert_array_equal(first[0, 0], (255, 0, 128))
    np.testing.assert_array_equal(second[0, -1], (128, 128, 255))
    np.testing.assert_array_equal(second[0, 0], (128, 128, 128))


def test_colour_selectivity_of_known_kernels():
    kernel = np.zeros((3, 3, 3, 6), np.float32)
    kernel[..., 0] = RNG.normal(size=(3, 3, 1))  # grey
    kernel[..., 0, 1], kernel[..., 1, 1] = 1, -1  # red minus green
    kernel[..., 0, 2] = 1  # red alone: a third of it is grey
    kernel[..., 3] = -5 * kernel[..., 1]
    kernel[..., 4] = kernel[..., 2]  # and the last is zero
    first, second = grids.selectivity(kernel, 2)
    np.testing.assert_allclose((first, second), ((0 + 1 + 2 / 3) / 3, (1 + 2 / 3 + 0) / 3), rtol=1e-6)
    np.testing.assert_allclose(grids.selectivity(kernel[..., :1], 1), [0], atol=1e-6)


def test_maps_go_from_black_to_white_and_units_are_pixels():
    (units,) = grids.maps(np.arange(401.0), 1, aspect=401)
    assert units.shape == (1, 401, 3)
    # 398 is above 99.5 % of the values.
    assert units[0, [0, 100, 300, 397, 398, 400], 1].tolist() == [0, 64, 192, 254, 255, 255]
    assert [part.shape[1] for part in grids.maps(np.arange(5.0), 2, aspect=9)] == [3, 2]
    (grid,) = grids.maps(np.arange(2 * 2 * 2).reshape(2, 2, 2).astype(float), 1)
    assert grid.shape == (24, 24 + 1 + 24, 3)  # two maps of 2×2, their pixels repeated
    assert grid[0, 0, 0] == 0 and grid[-1, -1, 0] == 255
    assert len(np.unique(grid[:, :24])) == 4
    assert not grids.maps(np.zeros((4, 4, 3)), 1)[0][:24, :24].any()


# Figures.


def test_predictions_show_each_label_and_colour_the_right_one():
    answers = [[("cat", 0.75), ("dog", 0.25)], [("dog", 0.5), ("cat", 0.4)], [("$x_{", 1.0), ("w" * 90, 0.0)]]
    figure = plots.predictions(photographs(3), answers, ["cat", None, "elsewhere"])
    said = texts(figure)
    assert {"cat", "dog", "75%", "$x_{", "elsewhere"} <= set(said)
    assert any(text.startswith("www") and text.endswith("…") for text in said)
    bars = [axes for axes in figure.axes if axes.patches]
    assert [[bar.get_width() for bar in axes.patches] for axes in bars] == [[0.75, 0.25], [0.5, 0.4], [1.0, 0.0]]
    right = [[canvas.matplotlib.colors.to_hex(bar.get_facecolor()) == canvas.RIGHT for bar in a.patches] for a in bars]
    assert right == [[True, False], [False, False], [False, False]]
    assert inside(figure)


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_any_number_of_photographs(count):
    figure = plots.predictions(photographs(count), [[("a", 0.5)]] * count, ["a"] * count)
    assert sum(bool(axes.images) for axes in figure.axes) == count
    assert inside(figure)


def test_a_confusion_matrix_shows_shares_of_the_true_class():
    figure = plots.confusion(np.array([[3.0, 1, 0], [0, 0, 0], [0, 1, 1]]), ["a", "b", "c"])
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(shares.filled(-1), [[0.75, 0.25, 0], [-1, -1, -1], [0, 0.5, 0.5]])
    assert set(texts(figure)) >= {"75%", "25%", "50%"}


@pytest.mark.parametrize("count", [2, 13, 101, 1000])
def test_class_names_have_room(count):
    figure = plots.confusion(np.eye(count), [f"class {number} {'x' * 40}" for number in range(count)])
    axes, renderer = figure.axes[0], figure._get_renderer()
    labels = axes.get_yticklabels()
    boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    outer = [*boxes, *(label.get_window_extent(renderer) for label in axes.get_xticklabels())]
    assert min(box.x0 for box in outer) > 0 and min(box.y0 for box in outer) > 0
    assert len(labels) == count if count <= 101 else 50 < len(labels) <= 101


def test_the_layers_of_a_photograph_have_names_shapes_and_towers():
    values = {"conv1": RNG.random((5, 5, 6)), "fc6": RNG.random(11)}
    figure = plots.layers(photographs(1)[0], values, 2)
    assert {"input", "conv1", "5×5×6", "fc6", "11", "tower 0", "tower 1"} <= set(texts(figure))
    assert sum(bool(axes.images) for axes in figure.axes) == 1 + 2 * 2
    alone = plots.layers(photographs(1)[0], values, 1)
    assert "tower 0" not in texts(alone) and inside(figure) and inside(alone)


LINES = [
    {"step": 5, "epoch": 1.0, "train/loss": 2.0, "train/top1_error": 0.9},
    {"step": 10, "epoch": 2.0, "train/loss": None, "train/top1_error": 0.8},
    {"step": 10, "epoch": 2.0, "eval/loss": 1.5, "eval/top1_error": 0.7, "eval/top5_error": 0.2},
    {"step": 15, "epoch": 3.0, "train/loss": 1.0, "train/top1_error": 0.6},
    {"step": 15, "epoch": 3.0, "test/loss": 1.4, "test/top1_error": 0.65, "test/top5_error": 0.15, "test/step": 10},
]


def test_curves_have_the_values_of_the_lines():
    errors, losses = plots.curves(LINES).axes
    found = {line.get_label(): line.get_xydata().tolist() for line in errors.lines}
    assert found == {
        "training, top-1": [[1, 0.9], [2, 0.8], [3, 0.6]],
        "evaluation, top-1": [[2, 0.7]],
        "evaluation, top-5": [[2, 0.2]],
        "ten views, top-1": [[2, 0.65]],  # at the epoch of its checkpoint
        "ten views, top-5": [[2, 0.15]],
    }
    found = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert found == {"training": [[1, 2.0], [3, 1.0]], "evaluation": [[2, 1.5]]}


@pytest.mark.parametrize("lines", [LINES[:1], [{"step": 1, "epoch": 0.1}]])
def test_curves_of_a_run_that_has_just_begun(lines):
    assert len(plots.curves(lines).axes) == 2


@pytest.mark.parametrize(("towers", "count"), [(2, 96), (2, 7), (1, 1)])
def test_kernels_name_their_tower_and_its_colour_selectivity(towers, count):
    kernel = np.zeros((3, 3, 3, count), np.float32)
    kernel[..., 0, :], kernel[..., 1, :] = 1, -1
    figure = plots.kernels(kernel, towers)
    assert texts(figure).count("colour selectivity 1.00") == towers
    assert ("tower 1" in texts(figure)) == (towers == 2)
    assert inside(figure)


def test_neighbours_of_another_class_are_grey():
    image = photographs(1)[0]
    figure = plots.neighbours([(image, "cat")], [[(image, "cat", 0.0), (image, "dog" * 30, 1234.5)]])
    colours = {text.get_text(): text.get_color() for text in figure.texts}
    near, far = colours["cat"], next(colour for text, colour in colours.items() if text.startswith("dogdog"))
    assert near != far == canvas.GREY
    assert inside(figure)


def row(name, output, kernel, exchange=0):
    return types.SimpleNamespace(
        name=name, output=output, kernel=kernel, exchange=exchange, joined=exchange > 0, parameters=7, multiply_adds=9
    )


ROWS = [row("conv1", (55, 55, 96), (11, 11, 3, 96)), row("fc8", (101,), (4096, 101), exchange=2048)]


def test_a_diagram_has_each_layer_and_crosses_at_exchanges():
    figure = diagram.diagram(ROWS, 2, 224)
    said = texts(figure)
    assert {"input", "224×224×3", "conv1", "55×55×48", "fc8", "51", "50", "kernels 11×11×3"} <= set(said)
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 2
    alone = diagram.diagram(ROWS, 1, 224)
    assert {"55×55×96", "101"} <= set(texts(alone)) and "tower 0" not in texts(alone)
    assert all(line.get_linestyle() == "-" for line in alone.axes[0].lines)
    assert inside(figure) and inside(alone)


def test_only_maps_of_both_towers_cross():
    """Not those that Caffe's normalisation exchanges: conv2 sees the maps of its own tower."""
    config = caffe.get_config()
    rows = models.layer_table(config.model, config.input.crop)
    assert [row.name for row in rows if row.exchange] == ["conv1", "conv2", "conv3", "fc6", "fc7", "fc8"]
    figure = diagram.diagram(rows, 2, config.input.crop)
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 2 * 4


# Files.


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_written_whole_and_the_same_each_time(tmp_path, suffix):
    for name in ("a", "b"):
        answers = [[("名前", 0.5), ("a\nb", 0.2)]]  # the font lacks the first, the second has two lines
        canvas.save(
            plots.predictions([np.zeros((4, 4, 3), np.uint8)], answers, [r"$\frac{$"]),
            tmp_path / f"{name}{suffix}",
        )
    first, second = sorted(tmp_path.iterdir())
    assert first.read_bytes() == second.read_bytes()
    if suffix == ".png":
        with PIL.Image.open(first) as picture:
            picture.verify()


def test_no_picture_where_none_can_be_written(tmp_path):
    figure = plots.curves(LINES)
    with pytest.raises(UserError, match=r"must end in \.png, \.svg or \.pdf"):
        canvas.save(figure, tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"missing/a\.png cannot be written: there is no folder"):
        canvas.save(figure, tmp_path / "missing" / "a.png")
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    figure.savefig = fail
    with pytest.raises(UserError, match="No space left"):
        canvas.save(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_text_is_cut_to_its_width():
    assert canvas.fitted("short", 2) == "short"
    cut = canvas.fitted("W" * 100, 1, size=8)
    assert cut.endswith("…") and canvas.extent(cut, 8) <= 1 < canvas.extent("W" + cut, 8)
    assert canvas.fitted("a\nb\x1b", 2) == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


def test_a_predictor_loads_without_matplotlib():
    code = "import sys, predictor; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The page.


def test_a_page_escapes_what_it_shows():
    hostile = "<script>alert(1)</script>\"'&"
    table = page.table((hostile, "b"), [(hostile, "1")], numbers=(1,))
    text = page.page(hostile, hostile, [(hostile, table)])
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;") == 6


def test_the_cells_of_layers_have_totals():
    assert page.layers(ROWS, 2) == [
        ("conv1", "55×55×96", "11×11×3×96", "7", "9", "48 | 48", ""),
        ("fc8", "101", "4096×101", "7", "9", "51 | 50", "2,048"),
        ("total", "", "", "14", "18", "", "2,048"),
    ]

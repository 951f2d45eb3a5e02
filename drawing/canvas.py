"""What all pictures share: their style, places in inches, text that fits, and files that are written whole."""

import functools
import pathlib
import warnings
from collections.abc import Callable

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import files
from common.errors import require, shown

SUFFIXES = (".png", ".svg", ".pdf")
FONT = "DejaVu Sans"  # comes with Matplotlib
STYLE = {
    "font.family": FONT,
    "font.size": 8,
    "text.usetex": False,
    "text.parse_math": False,  # a class may be called $x
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "drawing",  # the same picture gives the same file
}
INK, GREY, PALE = "#222222", "#666666", "#dddddd"
TOWERS = ("#3b6ea8", "#c8662b")
LINES = ("#3b6ea8", "#c8662b", "#4d8a57")
RIGHT, WRONG = "#f0a889", "#b9cfe6"


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the style of all pictures."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def sheet(width: float, height: float) -> Figure:
    """An empty picture of this size in inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor="white")


def place(figure: Figure, left: float, top: float, width: float, height: float, frame: bool = False) -> Axes:
    """Axes at a place in inches from the left and upper edge; without `frame` they show only what is drawn in them."""
    whole_width, whole_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    )
    if not frame:
        axes.set_axis_off()
    return axes


def write(figure: Figure, left: float, top: float, text: str, **options) -> None:
    """Writes text with its upper left corner at a place in inches; other alignments are options of Matplotlib."""
    whole_width, whole_height = figure.get_size_inches()
    figure.text(left / whole_width, 1 - top / whole_height, text, **{"va": "top", "color": INK} | options)


def fitted(text: str, width: float, size: float = 8) -> str:
    """A text in one line, cut with … where it is wider than `width` inches at `size` points."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if extent(text, size) <= width:
        return text
    while text and extent(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def extent(text: str, size: float = 8) -> float:
    """The width of a text in inches at `size` points."""
    return sum(map(_advance, text)) * size / 72


@functools.cache
def _advance(character: str) -> float:
    """The width of a character as a share of the size of the font."""
    font = font_manager.get_font(font_manager.findfont(FONT))
    if not font.get_char_index(ord(character)):
        return 1.0  # the font lacks it, and has a box for it
    font.set_size(100, 72)
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / 100


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes a picture, whole or not at all, in the format of the suffix: .png, .svg or .pdf.

    Raises:
      UserError: another suffix, or a folder that cannot be written.
    """
    path = check(path)
    date = {} if path.suffix == ".png" else {"CreationDate" if path.suffix == ".pdf" else "Date": None}
    with files.replacing(path) as partial, matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in a script that the font lacks
        figure.savefig(partial, format=path.suffix[1:], metadata=date)


def check(path: str | pathlib.Path) -> pathlib.Path:
    """The path, if `save` knows the format of its suffix and could write there; else raises `UserError`."""
    path = files.expanded(path, "--plot")
    require(path.suffix in SUFFIXES, f"{shown(str(path))} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    return files.check(path)

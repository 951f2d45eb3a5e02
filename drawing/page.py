"""One HTML page that needs nothing else: its pictures are inside, and no script runs. Every text is escaped."""

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import PIL.Image

MOST_SVG = 150_000  # bytes; a larger drawing goes into the page as a PNG

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #222; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --ink: #e6e6e6; --soft: #a2a7ad; --line: #383c42; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.5rem; }
p { color: var(--soft); margin: 0.25rem 0 0.75rem; max-width: 46rem; }
.wide { overflow-x: auto; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 8px;
  width: fit-content; max-width: 100%; }
.card img { display: block; max-width: 100%; height: auto; }
@media (max-width: 600px) { .card img.large { width: 35rem; max-width: none; } } /* text stays readable */
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; padding: 0.2rem 1.2rem 0.2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
"""


def page(title: str, introduction: str, sections: Iterable[tuple[str, str]]) -> str:
    """The page: a title, a paragraph, and sections of a title and HTML that the functions below made."""
    parts = [f"<h2>{html.escape(name)}</h2>\n{body}" for name, body in sections]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',  # without it a browser asks the server for one
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(introduction)}</p>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def picture(name: str, caption: str, folder: pathlib.Path) -> str:
    """The picture that lies in `folder` as NAME.svg and NAME.png, on a light card in both schemes of colours."""
    kind, content = "svg+xml", (folder / f"{name}.svg").read_bytes()
    with PIL.Image.open(folder / f"{name}.png") as png:
        width, height = (round(side / png.info["dpi"][0] * 96) for side in png.size)  # a CSS pixel is 1/96 inch
        if len(content) > MOST_SVG:
            # 256 colours need a third of the bytes.
            png.convert("RGB").quantize(256).save(buffer := io.BytesIO(), "PNG", optimize=True)
            kind, content = "png", buffer.getvalue()
    large = ' class="large"' if width > 560 else ""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    image = f'<img{large} src="{source}" width="{width}" height="{height}" alt="{html.escape(caption)}">'
    return f'<p>{html.escape(caption)}</p>\n<div class="card wide">{image}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), long: int = -1) -> str:
    """A table that scrolls in a box of its own.

    Args:
      header, rows: of cells.
      numbers: the columns that stand to the right.
      long: a column whose cells may take several lines.
    """

    def line(cells, tag):
        kinds = dict.fromkeys(numbers, ' class="number"') | {long: ' class="long"'}
        return "".join(f"<{tag}{kinds.get(n, '')}>{html.escape(cell)}</{tag}>" for n, cell in enumerate(cells))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{line(header, "th")}</tr>\n{body}\n</table></div>'


LAYERS = ("layer", "output", "kernel", "parameters", "multiply-adds", "maps by tower", "exchange")


def layers(rows: Sequence[Any], towers: int) -> list[tuple[str, ...]]:
    """The rows of `models.layer_table` as cells below LAYERS, and at the end their totals."""
    cells = []
    for row in rows:
        maps = row.output[-1]
        # A number of classes that does not divide gives the first tower one more.
        by_tower = " | ".join(str((maps + towers - 1 - tower) // towers) for tower in range(towers))
        output, kernel = ("×".join(map(str, shape)) for shape in (row.output, row.kernel))
        exchange = f"{row.exchange:,}" if row.exchange else ""
        cells.append((row.name, output, kernel, f"{row.parameters:,}", f"{row.multiply_adds:,}", by_tower, exchange))
    totals = (f"{sum(getattr(row, name) for row in rows):,}" for name in ("parameters", "multiply_adds", "exchange"))
    parameters, multiply_adds, exchange = totals
    return [*cells, ("total", "", "", parameters, multiply_adds, "", exchange)]

"""Pieces of a page that needs nothing else: no script, no other file, no network.

Functions take plain texts, which they escape, and `content`, which is markup that others of them gave.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

UNKNOWN = "–"
"""What stands in a table where a value isn't known."""

STYLE = """
:root { --ink: #1c2733; --soft: #5d6b7a; --line: #dde3ea; --paper: #fff; --wash: #f4f6f9; --accent: #14607a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { margin: 0; font-size: 27px; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 19px; }
h3 { margin: 24px 0 8px; font-size: 16px; overflow-wrap: anywhere; }
p, li { margin: 0 0 12px; color: var(--soft); max-width: 80ch; }
section { margin: 20px 0; padding: 20px 24px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 10px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 8px 32px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
dl.cards { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 12px 0; }
.cards div { padding: 10px 14px; background: var(--wash); border-radius: 8px; }
.cards dd { font-size: 23px; font-variant-numeric: tabular-nums; color: var(--accent); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
tbody tr:hover { background: var(--wash); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 8px; border: 1px solid #0003;
  border-radius: 3px; }
figure { margin: 0; }
figcaption { font-size: 14px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10px; fill: var(--soft); }
img { display: block; width: 100%; border-radius: 8px; }
details { margin: 10px 0 0; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { background: none; } section { border: none; padding: 0; } }
"""


def number(value: float | None) -> str:
    """A number in four digits, a whole one in full, None as `UNKNOWN`."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def page(title: str, subtitle: str, *content: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        # A browser fetches nothing and runs nothing, whatever the texts say.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        f"<main>\n{''.join(content)}</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, *content: str) -> str:
    """A part of the page under a heading, with a paragraph that explains it, unless that is empty."""
    paragraph = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{paragraph}{''.join(content)}</section>\n"


def columns(*content: str) -> str:
    """Pieces side by side, as many as fit."""
    return f'<div class="columns">\n{"".join(content)}</div>\n'


def definitions(title: str, facts: Mapping[str, str]) -> str:
    """A list of names and values under a smaller heading."""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<div><h3>{escape(title)}</h3><dl>{terms}</dl></div>\n"


def bullets(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>\n" + "".join(f"<li>{escape(text)}</li>\n" for text in texts) + "</ul>\n"


def cards(values: Mapping[str, str]) -> str:
    """Names and values, large."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="cards">{boxes}</dl>\n'


def table(rows: Sequence[Mapping[str, str]], colors: Mapping[str, str] | None = None) -> str:
    """Rows of texts by column, the first column a heading; columns that are `UNKNOWN` throughout are left out.

    Args:
        rows: all with the same columns.
        colors: CSS colours, of squares before the headings that have one.
    """
    names = [name for name in (rows[0] if rows else ()) if any(row[name] != UNKNOWN for row in rows)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for row in rows:
        first, *others = (row[name] for name in names)
        square = swatch(colors[first]) if colors and first in colors else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in others)
        body += f'<tr><th scope="row">{square}{escape(first)}</th>{cells}</tr>\n'
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def swatch(color: str) -> str:
    """A small square of a CSS colour."""
    return f'<span class="swatch" style="background: {escape(color)}"></span>'


def folded(summary: str, *content: str) -> str:
    """What shows when the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{''.join(content)}</details>\n"


def picture(path: str | os.PathLike, description: str) -> str:
    """A PNG file, embedded."""
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">\n'


def histogram(
    name: str,
    color: str,
    edges: Sequence[float],
    filled: Sequence[float],
    line: Sequence[float] | None = None,
    band: tuple[float, float] | None = None,
) -> str:
    """A drawing of a histogram, and over it another one as a line; the highest bin of both reaches the top.

    Args:
        name: caption.
        color: CSS colour of the filled one.
        edges: of the bins, one more than values.
        filled, line: a value a bin.
        band: a range on the axis to be shaded.
    """
    left, right, top, base = 14, 226, 6, 92  # of 240 x 110
    highest = max(*filled, *(line or ())) or 1

    def x(edge: float) -> float:
        return left + (right - left) * (edge - edges[0]) / (edges[-1] - edges[0])

    def steps(values: Sequence[float]) -> str:
        corners = [(edges[0], 0.0)]
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
            corners += [(low, value), (high, value)]
        corners.append((edges[-1], 0.0))
        return " ".join(f"{x(edge):.2f},{base - (base - top) * value / highest:.2f}" for edge, value in corners)

    drawn = ""
    if band is not None:
        low, high = (x(min(max(edge, edges[0]), edges[-1])) for edge in band)
        drawn += f'<rect x="{low:.2f}" y="{top}" width="{high - low:.2f}" height="{base - top}" fill="#e9edf2"/>'
    drawn += f'<polygon points="{steps(filled)}" fill="{escape(color)}" stroke="#0004"/>'
    if line is not None:
        drawn += f'<polyline points="{steps(line)}" fill="none" stroke="#1c2733" stroke-width="1.5"/>'
    drawn += f'<line x1="{left}" y1="{base}" x2="{right}" y2="{base}" stroke="#8b98a6"/>'
    for edge in edges[:: max(1, (len(edges) - 1) // 4)]:
        drawn += f'<text x="{x(edge):.2f}" y="{base + 13}" text-anchor="middle">{edge:g}</text>'
    drawing = f'<svg viewBox="0 0 240 110" role="img"><title>{escape(name)}</title>{drawn}</svg>'
    return f"<figure><figcaption>{swatch(color)}{escape(name)}</figcaption>{drawing}</figure>\n"

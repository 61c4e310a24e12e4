"""Pieces of a page, read back by a parser."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from common.markup import UNKNOWN, cards, columns, definitions, folded, histogram, page, picture, section, table

VOID = {"meta", "img"}
EVIL = """<script src="//x">&amp;</td>'" onload="1"""


class Element:
    """One element of a page."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def __iter__(self) -> Iterator[Element]:
        """All elements within, in the order of the text."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def all(self, tag: str) -> list[Element]:
        return [element for element in self if element.tag == tag]

    def one(self, tag: str) -> Element:
        (found,) = self.all(tag)
        return found

    @property
    def text(self) -> str:
        return "".join(child.text if isinstance(child, Element) else child for child in self.children)


class Reader(HTMLParser):
    """Makes elements, and sees that each one is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(markup: str) -> Element:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    (document,) = reader.open
    return document


def read_table(element: Element) -> list[dict[str, str]]:
    head, body = element.one("thead"), element.one("tbody")
    names = [cell.text for cell in head.all("th")]
    rows = [[cell.text for cell in row if cell.tag in ("th", "td")] for row in body.all("tr")]
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_definitions(element: Element) -> dict[str, str]:
    names, values = ([e.text for e in element.all(tag)] for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def points(element: Element) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in element.attributes["points"].split()]


def test_every_text_is_shown_as_it_is_and_does_nothing(tmp_path):
    (tmp_path / "p.png").write_bytes(b"png")
    pieces = [
        definitions(EVIL, {EVIL: EVIL}),
        cards({EVIL: EVIL}),
        table([{EVIL: EVIL, "b": EVIL}], {EVIL: EVIL}),
        picture(tmp_path / "p.png", EVIL),
        histogram(EVIL, EVIL, (0, 1, 2), (1, 2)),
        folded(EVIL, columns()),
    ]
    document = read(page(EVIL, EVIL, section(EVIL, EVIL, *pieces)))
    assert {e.tag for e in document}.isdisjoint({"script", "b"})
    assert not any(name.startswith("on") for e in document for name in e.attributes)
    shown = [e.text for e in document if e.tag in ("title", "h1", "h2", "p", "h3", "dt", "dd", "td", "summary")]
    assert shown == [EVIL] * 13  # title, two of the header, two of the section, 3 + 2 + 1 + 1 of the pieces, 1 drawing
    assert read_table(document) == [{EVIL: EVIL, "b": EVIL}]
    assert document.one("img").attributes["alt"] == EVIL
    assert document.one("polygon").attributes["fill"] == EVIL
    assert document.one("figcaption").text == EVIL


def test_a_page_fetches_nothing():
    document = read(page("title", "subtitle", section("a", "")))
    policy = next(e.attributes for e in document.all("meta") if "http-equiv" in e.attributes)
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].split("; ") == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    style = document.one("style").text
    assert "url(" not in style and "@import" not in style
    assert document.one("section").all("p") == []  # no explanation, no paragraph


def test_a_table_has_its_cells_and_leaves_out_what_nobody_knows():
    rows = [
        {"name": "a", "x": "1", "nobody": UNKNOWN, "some": UNKNOWN},
        {"name": "b", "x": "2", "nobody": UNKNOWN, "some": "3"},
    ]
    document = read(table(rows, {"b": "rgb(1, 2, 3)"}))
    assert read_table(document) == [{"name": "a", "x": "1", "some": UNKNOWN}, {"name": "b", "x": "2", "some": "3"}]
    first, second = document.one("tbody").all("tr")
    assert first.all("span") == []
    assert second.one("span").attributes["style"] == "background: rgb(1, 2, 3)"
    assert read_table(read(table([]))) == []


def test_names_and_values():
    assert read_definitions(read(definitions("title", {"a": "1", "b": "2"}))) == {"a": "1", "b": "2"}
    assert read_definitions(read(cards({"SSIM": "0.8"}))) == {"SSIM": "0.8"}


def test_a_picture_is_embedded(tmp_path):
    data = bytes(range(256))
    (tmp_path / "p.png").write_bytes(data)
    image = read(picture(tmp_path / "p.png", "planes")).one("img")
    kind, content = image.attributes["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content, validate=True) == data


def test_a_histogram_is_drawn_to_scale():
    """Edges -160, 40, 240 lie at 14, 120, 226 of 240; heights count from 92 upwards, the highest of both to 6."""
    drawing = read(histogram("liver", "red", (-160, 40, 240), (0.25, 0.5), line=(1.0, 0.0), band=(90, 300)))
    assert points(drawing.one("polygon")) == [(14, 92), (14, 70.5), (120, 70.5), (120, 49), (226, 49), (226, 92)]
    assert points(drawing.one("polyline")) == [(14, 92), (14, 6), (120, 6), (120, 92), (226, 92), (226, 92)]
    band = drawing.one("rect").attributes
    assert [float(band[name]) for name in ("x", "width", "y", "height")] == [146.5, 79.5, 6, 86]  # to the axis's end
    assert [(e.text, float(e.attributes["x"])) for e in drawing.all("text")] == [
        ("-160", 14),
        ("40", 120),
        ("240", 226),
    ]


def test_a_histogram_without_line_band_or_values():
    drawing = read(histogram("liver", "red", range(-160, 241, 20), [0] * 20))
    assert drawing.all("polyline") == drawing.all("rect") == []
    assert {y for _, y in points(drawing.one("polygon"))} == {92}
    assert [e.text for e in drawing.all("text")] == ["-160", "-60", "40", "140", "240"]


def test_a_histogram_needs_a_value_a_bin():
    with pytest.raises(ValueError):
        histogram("liver", "red", (0, 1, 2), (1, 2, 3))

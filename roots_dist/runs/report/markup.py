"""HTML and SVG as a tree, so that nothing of a run can become markup: text is always escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

Inside = str | Element | None
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that a page must not hold: control characters and halves of surrogate pairs."""


def tag(name: str, /, *inside: Inside | Iterable[Inside], **attributes: object) -> Element:
    """`tag("text", "loss", x=3, font_size=12, class_="dim")`; attributes and children that are None are dropped."""
    named = {key.rstrip("_").replace("_", "-"): _text(value) for key, value in attributes.items() if value is not None}
    element = Element(name, named)
    for part in inside:
        for child in (part,) if part is None or isinstance(part, (str, Element)) else part:
            _put(element, child)
    return element


def _put(parent: Element, child: Inside) -> None:
    if isinstance(child, Element):
        parent.append(child)
    elif child is not None and len(parent):
        parent[-1].tail = (parent[-1].tail or "") + _text(child)
    elif child is not None:
        parent.text = (parent.text or "") + _text(child)


def _text(value: object) -> str:
    """Text of an attribute or child. Floats are rounded to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else NOT_TEXT.sub("\ufffd", str(value))


def document(page: Element) -> str:
    return f"<!DOCTYPE html>\n{tostring(page, encoding='unicode', method='html')}\n"


def table(head: Iterable[Inside], rows: Iterable[Iterable[Inside]], class_: str | None = None) -> Element:
    """An HTML table whose first column is a header. A wide table scrolls by itself."""
    body = [tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest]) for first, *rest in rows]
    top = tag("tr", [tag("th", cell, scope="col") for cell in head])
    return tag("div", tag("table", tag("thead", top), tag("tbody", body), class_=class_), class_="wide")


def section(title: str, *inside: Inside | Sequence[Inside]) -> Element:
    """Give a part of the page its heading."""
    return tag("section", tag("h2", title), *inside)

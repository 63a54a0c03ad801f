"""Pages that need nothing but themselves: sections of text, tables and pictures in one HTML file."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from flowgen.utils.errors import UserError


class Picture(NamedTuple):
    """A picture under a caption; a number, where there is one, stands before it and is the picture's anchor."""

    caption: str
    source: str  # a data URL
    number: str = ""


class Section(NamedTuple):
    """Part of a page; what is empty is left out. Text is escaped, but for what is `markupsafe.Markup`."""

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()  # the first row is its head
    pictures: Sequence[Picture] = ()
    details: tuple[str, str] | None = None  # a heading, and what it folds away


def write_html(
    path: Path, title: str, lead: Sequence[str], sections: Sequence[Section], contents: bool = False
) -> None:
    """Write the page, aside and renamed; `contents` lists its sections after the lead."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("document.html").render(
        title=title, lead=lead, sections=sections, contents=contents
    )
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(page)
    aside.replace(path)


def data_url(path: Path) -> str:
    """The file inside its own address. Raises FlowgenError where it cannot be read."""
    try:
        return encoded(path.read_bytes(), path.suffix[1:])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it again") from error


def encoded(data: bytes, kind: str) -> str:
    """The data of an image of this kind, as png, inside its own address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

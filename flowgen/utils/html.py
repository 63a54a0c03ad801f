"""Reports in one HTML file: sections of text, tables and pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from flowgen.utils.errors import user_error
from flowgen.utils.files import atomic_write

STYLESHEET = Path(__file__).with_name("page.css")  # of all pages


class Picture(NamedTuple):
    """A picture with a caption.

    Attributes:
        caption: Text below the picture.
        source: The picture as a data URL.
        number: Number of the figure, if it has one; also its anchor.
    """

    caption: str
    source: str
    number: str = ""


class Section(NamedTuple):
    """A section of a page. Text is escaped, except `markupsafe.Markup`. Empty parts are omitted.

    Attributes:
        anchor: Target of links to the section.
        title: Heading.
        paragraphs: Text.
        table: Rows of cells. The first row is the header.
        pictures: Pictures below the table.
        details: A summary, and text that unfolds when it is clicked.
    """

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()
    details: tuple[str, str] | None = None


def write_html(
    path: Path, title: str, lead: Sequence[str], sections: Sequence[Section], contents: bool = False
) -> None:
    """Write a page.

    Args:
        path: The HTML file.
        title: Title of the page.
        lead: Paragraphs before the first section.
        sections: Sections of the page.
        contents: Add a table of contents after the lead.
    """
    template = Environment(
        loader=FileSystemLoader(STYLESHEET.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    with atomic_write(path) as temporary:
        temporary.write_text(
            template.render(title=title, lead=lead, sections=sections, contents=contents),
            encoding="utf-8",
        )


def data_url(path: Path) -> str:
    """Return an image file as a data URL."""
    with user_error(f"{path} cannot be read: create it again"):
        return image_data_url(path.read_bytes(), path.suffix[1:])


def image_data_url(data: bytes, kind: str) -> str:
    """Return the content of an image file of a kind such as "png" as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

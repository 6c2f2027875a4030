"""A web page of pictures and their numbers, in one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from awp_optim._utils.io import write_text
from awp_optim.lab.reports.summary import Cells

__all__ = ["Picture", "write_gallery"]

TEMPLATES = Environment(
    loader=PackageLoader("awp_optim.lab.reports", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        title, caption: above and below it.
        file: a PNG, whose content goes into the page.
        tables: its numbers: titles and cells.
    """

    title: str
    caption: str
    file: Path
    tables: Sequence[tuple[str, Cells]] = ()

    def source(self) -> str:
        """The PNG as a URL."""
        return "data:image/png;base64," + base64.b64encode(self.file.read_bytes()).decode()


def write_gallery(
    path: Path,
    title: str,
    about: str,
    command: str,
    pictures: Sequence[Picture],
    left_out: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page, which fits a phone and follows the reader's dark mode.

    Args:
        path: the page; one that exists is replaced in one piece.
        title: its heading.
        about: what all pictures are about.
        command: what makes them.
        pictures: in order.
        left_out: names of what could not be drawn, and why.

    Raises:
        OSError: a picture cannot be read, or the page not be written.
    """
    page = TEMPLATES.get_template("gallery.html").render(
        title=title, about=about, command=command, pictures=pictures, left_out=left_out
    )
    write_text(path, page)

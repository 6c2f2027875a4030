"""A web page of pictures and their numbers, in a single HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from awp_optim._utils.io import write_text
from awp_optim.lab.reports.figures import Drawing

__all__ = ["write_gallery"]

TEMPLATES = Environment(
    loader=PackageLoader("awp_optim.lab.reports", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
)


def write_gallery(
    path: Path,
    title: str,
    about: str,
    command: str,
    pictures: Sequence[tuple[Drawing, Path]],
    left_out: Mapping[str, str],
) -> None:
    """Write the page, which fits a phone and follows the reader's dark mode.

    Args:
        path: the page; one that exists is replaced in one piece.
        title: its heading.
        about: the runs that the pictures show.
        command: what makes them.
        pictures: what was drawn, and the PNG of each, whose content goes into the page.
        left_out: by name, why a figure could not be drawn.

    Raises:
        OSError: a picture cannot be read, or the page cannot be written.
    """
    url = "data:image/png;base64,{}".format
    page = TEMPLATES.get_template("gallery.html").render(
        title=title,
        about=about,
        command=command,
        pictures=[(d, url(base64.b64encode(f.read_bytes()).decode())) for d, f in pictures],
        left_out=left_out,
    )
    write_text(path, page)

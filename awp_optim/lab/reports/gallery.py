"""An index page of pictures and their numbers: one HTML file that needs no other."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from awp_optim._utils.io import atomic_write
from awp_optim.lab.reports.summary import Cells

__all__ = ["Picture", "write_gallery"]


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        title, caption: above and below it.
        file: a PNG, whose content goes into the page.
        tables: its numbers: titles and cells, the first row being the head.
    """

    title: str
    caption: str
    file: Path
    tables: Sequence[tuple[str, Cells]] = ()


def write_gallery(
    path: Path,
    title: str,
    about: str,
    command: str,
    pictures: Sequence[Picture],
    left_out: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page, whole or not at all. It fits a phone and follows the reader's dark mode.

    Args:
        path: the page.
        title: its heading.
        about: what all pictures are of.
        command: what makes them.
        pictures: in order.
        left_out: what could not be drawn, and why.

    Raises:
        OSError: a picture cannot be read, or the page not be written.
    """
    sections = [_section(f"picture-{i}", picture) for i, picture in enumerate(pictures)]
    links = [
        f'<li><a href="#picture-{i}">{escape(picture.title)}</a></li>'
        for i, picture in enumerate(pictures)
    ]
    missing = ""
    if left_out:
        items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in left_out)
        missing = f"<section><h2>Left out</h2><ul>{items}</ul></section>"
    page = _PAGE.substitute(
        title=escape(title),
        about=escape(about),
        command=escape(command),
        links="".join(links),
        sections="\n".join(sections),
        missing=missing,
    )
    with atomic_write(path) as file:
        file.write(page.encode())


def _section(anchor: str, picture: Picture) -> str:
    content = picture.file.read_bytes()
    data = base64.b64encode(content).decode()
    width, height = struct.unpack(">II", content[16:24])  # where every PNG has them
    kind = "wide panels" if width > 2 * height else "wide"
    tables = "".join(_table(title, cells) for title, cells in picture.tables)
    return (
        f'<section id="{anchor}"><h2>{escape(picture.title)}</h2><figure>'
        f'<div class="{kind}"><img src="data:image/png;base64,{data}"'
        f' alt="{escape(picture.title)}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>{tables}</section>"
    )


def _table(title: str, cells: Cells) -> str:
    head, *rows = cells
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<p class="small">{escape(title)}</p><div class="wide"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
section { border-top: 1px solid var(--line); padding: 1.25rem 0; }
figure { margin: 0 0 1rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .small { font-size: .875rem; margin: .75rem 0 .25rem; opacity: .85; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; }
@media (max-width: 40rem) { img { width: 32rem; } .panels img { width: 52rem; } }
</style>
</head>
<body>
<h1>$title</h1>
<p>$about</p>
<p class="small"><code>$command</code></p>
<nav><ul>$links</ul></nav>
$sections
$missing
</body>
</html>
""")

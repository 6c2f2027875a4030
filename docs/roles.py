"""A Griffe extension: what docstrings borrow from reStructuredText, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(\w+):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Turn roles into code, linked if they give a public path, and ``::`` into a colon.

    ``Example:`` becomes ``Examples:``, the name under which Griffe knows the section.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.M)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
            obj.docstring.value = ROLE.sub(_as_markdown, text)


def _as_markdown(match: re.Match[str]) -> str:
    role, is_short, path = match.groups()
    name = path.rsplit(".", 1)[-1] if is_short else path
    is_private = "._" in path or ".lab." in path
    is_linked = path.startswith("awp_optim.") and role != "mod" and not is_private
    return f"[`{name}`][{path}]" if is_linked else f"`{name}`"

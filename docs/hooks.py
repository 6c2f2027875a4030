"""MkDocs hooks: formulas without JavaScript, and links that lead out of ``docs/``.

Pages link to files as they lie in the repository, so that the links also work where the repository
is browsed. In the site, linked files outside ``docs/`` are served under ``repository/``, Python
files as pages.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_THE_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render blocks marked ``math`` as MathML."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie in the root, and every file that a page links to."""
    for uri, name in FROM_THE_ROOT.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = [file for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for target in _targets(page.src_uri, page.content_string):
            uri = _uri(target)
            if target.is_file() and uri.startswith("repository/") and not files.src_uris.get(uri):
                files.append(file := _outside(config, uri, target))
                if file.is_documentation_page():
                    pages.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at where the site has the files; give tables of the paper's values room."""
    if page.file.src_uri.startswith("paper/"):  # short pages with wide tables
        page.meta["hide"] = ["toc"]
    folder = _source(page.file.src_uri).parent
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        return match[1] + posixpath.relpath(_uri(target), here) + match[3]

    blocks = FENCE.findall(markdown)
    texts = [LINK.sub(moved, text) for text in FENCE.split(markdown)]
    return "".join(text + block for text, block in zip(texts, [*blocks, ""], strict=True))


def _source(uri: str) -> Path:
    """The file of the repository that a page of the site shows."""
    if uri in FROM_THE_ROOT:
        return ROOT / FROM_THE_ROOT[uri]
    if uri.startswith("repository/"):
        return ROOT / uri.removeprefix("repository/")
    return ROOT / "docs" / uri


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    for uri, source in FROM_THE_ROOT.items():
        if name == source:
            return uri
    if name.startswith("docs/") and path.suffix != ".py":
        return name.removeprefix("docs/")
    return f"repository/{name}.md" if path.suffix == ".py" else f"repository/{name}"


def _targets(uri: str, markdown: str) -> set[Path]:
    folder = _source(uri).parent
    links = LINK.findall(FENCE.sub("", markdown))
    return {Path(os.path.normpath(folder / target)) for _, target, _ in links}


def _outside(config: MkDocsConfig, uri: str, path: Path) -> File:
    if path.suffix not in (".py", ".md"):
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = f"# {path.relative_to(ROOT).as_posix()}\n\n```python\n{text}```\n"
    head = "---\nsearch:\n  exclude: true\n---\n\n"
    return File.generated(config, uri, content=head + text)


def _formula(source: str, *_: Any, **__: Any) -> str:
    """A formula in TeX as MathML, which browsers render by themselves."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'

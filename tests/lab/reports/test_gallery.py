"""The gallery's page: what it holds, and how a browser shows it on a phone and on a desktop."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from awp_optim.lab.reports.figures import Drawing
from awp_optim.lab.reports.gallery import write_gallery
from awp_optim.lab.reports.plots import accuracy_by_radius

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
TABLE = [
    ["", *(f"column {i}" for i in range(12))],
    ["AT <&> 1", *(f"{i}.000 ± 0.001" for i in range(12))],
]


def drawing(title, caption, tables):
    return Drawing("a", title, caption, lambda file, title: None, tables)


@pytest.fixture
def page(tmp_path) -> Path:
    accuracy_by_radius({"PGD-20": {0.0: 0.9, 0.1: 0.5, 0.2: 0.0}}, tmp_path / "a.png")
    pictures = [
        (drawing(f"Title {i} <b>&", "a caption", [("its numbers", TABLE)]), tmp_path / "a.png")
        for i in range(2)
    ]
    path, left_out = tmp_path / "index.html", {"gamma": "three <gammas>"}
    write_gallery(path, "Landscapes", "of 2 runs", "python x.py --all", pictures, left_out)
    return path


def test_the_page_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert [s for s in sources if not s.startswith(("data:", "#"))] == []
    embedded = [s for s in sources if s.startswith("data:image/png;base64,")]
    assert len(embedded) == 2
    picture = (page.parent / "a.png").read_bytes()
    assert base64.b64decode(embedded[0].partition(",")[2]) == picture
    for part in ("Title 1 <b>&", "AT <&> 1", "three <gammas>", "a caption", "python x.py --all"):
        assert html.escape(part) in text
    assert "<b>" not in text


def test_a_missing_picture_leaves_the_previous_page(page, tmp_path):
    before = page.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_gallery(page, "t", "a", "c", [(drawing("t", "c", []), tmp_path / "none.png")], {})
    assert page.read_bytes() == before


# A window cannot be as narrow as a phone; a frame can. Its load event comes after its images and
# before the window's, after which the browser prints the document.
FRAME = """<!doctype html><style>body { margin: 0 } iframe { border: 0 }</style>
<script>
function report(frame) {
  const inside = frame.contentDocument;
  const images = [...inside.images];
  const found = {
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    images: images.map(image => image.getBoundingClientRect().width),
    page: inside.scrollingElement.scrollWidth,
    smallest: Math.min(...[...inside.querySelectorAll("p, td, th, figcaption")]
      .map(e => parseFloat(inside.defaultView.getComputedStyle(e).fontSize))),
  };
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}
</script>
<iframe onload="report(this)" style="width: WIDTHpx; height: 900px" srcdoc="PAGE"></iframe>"""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, width, tmp_path):
    frame = tmp_path / "frame.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", text), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert found["broken"] == 0
    assert len(found["images"]) == 2
    assert found["page"] <= width  # wide tables and pictures scroll in their own boxes
    assert min(found["images"]) >= min(width, 450)  # lines and labels stay legible
    assert found["smallest"] >= 13

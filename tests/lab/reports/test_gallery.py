"""The gallery's page: what is in it, and how a browser shows it on a phone and on a desk."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from awp_optim.lab.reports.gallery import Picture, write_gallery
from awp_optim.lab.reports.plots import accuracy_by_radius

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
TABLE = [
    ["", *(f"column {i}" for i in range(12))],
    ["AT <&> 1", *(f"{i}.000 ± 0.001" for i in range(12))],
]


@pytest.fixture
def page(tmp_path) -> Path:
    accuracy_by_radius({"PGD-20": {0.0: 0.9, 0.1: 0.5, 0.2: 0.0}}, tmp_path / "a.png")
    pictures = [
        Picture(f"Title {i} <b>&", "a caption", tmp_path / "a.png", [("its numbers", TABLE)])
        for i in range(2)
    ]
    write_gallery(
        tmp_path / "index.html",
        "Landscapes",
        "of 2 runs",
        "python x.py --all",
        pictures,
        [("gamma", "three <gammas>")],
    )
    return tmp_path / "index.html"


def test_the_page_holds_everything_itself(page):
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert {s for s in sources if not s.startswith("data:")} == {"#picture-0", "#picture-1"}
    embedded = [s for s in sources if s.startswith("data:image/png;base64,")]
    assert len(embedded) == 2
    picture = (page.parent / "a.png").read_bytes()
    assert base64.b64decode(embedded[0].partition(",")[2]) == picture
    for part in (
        "Title 1 &lt;b&gt;&amp;",
        "AT &lt;&amp;&gt; 1",
        "three &lt;gammas&gt;",
        "a caption",
    ):
        assert part in text
    assert "<b>" not in text


def test_a_picture_that_is_missing_leaves_the_page_before(page, tmp_path):
    before = page.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_gallery(page, "t", "a", "c", [Picture("t", "c", tmp_path / "none.png")])
    assert page.read_bytes() == before


# Whatever is asked is asked in the frame's load event, for which its images and, in its turn, the
# window's own load event wait: the browser prints what is there after that.
LOOK = """<!doctype html><style>body { margin: 0 } iframe { border: 0 }</style>
<script>
function look(frame) {
  const inside = frame.contentDocument;
  const images = [...inside.images];
  const found = {
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    images: images.length,
    drawn: images.map(image => image.getBoundingClientRect().width),
    scrolls: inside.scrollingElement.scrollWidth,
    shown: images.map(image => image.parentElement.getBoundingClientRect().right),
    headings: [...inside.querySelectorAll("h1, h2")].map(h => h.textContent),
    smallest: Math.min(...[...inside.querySelectorAll("p, td, th, figcaption")]
      .map(e => parseFloat(inside.defaultView.getComputedStyle(e).fontSize))),
  };
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
}
</script>
<iframe onload="look(this)" style="width: WIDTHpx; height: 900px" srcdoc="PAGE"></iframe>"""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


def look_at(page: Path, width: int, *flags: str) -> str:
    """What a browser prints of the page in a frame as wide as a phone, or as a window."""
    # A window cannot be as narrow as a phone, a frame can.
    frame = page.parent / f"frame-{width}.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    frame.write_text(LOOK.replace("WIDTH", str(width)).replace("PAGE", text), encoding="utf-8")
    profile = page.parent / "profile"
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={max(width, 500)},900",
    ]
    done = subprocess.run(
        [*command, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, width):
    dom = look_at(page, width, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert found["images"] == 2
    assert found["broken"] == 0
    assert found["headings"] == ["Landscapes", "Title 0 <b>&", "Title 1 <b>&", "Left out"]
    assert found["scrolls"] <= width  # wide tables scroll in their own boxes
    assert max(found["shown"]) <= width
    assert min(found["drawn"]) >= min(width, 500)  # lines and labels stay legible
    assert found["smallest"] >= 13


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_screenshot_shows_it(page, tmp_path):
    shot = tmp_path / "shot.png"
    look_at(page, 390, f"--screenshot={shot}")
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (900, 500)
    blue = np.abs(pixels[:, :390] - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.1
    assert blue.sum() > 100  # the first curve's colour

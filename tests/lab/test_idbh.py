"""IDBH-weak on a batch against the published definition, an image at a time by Pillow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from awp_optim.lab import idbh
from awp_optim.lab.augment import erase
from awp_optim.lab.idbh import KINDS, crop_shift, idbh_weak, recolor, warp

stats = pytest.importorskip("scipy.stats")
transforms = pytest.importorskip("torchvision.transforms")
F = transforms.functional
NEAREST = transforms.InterpolationMode.NEAREST


def published_color(image, name, strength):
    """The color changes of ColorShape on a Pillow image."""
    adjust = {
        "saturation": F.adjust_saturation,
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "sharpness": F.adjust_sharpness,
    }
    if name in adjust:
        return adjust[name](image, strength)
    return F.autocontrast(image) if name == "autocontrast" else F.equalize(image)


def published_warp(image, name, strength, vertical):
    """Shear, by radians along an axis, and rotation, by degrees."""
    if name == "rotate":
        return F.rotate(image, angle=strength, interpolation=NEAREST, fill=0)
    degrees = math.degrees(strength)
    shear = [0.0, degrees] if vertical else [degrees, 0.0]
    return F.affine(image, 0.0, [0, 0], 1.0, shear, interpolation=NEAREST, fill=0)


def published_crop_shift(image, rng):
    """Crop what CropShift keeps, pad it by what it removed, and crop the size of before."""
    width, height = image.size
    both = rng.integers(0, 11)
    across = rng.integers(0, both + 1)
    down = both - across
    left, top = rng.integers(0, across + 1), rng.integers(0, down + 1)
    image = F.crop(image, top, left, height - down, width - across)
    image = F.pad(image, [int(across), int(down)], fill=0)
    left, top = rng.integers(0, across + 1), rng.integers(0, down + 1)
    return F.crop(image, top, left, height, width)


def published(image, rng):
    """All of IDBH-weak, from and to a uint8 tensor."""
    image = F.to_pil_image(image)
    if rng.random() < 0.5:
        image = F.hflip(image)
    image = published_crop_shift(image, rng)
    name = KINDS[rng.integers(8)]
    sign, vertical = (-1) ** rng.integers(2), bool(rng.integers(2))
    if name == "rotate":
        image = published_warp(image, name, float(sign * rng.integers(1, 11)), vertical)
    elif name == "shear":
        image = published_warp(image, name, sign * rng.uniform(0.05, 0.15), vertical)
    else:
        low = 0.5 if name in ("brightness", "contrast") else 0.1
        image = published_color(image, name, rng.uniform(low, 1.9))
    image = transforms.RandomErasing(p=0.5)(F.to_tensor(image))
    return (255 * image).round().byte()


def images(n, c=3, side=32):
    """Noise, faint noise, a single value, two values, and a channel without contrast."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, generator=generator)
    x[n // 2 :] = x[n // 2 :] // 4 + 60
    x[0], x[1, 0] = 7, 9
    x[2] = torch.where(x[2] > 128, 255, 0)
    x[3] = x[3] // 255
    return x


def as_tensors(pictures):
    return torch.stack([F.pil_to_tensor(picture) for picture in pictures])


# ------------------------------------------------------------------ given random numbers: equal


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", KINDS[:6])
def test_colors_are_pillows_to_the_last_bit(name, channels):
    x = images(60, channels)
    factor = 0.1 + 1.8 * torch.rand(60, generator=torch.Generator().manual_seed(1))
    factor[:4] = torch.tensor([1.0, 0.0, 1.9, 0.1])
    pictures = [F.to_pil_image(image) for image in x]
    expected = as_tensors(
        [published_color(p, name, f) for p, f in zip(pictures, factor.tolist(), strict=True)]
    )
    out = recolor(x, torch.full((60,), KINDS.index(name)), factor)
    assert torch.equal(out, expected)
    assert torch.equal(out, x) == (name == "saturation" and channels == 1)


def test_each_image_gets_its_own_change():
    x, kind = images(80), torch.arange(80) % 8
    factor = torch.linspace(0.1, 1.9, 80)
    mixed = recolor(x, kind, factor)
    for k in range(8):
        alone = recolor(x[kind == k], kind[kind == k], factor[kind == k])
        assert torch.equal(mixed[kind == k], alone)
    assert torch.equal(mixed[kind > 5], x[kind > 5])


@pytest.mark.parametrize("name", ["shear", "rotate"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 31)])
def test_warps_are_pillows(name, shape):
    """But for pixels midway between two, which Pillow rounds in fixed point."""
    n, generator = 80, torch.Generator().manual_seed(2)
    x = torch.randint(1, 256, (n, 3, *shape), dtype=torch.uint8, generator=generator)
    u = torch.rand(n, generator=generator)
    negative, vertical = torch.rand(2, n, generator=generator) < 0.5
    kind = torch.full((n,), KINDS.index(name))
    out = warp(x, idbh._draw_matrix(kind, u, negative, vertical))
    expected = []
    for image, v, sign, along in zip(x, u.double(), 1 - 2 * negative.int(), vertical, strict=True):
        strength = (1 + int(10 * v)) if name == "rotate" else (0.05 + 0.1 * float(v))
        picture = F.to_pil_image(image)
        expected.append(published_warp(picture, name, float(sign * strength), bool(along)))
    expected = as_tensors(expected)
    assert (out != expected).double().mean() < 1e-3
    assert (x != expected).double().mean() > 0.1


def test_crop_shift_equals_slices():
    n, generator = 200, torch.Generator().manual_seed(3)
    x = torch.randint(1, 256, (n, 3, 12, 15), dtype=torch.uint8, generator=generator)
    mirror = torch.rand(n, generator=generator) < 0.5
    cut = torch.randint(0, 11, (2, n), generator=generator)
    source, target = (torch.rand(2, 2, n, generator=generator) * (cut + 1)).long()
    out = crop_shift(x, mirror, cut, source, target)
    expected = torch.zeros_like(x)
    for i in range(n):
        image = x[i].flip(-1) if mirror[i] else x[i]
        (top, left), (to_top, to_left) = source[:, i], target[:, i]
        height, width = 12 - cut[0, i], 15 - cut[1, i]
        kept = image[:, top : top + height, left : left + width]
        expected[i, :, to_top : to_top + height, to_left : to_left + width] = kept
    assert torch.equal(out, expected)


def test_erase_equals_a_slice():
    x = torch.full((4, 3, 12, 15), 9, dtype=torch.uint8)
    box = torch.tensor([[0, 0, 0, 0], [2, 3, 5, 4], [11, 14, 1, 1], [0, 0, 12, 15]])
    out = erase(x, *box.T)
    for i, (top, left, height, width) in enumerate(box.tolist()):
        x[i, :, top : top + height, left : left + width] = 0
    assert torch.equal(out, x)


# ------------------------------------------------------------------ drawn: the same distribution


def same_counts(a, b):
    """Whether two samples of integers have one distribution: chi-square, rare values together."""
    values = np.union1d(a, b)
    table = np.array([[np.sum(s == v) for v in values] for s in (a, b)])
    rare = table.sum(0) < 20
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 1
    return stats.chi2_contingency(table).pvalue > 1e-3


def kept(out):
    """Rows and columns removed, the first ones kept and where they went, of coded images."""
    found = []
    for image in out:
        rows, columns = image[0].amax(1), image[1].amax(0)
        first = [int((side > 0).int().argmax()) for side in (rows, columns)]
        sizes = [int((side > 0).sum()) for side in (rows, columns)]
        codes = [int(rows[first[0]]), int(columns[first[1]])]
        found.append([*(32 - size for size in sizes), *codes, *first])
    return np.array(found).T


def test_crop_shift_has_the_published_distribution():
    """Each pixel knows its row and its column."""
    n = 4000
    code = torch.zeros(3, 32, 32, dtype=torch.uint8)
    code[0], code[1] = torch.arange(1, 33)[:, None], torch.arange(1, 33)
    draw = torch.rand(6, n, generator=torch.Generator().manual_seed(0))
    not_mirrored = torch.zeros(n, dtype=torch.bool)
    ours = crop_shift(code.expand(n, -1, -1, -1), not_mirrored, *idbh._draw_cuts(draw))
    rng = np.random.default_rng(0)
    theirs = as_tensors([published_crop_shift(F.to_pil_image(code), rng) for _ in range(n)])
    a, b = kept(ours), kept(theirs)
    for one, other in zip(a, b, strict=True):
        assert same_counts(one, other)
    assert same_counts(11 * a[0] + a[1], 11 * b[0] + b[1])  # jointly
    assert same_counts(11 * a[1] + a[5], 11 * b[1] + b[5])
    assert set(a[0] + a[1]) == set(range(11))


def test_what_is_erased_has_the_distribution_of_torchvision():
    n, shape = 6000, (32, 28)
    x = torch.full((n, 1, *shape), 255, dtype=torch.uint8)
    draw = torch.rand(23, n, generator=torch.Generator().manual_seed(0))
    ours = erase(x, *idbh._draw_rectangle(draw, *shape))
    torch.manual_seed(0)
    erasing = transforms.RandomErasing(p=0.5)
    theirs = torch.stack([erasing(image) for image in x])
    boxes = []
    for out in (ours, theirs):
        black = out[:, 0] == 0
        rows, columns = black.any(2).int(), black.any(1).int()
        assert torch.equal(black.sum((1, 2)), rows.sum(1) * columns.sum(1))  # rectangles
        erased = black.any(2).any(1)
        lines = (rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1))
        boxes.append((erased, *(t[erased] for t in lines)))
    (some, h, w, top, left), (other_some, *others) = boxes
    assert abs(some.float().mean() - 0.5) < 0.02
    assert abs(other_some.float().mean() - 0.5) < 0.02
    for a, b in zip((h, w, top, left), others, strict=True):
        assert same_counts(a.numpy(), b.numpy())
    assert stats.ks_2samp(h * w, others[0] * others[1]).pvalue > 1e-3
    assert stats.ks_2samp(h / w, others[0] / others[1]).pvalue > 1e-3


def test_changes_are_equally_likely_and_strengths_uniform(monkeypatch):
    seen = {}

    def watched(name, function):
        def called(x, *args):
            seen[name] = args
            return function(x, *args)

        return called

    monkeypatch.setattr(idbh, "recolor", watched("color", recolor))
    monkeypatch.setattr(idbh, "warp", watched("warp", warp))
    n = 16_000
    x = torch.zeros(n, 1, 11, 11, dtype=torch.uint8)
    idbh_weak(x, torch.Generator().manual_seed(0))
    (kind, factor), (matrix,) = seen["color"], seen["warp"]
    assert stats.chisquare(torch.bincount(kind, minlength=8).numpy()).pvalue > 1e-3
    for k, low in enumerate((0.1, 0.5, 0.5, 0.1)):
        uniform = stats.uniform(low, 1.9 - low).cdf
        assert stats.kstest(factor[kind == k].numpy(), uniform).pvalue > 1e-3
    (a, b), (c, d) = matrix
    changed = (a != 1) | (b != 0) | (c != 0) | (d != 1)
    assert torch.equal(changed, kind > 5)
    shear = torch.stack([b, c])[:, kind == KINDS.index("shear")]
    assert ((shear == 0).sum(0) == 1).all()
    counts = [
        (shear > 0)[0].sum(),
        (shear > 0)[1].sum(),
        (shear < 0)[0].sum(),
        (shear < 0)[1].sum(),
    ]
    assert stats.chisquare(counts).pvalue > 1e-3
    uniform = stats.uniform(0.05, 0.1).cdf
    assert stats.kstest(shear.sum(0).abs().atan().numpy(), uniform).pvalue > 1e-3
    turned = kind == KINDS.index("rotate")
    degrees = torch.atan2(c[turned], a[turned]).rad2deg().round().int()
    assert set(degrees.tolist()) == {*range(-10, 0), *range(1, 11)}
    assert stats.chisquare(np.unique(degrees, return_counts=True)[1]).pvalue > 1e-3


def test_the_whole_has_the_published_distribution():
    """Figures of an image that has an up, a right and colors."""
    n = 1500
    ramp = torch.linspace(40, 250, 32)
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.expand(32, 32).T])
    image[:, 5:12, 18:25] = torch.tensor([250.0, 30.0, 90.0])[:, None, None]
    image = image.byte()
    ours = idbh_weak(image.expand(n, -1, -1, -1), torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    theirs = torch.stack([published(image, rng) for _ in range(n)])

    def figures(x):
        x = x.float()
        gray = x.mean(1)
        yield gray.mean((1, 2))
        yield gray.std((1, 2))
        yield (x.amax(1) - x.amin(1)).mean((1, 2))
        yield (x == 0).float().mean((1, 2, 3))
        yield (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        yield (x[:, 0] * torch.arange(32)).sum((1, 2)) / x[:, 0].sum((1, 2))
        yield (x[:, 1] * torch.arange(32)[:, None]).sum((1, 2)) / x[:, 1].sum((1, 2))

    for a, b in zip(figures(ours), figures(theirs), strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3


# ------------------------------------------------------------------ as every augmentation here


def test_the_generator_alone_decides():
    x = images(32)
    before, copy = torch.get_rng_state(), x.clone()
    first, again, other = (idbh_weak(x, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, copy)
    assert first.dtype == torch.uint8
    assert first.is_contiguous()
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(idbh_weak(x, generator), first)
    assert not torch.equal(idbh_weak(x, generator), first)
    same = idbh_weak(x[9:10].expand(50, -1, -1, -1), generator)
    assert len(same.flatten(1).unique(dim=0)) > 45
    assert idbh_weak(x[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "uint8"),
        (torch.zeros(1, 2, 32, 32, dtype=torch.uint8), "1 or 3"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "1 or 3"),
        (torch.zeros(1, 3, 32, 10, dtype=torch.uint8), "at least 11"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        idbh_weak(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_without_synchronization():
    x = images(64)
    on_host = idbh_weak(x, torch.Generator().manual_seed(0))
    x = x.cuda()
    generator = torch.Generator().manual_seed(0)
    assert (idbh_weak(x, generator).cpu() != on_host).double().mean() < 1e-3
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        idbh_weak(x, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")

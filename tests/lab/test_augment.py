"""The vectorized augmentations against loops over images, and their randomness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from awp_optim.lab.augment import (
    crop_flip,
    cut_square,
    cutmix,
    cutout,
    draw,
    mix,
    mixup,
    paste,
    random_crop_flip,
)


def reference(x, top, left, mirror, padding):
    """One image at a time, by slicing."""
    n, c, h, w = x.shape
    out = torch.empty_like(x)
    for i in range(n):
        padded = torch.zeros(c, h + 2 * padding, w + 2 * padding, dtype=x.dtype)
        padded[:, padding : padding + h, padding : padding + w] = x[i]
        crop = padded[:, top[i] : top[i] + h, left[i] : left[i] + w]
        out[i] = crop.flip(-1) if mirror[i] else crop
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 5),
    c=st.integers(1, 4),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    padding=st.integers(0, 9),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_loop(n, c, h, w, padding, dtype, channels_last, seed):
    torch.manual_seed(seed)
    x = torch.randint(1, 256, (n, c, h, w)).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    top, left = torch.randint(2 * padding + 1, (2, n))
    mirror = torch.rand(n) < 0.5
    out = crop_flip(x, top, left, mirror, padding)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.equal(out, reference(x, top, left, mirror, padding))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_offset_and_both_flips_occur_equally_often(dtype):
    # One bright pixel off the center of a 5x5 image tells where the crop was taken from.
    padding, n = 1, 18_000
    x = torch.zeros(n, 1, 5, 5, dtype=dtype)
    x[:, :, 2, 1] = 7
    out = random_crop_flip(x, padding, generator=torch.Generator().manual_seed(0))
    assert out.dtype == dtype
    images, _, row, column = out.nonzero(as_tuple=True)
    assert torch.equal(images, torch.arange(n))
    # Moved by -1, 0 or 1: columns 0..2 unmirrored; mirrored, 4 - (0..2) = 2..4. Column 2 is both.
    counts = torch.zeros(5, 5)
    counts.index_put_((row, column), torch.ones(n), accumulate=True)
    expected = torch.zeros(5, 5)
    expected[1:4] = n / 3 * torch.tensor([1, 1, 2, 1, 1]) / 6
    assert (counts[expected == 0] == 0).all()
    assert (counts - expected).abs().max() < 5 * expected.max().sqrt()


def test_images_of_a_batch_are_independent():
    x = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(500, 1, 8, 8)
    out = random_crop_flip(x, 4, generator=torch.Generator().manual_seed(1))
    assert len(out.flatten(1).unique(dim=0)) > 120  # of 162 possible


def test_channels_move_together():
    x = torch.rand(8, 1, 6, 6).expand(8, 3, 6, 6)
    out = random_crop_flip(x, 2)
    assert torch.equal(out, out[:, :1].expand_as(out))


def test_padding_zero_is_the_identity_except_for_flips():
    x = torch.rand(200, 3, 4, 6)
    assert torch.equal(random_crop_flip(x, padding=0).zero_(), torch.zeros_like(x))
    assert x.any()  # the input is not changed
    out = random_crop_flip(x, padding=0, generator=torch.Generator().manual_seed(0))
    same = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("augment", [random_crop_flip, cutout])
def test_the_generator_alone_decides(augment):
    x = torch.rand(32, 3, 8, 8)
    draw = [augment(x, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    # Two calls with one generator differ, and the global state is neither used nor moved.
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = (augment(x, generator=generator) for _ in range(2))
    assert torch.equal(first, draw[0])
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(augment(x), x)  # with the global state it works too


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_crop_flip(torch.zeros(3, 8, 8)), r"\(N, C, H, W\), not \(3, 8, 8\)"),
        (lambda: random_crop_flip(torch.zeros(1, 3, 8, 8), padding=-1), "padding .* not -1"),
        (lambda: cutout(torch.zeros(3, 8, 8)), r"\(N, C, H, W\), not \(3, 8, 8\)"),
        (lambda: cutout(torch.zeros(1, 3, 8, 8), length=0), "length .* not 0"),
        (lambda: mixup(torch.zeros(4, 1, dtype=torch.uint8), torch.arange(4), 4), "use x.float"),
        (lambda: mixup(torch.zeros(4, 1), torch.zeros(4), 4), r"y must be int64 of shape \(4,\)"),
        (lambda: mixup(torch.zeros(4, 1), torch.arange(3), 4), r"y must be int64 .* \(3,\)"),
        (lambda: mixup(torch.zeros(4, 1), torch.arange(4), 4, alpha=0), "alpha must be above 0"),
        (lambda: cutmix(torch.zeros(4, 1), torch.arange(4), 4), r"\(N, C, H, W\)"),
        (lambda: cutmix(torch.zeros(4, 1, 2, 2).byte(), torch.arange(4), 4), "use x.float"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_device", [True, False])
def test_cuda_without_synchronization(on_device):
    x = torch.rand(64, 3, 32, 32, device="cuda")
    y = torch.arange(64, device="cuda") % 10
    generator = torch.Generator("cuda" if on_device else "cpu").manual_seed(0)

    def augment():
        images = cutout(random_crop_flip(x, generator=generator), generator=generator)
        cutmix(images, y, 10, generator=generator)
        return mixup(images, y, 10, generator=generator)

    augment()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed, labels = augment()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mixed.device == labels.device == x.device


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_only_copies_to_the_cpu_are_waited_for(device, waits):
    class Numbers:
        def to(self, device, *, non_blocking):
            self.waited = not non_blocking
            return self

    numbers = Numbers()
    images = torch.zeros(1, device=device)
    assert draw(lambda **kwargs: numbers, like=images, generator=None) is numbers
    assert numbers.waited == waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_the_cpu_with_a_generator_on_a_gpu():
    x = torch.rand(512, 3, 32, 32)
    for augment in (random_crop_flip, cutout):
        here, there = (
            augment(images, generator=torch.Generator("cuda").manual_seed(0))
            for images in (x, x.cuda())
        )
        assert torch.equal(here, there.cpu())


# --- cutout -----------------------------------------------------------------------------------


def cutout_reference(x, row, column, length):
    """One image and one pixel at a time, by distance from the square's first row and column."""
    out = x.clone()
    for i in range(len(x)):
        top, left = int(row[i]) - length // 2, int(column[i]) - length // 2
        for a in range(top, top + length):
            for b in range(left, left + length):
                if 0 <= a < x.shape[2] and 0 <= b < x.shape[3]:
                    out[i, :, a, b] = 0
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 4),
    c=st.integers(1, 3),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    length=st.integers(1, 15),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_cutout_equals_the_loop(n, c, h, w, length, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randint(1, 256, (n, c, h, w)).to(dtype)
    copy = x.clone()
    row, column = torch.randint(h, (n,)), torch.randint(w, (n,))
    out = cut_square(x, row, column, length)
    assert out.dtype == dtype
    assert torch.equal(out, cutout_reference(x, row, column, length))
    assert torch.equal(x, copy)


def test_cutout_of_even_length_is_the_papers():
    # The authors' code takes the rows from center - length // 2 up to center + length // 2.
    out = cut_square(torch.ones(1, 1, 32, 32), torch.tensor([10]), torch.tensor([30]), 14)
    expected = torch.ones(32, 32)
    expected[3:17, 23:32] = 0
    assert torch.equal(out[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_center_is_as_likely(dtype):
    n = 14_000
    x = torch.ones(n, 2, 5, 7, dtype=dtype)
    out = cutout(x, 1, generator=torch.Generator().manual_seed(0))  # the center alone
    assert out.dtype == dtype
    assert torch.equal(out[:, 0], out[:, 1])
    assert ((out[:, 0] == 0).flatten(1).sum(1) == 1).all()
    counts = (out[:, 0] == 0).sum(0)  # expected: 400 each, deviation 20
    assert (counts - 400).abs().max() < 90


# --- mixup ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_mix_equals_the_loop(lam):
    x, y = torch.rand(6, 3, 4, 5), torch.tensor([0, 4, 2, 2, 1, 0])
    partner = torch.tensor([3, 0, 1, 2, 4, 5])
    mixed, labels = mix(x, y, 5, torch.tensor(lam), partner)
    for i, j in enumerate(partner.tolist()):
        image = lam * x[i].double() + (1 - lam) * x[j].double()
        torch.testing.assert_close(mixed[i].double(), image, atol=1e-7, rtol=1e-6)
        target = [0.0] * 5
        target[y[i]] += lam
        target[y[j]] += 1 - lam
        assert labels[i].tolist() == pytest.approx(target, abs=1e-7)
    if lam == 1:
        assert torch.equal(mixed, x)
    if lam == 0:
        assert torch.equal(mixed, x[partner])


def test_the_cross_entropy_of_the_labels_is_the_papers():
    torch.manual_seed(0)
    x, y, logits = torch.rand(8, 3, 4, 4), torch.randint(5, (8,)), torch.randn(8, 5)
    partner, lam = torch.randperm(8), torch.tensor(0.3)
    _, labels = mix(x, y, 5, lam, partner)
    both = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[partner])
    torch.testing.assert_close(F.cross_entropy(logits, labels), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_mixed_images_stay_in_range(dtype):
    x = torch.randint(256, (64, 3, 8, 8)).to(dtype) / 255
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mixed, labels = mixup(x, torch.arange(64) % 10, 10, generator=generator)
        assert mixed.dtype == dtype
        assert labels.dtype == torch.float32
        assert 0 <= mixed.min() <= mixed.max() <= 1
        torch.testing.assert_close(labels.sum(1), torch.ones(64))


def mixing(alpha, generator, n=4):
    """The share and the partners of one call: each image holds its own bit alone."""
    mixed, labels = mixup(torch.eye(n), torch.arange(n), n, alpha, generator)
    assert torch.equal(mixed, labels)
    lam, partner = torch.ones(()), torch.arange(n)
    for i in range(n):
        others = [j for j in range(n) if j != i and mixed[i, j] > 0]
        if others:
            lam, partner[i] = mixed[i, i], others[0]
    return lam.item(), partner.tolist()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 1.4, 8.0])
def test_the_share_is_beta_and_the_partners_a_permutation(alpha):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    draws = [mixing(alpha, generator) for _ in range(2000)]
    identity = list(range(4))
    lams = torch.tensor([lam for lam, partner in draws if partner != identity]).double()
    # Moments of Beta(alpha, alpha): mean 1/2, variance 1 / (4 (2 alpha + 1)).
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lams.mean() - 0.5) < 5 * (variance / len(lams)) ** 0.5
    assert lams.var() == pytest.approx(variance, rel=0.1)
    partners = [tuple(partner) for _, partner in draws]
    counts = {p: partners.count(p) for p in set(partners)}
    assert len(counts) == 24
    assert all(sorted(p) == identity for p in counts)
    assert max(abs(c - 2000 / 24) for c in counts.values()) < 5 * (2000 / 24) ** 0.5


@pytest.mark.parametrize("alpha", [0.5, 1.4, 8.0])
def test_the_share_has_the_distribution_of_scipy_s_beta(alpha):
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    draws = [mixing(alpha, None) for _ in range(2000)]
    lams = [lam for lam, partner in draws if partner != list(range(4))]
    assert stats.kstest(lams, stats.beta(alpha, alpha).cdf).pvalue > 1e-4


def test_mixup_is_repeatable():
    x, y = torch.rand(16, 3, 4, 4), torch.arange(16)

    def draw(seed, of_partners=None):
        torch.manual_seed(seed)
        generator = None if of_partners is None else torch.Generator().manual_seed(of_partners)
        return mixup(x, y, 16, generator=generator)

    def pairs(labels):  # who is mixed with whom, whatever their shares
        return labels > 0

    for of_partners in (None, 5):
        first, again, other = (draw(seed, of_partners) for seed in (3, 3, 4))
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first[0], other[0])
    # The global generator gives the share, one that is passed gives the partners alone.
    share = lambda labels: labels.amax(1).mode().values  # noqa: E731
    a, b, c = draw(3, 5)[1], draw(4, 5)[1], draw(3, 6)[1]
    assert torch.equal(pairs(a), pairs(b))
    assert share(a) != share(b)
    assert not torch.equal(pairs(a), pairs(c))
    assert share(a) == share(c)
    # Two calls differ, and a generator that is passed is moved as randperm moves it.
    generator, plain = (torch.Generator().manual_seed(5) for _ in range(2))
    first, second = (mixup(x, y, 16, generator=generator) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    for _ in range(2):
        torch.randperm(16, generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


# --- CutMix -----------------------------------------------------------------------------------


def published_box(lam, row, column, height, width):
    """The authors' ``rand_bbox``, in float64: first and last row, first and last column."""
    cut = math.sqrt(1 - lam)
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    top, bottom = (min(max(row + s * half_height, 0), height) for s in (-1, 1))
    left, right = (min(max(column + s * half_width, 0), width) for s in (-1, 1))
    return top, bottom, left, right


@settings(max_examples=60, deadline=None)
@given(
    lam=st.floats(0, 1),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    seed=st.integers(0, 99),
    channels_last=st.booleans(),
)
def test_paste_equals_the_loop(lam, h, w, seed, channels_last):
    torch.manual_seed(seed)
    x, y = torch.rand(5, 3, h, w), torch.randint(4, (5,))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    partner, row, column = torch.randperm(5), torch.randint(h, ()), torch.randint(w, ())
    top, bottom, left, right = published_box(lam, int(row), int(column), h, w)
    expected, labels = x.clone(), torch.zeros(5, 4)
    own = 1 - (bottom - top) * (right - left) / (h * w)
    for i, j in enumerate(partner.tolist()):
        expected[i, :, top:bottom, left:right] = x[j, :, top:bottom, left:right]
        labels[i, y[i]] += own
        labels[i, y[j]] += 1 - own
    copy = x.clone()
    mixed, p = paste(x, y, 4, torch.tensor(lam, dtype=torch.float64), partner, row, column)
    assert torch.equal(mixed, expected)
    torch.testing.assert_close(p, labels)
    assert torch.equal(x, copy)


def pasting(alpha, generator, side=12):
    """The rectangle and the own pixels by the label; None if nothing of another image is seen."""
    x = torch.arange(1.0, 4.0)[:, None, None, None].expand(3, 1, side, side)
    mixed, labels = cutmix(x, torch.arange(3), 3, alpha, generator)
    other = (mixed != x)[:, 0]
    if not other.any():
        return None
    i = int(other.flatten(1).any(1).int().argmax())
    rows, columns = other[i].any(1).int(), other[i].any(0).int()
    assert other[i].sum() == rows.sum() * columns.sum()
    for j in range(3):  # one rectangle for the batch
        assert not other[j].any() or torch.equal(other[j], other[i])
        share = (mixed[j] == mixed[j].max()).float().mean()
        torch.testing.assert_close(labels[j].max(), torch.maximum(share, 1 - share))
    place = int(rows.argmax()), int(columns.argmax()), int(rows.sum()), int(columns.sum())
    return *place, round(side**2 * labels[i, i].item())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_rectangle_has_the_published_distribution(alpha):
    numpy, stats = pytest.importorskip("numpy"), pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ours = [box for _ in range(2000) if (box := pasting(alpha, generator))]
    rng, theirs = numpy.random.default_rng(0), []
    for _ in range(2000):
        lam, row, column = rng.beta(alpha, alpha), *rng.integers(0, 12, 2)
        top, bottom, left, right = published_box(lam, row, column, 12, 12)
        height, width = bottom - top, right - left
        if height and width and not numpy.array_equal(rng.permutation(3), range(3)):
            theirs.append((top, left, height, width, 144 - height * width))
    a, b = numpy.array(ours).T, numpy.array(theirs).T
    for one, other in zip(a[:4], b[:4], strict=True):
        table = [numpy.bincount(sample.astype(int), minlength=13) for sample in (one, other)]
        table = numpy.array(table)[:, numpy.sum(table, 0) > 10]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.ks_2samp(a[4], b[4]).pvalue > 1e-3
    assert abs(len(ours) - len(theirs)) < 110


def test_cutmix_is_repeatable():
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16)

    def draw(seed, of_places=5):
        torch.manual_seed(seed)
        return cutmix(x, y, 16, generator=torch.Generator().manual_seed(of_places))

    first, again, *others = draw(3), draw(3), draw(4), draw(3, 6)
    assert all(map(torch.equal, first, again))
    for other in others:
        assert not torch.equal(first[0], other[0])

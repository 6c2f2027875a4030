"""The vectorised augmentation against a loop over images, and its randomness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awp_optim.lab.augment import crop_flip, random_crop_flip


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
    # One bright pixel off the centre of a 5x5 image tells where the crop was taken from.
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


def test_images_of_a_batch_are_treated_independently():
    x = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(500, 1, 8, 8)
    out = random_crop_flip(x, 4, generator=torch.Generator().manual_seed(1))
    assert len(out.flatten(1).unique(dim=0)) > 120  # of 162 possible


def test_channels_move_together():
    x = torch.rand(8, 1, 6, 6).expand(8, 3, 6, 6)
    out = random_crop_flip(x, 2)
    assert torch.equal(out, out[:, :1].expand_as(out))


def test_padding_zero_is_the_identity_but_for_flips():
    x = torch.rand(200, 3, 4, 6)
    assert torch.equal(random_crop_flip(x, padding=0, flip=False), x)
    out = random_crop_flip(x, padding=0, generator=torch.Generator().manual_seed(0))
    same = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_the_generator_alone_decides():
    x = torch.rand(32, 3, 8, 8)
    draw = [random_crop_flip(x, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    # Two calls with one generator differ, and the global state is neither used nor moved.
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = (random_crop_flip(x, generator=generator) for _ in range(2))
    assert torch.equal(first, draw[0])
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_without_flip_the_offsets_are_the_same():
    x = torch.rand(64, 1, 8, 8)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    plain = random_crop_flip(x, flip=False, generator=generators[0])
    mirrored = random_crop_flip(x, generator=generators[1])
    equal = (plain == mirrored).flatten(1).all(1)
    flipped = (plain.flip(-1) == mirrored).flatten(1).all(1)
    assert (equal | flipped).all()
    assert flipped.any()
    assert generators[0].get_state().equal(generators[1].get_state())


def test_the_input_is_left_alone():
    x = torch.rand(4, 3, 8, 8)
    copy = x.clone()
    out = random_crop_flip(x, padding=0, flip=False)
    out.zero_()
    assert torch.equal(x, copy)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), not \(3, 8, 8\)"):
        random_crop_flip(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="padding must be 0 or more, not -1"):
        random_crop_flip(torch.zeros(1, 3, 8, 8), padding=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_device", [True, False])
def test_cuda_without_synchronisation(on_device):
    x = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, device="cuda")
    generator = torch.Generator("cuda" if on_device else "cpu").manual_seed(0)
    random_crop_flip(x, generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = random_crop_flip(x, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device == x.device
    assert out.dtype == x.dtype

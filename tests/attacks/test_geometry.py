"""The threat balls, against arithmetic in float64 and against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from awp_optim._utils.checks import DTYPES
from awp_optim.attacks.balls import BALLS, L1, L2, Linf, round_toward
from awp_optim.attacks.balls import _next_toward as next_toward

from .conftest import radius

NORMS = list(BALLS)
MAX = torch.finfo(torch.float32).max

norms = pytest.mark.parametrize("norm", NORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
dtypes = st.sampled_from(DTYPES)
radii = st.one_of(st.floats(1e-8, 3.0), st.sampled_from([1 / 255, 8 / 255, 128 / 255, 0.3, 1.0]))
shapes = st.sampled_from([(0, 3), (1,), (4,), (3, 5), (2, 3, 4, 4), (2, 3, 3, 2, 2)])
seeds = st.integers(0, 2**31)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Inputs in [0, 1], many of them where rounding goes wrong."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g, dtype=torch.float64)
    f = torch.finfo(dtype)
    special = torch.tensor([0, 1, 0.5, f.tiny, f.tiny * f.eps, 1 - f.eps, 0.25 + f.eps, 1 / 3])
    chosen = special[torch.randint(len(special), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.5, x, chosen.double()).to(dtype)


def length(delta: Tensor, norm: str) -> Tensor:
    return radius(torch.zeros_like(delta.unsqueeze(-1)), delta.unsqueeze(-1), norm)


def slack(x: Tensor) -> float:
    """One unit in the last place of float64 at 1, for each of the numbers that add up."""
    return 2.3e-16 * (1 + x[:1].numel())


@settings(max_examples=300, deadline=None)
@given(dtypes, st.sampled_from(NORMS), radii, shapes, seeds, st.sampled_from([1e-3, 1.0, 50.0]))
@example(torch.float32, "linf", 8 / 255, (2, 3, 4, 4), 0, 1.0)
@example(torch.bfloat16, "l2", 0.5, (2, 3, 4, 4), 0, 1.0)
def test_projection_lands_in_the_ball_and_exactly_in_the_box(dtype, norm, eps, shape, seed, scale):
    x = awkward(shape, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    z = x.double() + torch.randn(shape, generator=g, dtype=torch.float64) * scale
    project = BALLS[norm].projection(x, eps, (0.0, 1.0))
    for given_as in (torch.float64, torch.float32, dtype):
        out = project(z.to(given_as))
        assert out.dtype == dtype
        assert out.shape == x.shape
        assert bool(((out >= 0) & (out <= 1)).all())
        assert bool((length(out.double() - x.double(), norm) <= eps + slack(x)).all())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["linf", "l2"]), radii, seeds
)
def test_projection_is_the_nearest_point(dtype, norm, eps, seed):
    x = awkward((4, 3, 5), dtype, seed)
    z = (x + torch.randn(4, 3, 5, dtype=dtype)).double()
    delta = z - x.double()
    if norm == "linf":
        nearest = delta.clamp(-eps, eps)
    else:
        n = delta.flatten(1).norm(dim=1)
        nearest = delta * (eps / n).clamp(max=1)[:, None, None]
    out = BALLS[norm].projection(x, eps, None)(z)
    torch.testing.assert_close(out.double(), x.double() + nearest, rtol=2e-7, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(dtypes, radii, seeds)
def test_linf_bounds_are_as_wide_as_the_dtype_allows(dtype, eps, seed):
    x = awkward((64,), dtype, seed)
    project = Linf().projection(x, eps, None)
    for side in (-torch.inf, torch.inf):
        end = project(torch.full_like(x, side))
        beyond = torch.nextafter(end, torch.full_like(x, side)).double()
        too_far = (beyond - x.double()).abs()
        assert bool((too_far >= eps * (1 - 1e-15)).all())


@norms
@each_dtype
def test_projection_keeps_what_is_inside(norm, dtype):
    x = awkward((5, 7), dtype, 3)
    project = BALLS[norm].projection(x, 0.25, (0.0, 1.0))
    assert torch.equal(project(x), x)
    inside = round_toward(x.double().lerp(torch.full((5, 7), 0.5).double(), 0.05), x)
    assert torch.equal(project(inside), inside)


@norms
def test_far_away_the_box_and_the_finite_numbers_win(norm):
    project = BALLS[norm].projection(torch.tensor([[-0.5, 1.5]]), 0.1, (0.0, 1.0))
    out = project(torch.zeros(1, 2))
    assert bool(((out >= 0) & (out <= 1)).all())
    project = BALLS[norm].projection(torch.full((1, 2), 6e4, dtype=torch.float16), 1e6, None)
    assert bool(project(torch.full((1, 2), 9e5)).isfinite().all())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seeds)
def test_round_toward_is_the_nearest_value_not_further_away(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = awkward((100,), dtype, seed) * (1 if seed % 2 else -1)
    spread = 10.0 ** torch.randint(-12, 1, (100,), generator=g)
    t = x.double() + torch.randn(100, generator=g).double() * spread
    out = round_toward(t, x)
    assert out.dtype == dtype
    assert bool(((out.double() - x.double()).abs() <= (t - x.double()).abs()).all())
    # The next value outward is no better: too far from x, or no nearer to t.
    outward = (t - x.double()).sign().to(dtype) * torch.inf
    following = torch.where(outward.isnan(), out, torch.nextafter(out, outward)).double()
    too_far = (following - x.double()).abs() > (t - x.double()).abs()
    no_nearer = (following - t).abs() >= (out.double() - t).abs()
    assert bool((too_far | no_nearer).all())
    inward = (out.double() - t).abs() <= (torch.nextafter(out, x).double() - t).abs()
    assert bool(inward.all())


@each_dtype
def test_next_toward_is_nextafter(dtype):
    f = torch.finfo(dtype)
    values = [0.0, f.tiny * f.eps, f.tiny, 1e-3, 0.5, 1.0, 1.5, f.max]
    values = torch.tensor([*values, *[-v for v in values]], dtype=dtype)
    t, x = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    t, x = t[t != x], x[t != x]
    assert torch.equal(next_toward(t, x), torch.nextafter(t, x))


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("norm", "g", "step"),
    [
        ("linf", [1e-44, -3.0, 0.0, NAN, INF, -INF], [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]),
        ("l2", [3.0, NAN, 4.0], [0.6, 0.0, 0.8]),
        ("l2", [INF, -2.0, 0.0], [0.0, -1.0, 0.0]),
        ("l1", [1.0, -3.0, 2.0], [0.0, -1.0, 0.0]),
        ("l1", [NAN, 0.5, -0.1], [0.0, 1.0, 0.0]),
        *((norm, zero, [0.0, 0.0]) for norm in NORMS for zero in ([NAN, NAN], [0.0, 0.0])),
    ],
)
@each_dtype
def test_ascent_by_hand(norm, g, step, dtype):
    if dtype in (torch.bfloat16, torch.float16):
        g = [0.01 if value == 1e-44 else value for value in g]
    ascent = BALLS[norm].ascent(torch.tensor([g], dtype=dtype))
    assert ascent.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ascent, torch.tensor([step], dtype=ascent.dtype))


@pytest.mark.parametrize("scale", [1e-43, 1e-30, 1e-7, 1.0, 1e20, 3e37])
def test_l2_ascent_has_length_one_at_every_scale(scale):
    g = torch.tensor([3.0, -4.0]).repeat(2, 8) * scale
    step = L2().ascent(g)
    torch.testing.assert_close(step.norm(dim=1), torch.ones(2))
    tolerance = 0.05 if scale < 1e-40 else 1e-6  # subnormal gradients have few bits themselves
    expected = torch.tensor([3.0, -4.0]).repeat(2, 8) / (5 * 8**0.5)
    torch.testing.assert_close(step, expected, rtol=tolerance, atol=0)


@norms
def test_ascent_leaves_the_gradient_alone(norm):
    g = torch.randn(2, 3)
    before = g.clone()
    BALLS[norm].ascent(g)
    BALLS[norm].ascent(torch.ones(()).expand(2, 3))  # autograd hands out such views
    assert torch.equal(g, before)


@norms
def test_the_step_is_the_steepest_among_those_of_its_length(norm):
    g = torch.randn(5, 12)
    best = (g * BALLS[norm].ascent(g)).sum(1)
    for _ in range(200):
        d = torch.randn(5, 12)
        d = d / length(d, norm)[:, None].float()
        assert bool(((g * d).sum(1) <= best + 1e-5).all())


@each_dtype
@pytest.mark.parametrize("shape", [(0, 3), (7,), (7, 2, 3)])
@norms
def test_random_offsets_lie_in_the_ball(norm, shape, dtype):
    delta = BALLS[norm].random(torch.zeros(shape, dtype=dtype), 0.3)
    assert delta.shape == shape
    assert bool((length(delta, norm) <= 0.3 * (1 + 1e-6)).all())


def test_linf_start_is_uniform():
    delta = Linf().random(torch.zeros(200, 100), 0.5)
    quantiles = torch.quantile(delta.flatten(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = torch.tensor([-0.5, -0.25, 0, 0.25, 0.5])
    torch.testing.assert_close(quantiles, expected, atol=0.01, rtol=0)


def test_l2_start_has_a_uniform_length_and_direction():
    delta = L2().random(torch.zeros(4000, 3, 4), 0.5)
    n = delta.flatten(1).norm(dim=1)
    quantiles = torch.quantile(n, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = torch.tensor([0, 0.125, 0.25, 0.375, 0.5])
    torch.testing.assert_close(quantiles, expected, atol=0.015, rtol=0)
    direction = delta / n[:, None, None]
    assert direction.mean(0).abs().max() < 0.02
    torch.testing.assert_close(
        direction.square().mean(0), torch.full((3, 4), 1 / 12), atol=0.01, rtol=0
    )


@norms
def test_layout_is_kept(norm):
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    ball = BALLS[norm]
    for t in (ball.random(x, 0.1), ball.ascent(x), ball.projection(x, 0.1, None)(x + 1)):
        assert t.is_contiguous(memory_format=torch.channels_last)


def l1_nearest(d: Tensor, room: Tensor, eps: float) -> Tensor:
    """min |z - d|_2 over |z|_1 <= eps and |z_i| <= room_i on d's side, by bisection."""
    lo, hi = 0.0, float(d.abs().max())
    for _ in range(200):
        s = (lo + hi) / 2
        z = torch.minimum((d.abs() - s).clamp_min(0), room)
        lo, hi = (s, hi) if z.sum() > eps else (lo, s)
    return torch.minimum((d.abs() - hi).clamp_min(0), room) * d.sign()


@pytest.mark.parametrize("eps", [1e-3, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("clip", [(0, 1), None])
def test_l1_projection_is_the_nearest_point_of_ball_and_box(eps, clip):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, 4, generator=g, dtype=torch.float64)
    x.view(-1)[::7] = 0.0
    d = torch.randn(20, 3, 4, generator=g, dtype=torch.float64)
    d[::2] *= 0.01
    d[1, 0] = 0.3  # ties
    d[5] = 0
    z = L1().projection(x, eps, clip)(x + d) - x
    for i in range(len(x)):
        room = torch.where(d[i] < 0, x[i], 1 - x[i]) if clip else torch.full_like(d[i], torch.inf)
        torch.testing.assert_close(z[i], l1_nearest(d[i], room, eps), atol=1e-9, rtol=0)


def test_l1_random_is_in_the_ball_in_every_direction():
    d = L1().random(torch.zeros(2000, 5), 2.0)
    n = d.abs().sum(1)
    assert n.max() <= 2 * (1 + 1e-6)
    torch.testing.assert_close(n.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    torch.testing.assert_close(d.sign().mean(0), torch.zeros(5), atol=0.1, rtol=0)
    share = d.abs().mean(0) / d.abs().mean(0).sum()
    torch.testing.assert_close(share, torch.full((5,), 0.2), atol=0.02, rtol=0)

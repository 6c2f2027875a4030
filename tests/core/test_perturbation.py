"""layer_norms and ascend_ against the equations written out in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from awp_optim import AWP
from awp_optim._core import perturbation
from awp_optim._core.perturbation import ascend_, layer_norms

usefixtures = pytest.mark.usefixtures
foreachs = pytest.mark.parametrize("foreach", [True, False])
norms = pytest.mark.parametrize("norm", ["l1", "l2"])
SHAPES = [(3, 4), (2, 3, 3, 3), (5, 1), (1, 1), (7,), ()]
ORDER = {"l1": 1, "l2": 2}
# Relative rounding of a sum w + v in each dtype.
EPS = {torch.float64: 2**-50, torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def equation(p, g, w, gamma, steps, norm):
    """Eq. (10) and (15) for one layer, in float64; (w + v) after the ascent."""
    p, g, w = (
        t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (p, g, w)
    )
    size = lambda t: t.abs().pow(ORDER[norm]).sum() ** (1 / ORDER[norm])  # noqa: E731
    v = p - w
    if size(g).isfinite() and size(g) > 0:
        v = v + gamma / steps * size(w) * g / size(g)
    if size(v) > gamma * size(w):
        v = gamma * size(w) / size(v) * v
    return w + v


def layers(dtype, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(s, generator=generator, dtype=exact).to(dtype) for s in shapes]


def ascend(params, grads, weights, norm, foreach, **kwargs):
    norms = (layer_norms(tensors, norm, foreach=foreach) for tensors in (weights, grads))
    ascend_(params, grads, weights, *norms, norm=norm, foreach=foreach, **kwargs)


@pytest.fixture(params=["host", "device", "fused"])
def where_the_norms_are(request, monkeypatch):
    """On an accelerator (or under a compiler) layers are masked, on the CPU they are left out."""
    if request.param != "host":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if request.param == "fused":  # the CPU has the kernel, too
        monkeypatch.setattr(perturbation, "_FUSED", {"cpu"})


@usefixtures("where_the_norms_are")
@foreachs
@norms
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("steps", [1, 3])
def test_repeated_ascents_follow_the_equations(dtype, norm, foreach, steps):
    weights = layers(dtype)
    params = [w.clone() for w in weights]
    for k in range(steps + 2):  # two more than gamma is spread over: the projection must hold them
        grads = layers(dtype, seed=k + 1)
        expected = [equation(p, g, w, 0.05, steps, norm) for p, g, w in zip(params, grads, weights)]
        ascend(params, grads, weights, norm, foreach, gamma=0.05, steps=steps, is_first=k == 0)
        for p, e, w in zip(params, expected, weights):
            assert p.dtype == dtype
            bound = EPS[dtype] * w.double().abs().max().item()
            torch.testing.assert_close(p.double(), e, rtol=0, atol=bound)


@usefixtures("where_the_norms_are")
@foreachs
@norms
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layers_are_measured_by_their_moduli(dtype, norm, foreach):
    (w,), (g,) = (layers(dtype, seed, [(3, 4)]) for seed in (0, 1))
    p = w.clone()
    for k in range(3):
        expected = equation(p, g, w, 0.05, 2, norm)
        ascend([p], [g], [w], norm, foreach, gamma=0.05, steps=2, is_first=k == 0)
        torch.testing.assert_close(p.to(expected.dtype), expected, rtol=0, atol=1e-6)


@usefixtures("where_the_norms_are")
@foreachs
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["zero", "inf", "-inf", "nan", "zero weight"])
def test_a_layer_without_a_usable_direction_keeps_its_weights(bad, dtype, foreach, is_first):
    weights, grads = (layers(dtype, seed, [(4, 4)] * 3) for seed in (0, 1))
    if bad == "zero weight":
        weights[1].zero_()
    elif bad == "zero":
        grads[1].zero_()
    else:
        grads[1][2, 3] = float(bad)
    params = [w.clone() for w in weights]
    ascend(params, grads, weights, "l2", foreach, gamma=0.05, steps=1, is_first=is_first)
    assert torch.equal(params[1], weights[1])
    for i in (0, 2):
        assert params[i].isfinite().all()
        assert not torch.equal(params[i], weights[i])


@given(
    seed=st.integers(0, 2**16),
    gamma=st.floats(1e-4, 2.0),
    steps=st.integers(1, 4),
    calls=st.integers(1, 6),
    norm=st.sampled_from(["l1", "l2"]),
    scale=st.floats(-6, 6),
    foreach=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_v_stays_in_the_ball_whatever_the_scale(seed, gamma, steps, calls, norm, scale, foreach):
    weights = layers(torch.float32, seed)
    params = [w.clone() for w in weights]
    for k in range(calls):
        grads = [g * 10**scale for g in layers(torch.float32, seed + 1 + k)]
        ascend(params, grads, weights, norm, foreach, gamma=gamma, steps=steps, is_first=k == 0)
    for p, w in zip(params, weights):
        v, size = p.double() - w.double(), w.double().norm(ORDER[norm])
        assert v.norm(ORDER[norm]) <= gamma * size * (1 + 1e-5) + 1e-6 * size


@norms
@foreachs
def test_norms_of_large_tensors_are_right(norm, foreach):
    """A plain float32 reduction on the CPU is off by 3e-4 (l2) and 1e-3 (l1) at this size."""
    flat = torch.randn(10**7)
    image = flat.view(1000, 10, 1000, 1).to(memory_format=torch.channels_last)
    tensors = [flat, torch.ones(3), flat.view(1, -1), image]
    norms = layer_norms(tensors, norm, foreach=foreach)
    for n, t in zip(norms, tensors):
        exact = t.double().flatten().norm(ORDER[norm]).item()
        assert n.item() == pytest.approx(exact, rel=1e-5)


def test_norms_of_half_precision_do_not_overflow():
    t = torch.full((100, 100), 6e4, dtype=torch.float16)
    assert layer_norms([t]).item() == pytest.approx(6e6, rel=1e-3)
    assert layer_norms([t]).dtype == torch.float32
    assert layer_norms([t], "l1").item() == pytest.approx(6e8, rel=1e-3)
    assert layer_norms([torch.ones(2, dtype=torch.float64)]).dtype == torch.float64


def test_a_tiny_half_precision_gradient_has_a_scale_beyond_its_dtype():
    """gamma |w| / |g| = 4e5 does not exist in float16."""
    w = torch.ones(64, 64, dtype=torch.float16)
    g = torch.full((64, 64), 6e-8, dtype=torch.float16)
    for foreach in (True, False):
        p = w.clone()
        ascend([p], [g], [w], "l2", foreach, gamma=0.05, steps=1, is_first=True)
        torch.testing.assert_close(p, torch.full_like(p, 1.05))


@foreachs
def test_gamma_may_be_a_tensor(foreach):
    (w,), (g,) = (layers(torch.float32, seed, [(3, 3)]) for seed in (0, 1))
    results = []
    for gamma in (0.1, torch.tensor(0.1)):
        results.append(w.clone())
        ascend(results[-1:], [g], [w], "l2", foreach, gamma=gamma, steps=1, is_first=True)
    torch.testing.assert_close(*results)


def test_the_masked_ascent_reads_and_writes_each_weight_once(monkeypatch):
    """No temporaries: nine passes over the memory of a layer, norms and copies included."""
    passes = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal passes
            out = func(*args, **(kwargs or {}))
            if func is not torch.ops.aten.empty_like.default:  # the buffer, once
                tensors = [t for t in tree_flatten((args, kwargs, out))[0] if is_big(t)]
                passes += len({t.data_ptr() for t in tensors})
                passes += "_fused_sgd_" in str(func)  # the weight is read and written
            return out

    is_big = lambda t: isinstance(t, torch.Tensor) and t.numel() > 100  # noqa: E731
    monkeypatch.setattr(perturbation, "_host_may_read", lambda t: False)
    monkeypatch.setattr(perturbation, "_FUSED", {"cpu"})
    p = torch.nn.Parameter(torch.randn(20, 30))
    opt = AWP([p], torch.optim.SGD, gamma=0.1, lr=0.1)
    p.grad = torch.randn(20, 30)
    with Count():
        opt.first_step()
        opt.restore()
    assert passes == 9


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 4), (2, 3, 3, 3)] * 10 + [(5,), ()] * 9 + [(70, 70)] * 9,
        [(2, 600, 600), (7,), (3, 3), (7,)],
        [(0, 3)] * 9,
    ],
)
def test_norms_of_many_layers_are_those_of_each_in_order(shapes, dtype, norm):
    tensors = [t * (i + 1) for i, t in enumerate(layers(dtype, shapes=shapes))]
    for i, t in enumerate(tensors):
        if t.ndim == 4 and i % 3:
            tensors[i] = t.to(memory_format=torch.channels_last)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    truth = [t.to(exact).abs().pow(ORDER[norm]).sum() ** (1 / ORDER[norm]) for t in tensors]
    ours = layer_norms(tensors, norm)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-4 if dtype.is_complex else 1e-5  # torch's sums of complex numbers are less exact
    torch.testing.assert_close(ours.double(), torch.stack(truth), rtol=rtol, atol=0)


@usefixtures("where_the_norms_are")
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)],
)
def test_gradients_of_another_layout_or_dtype(dtype, layout):
    (w,), (g,) = (layers(torch.float32, seed, shapes=[(4, 3, 5, 2)]) for seed in (0, 1))
    w, g = w.to(memory_format=torch.channels_last), g.to(dtype, memory_format=layout)
    p = w.clone()
    ascend([p], [g], [w], "l2", True, gamma=0.1, steps=1, is_first=True)
    truth = equation(w, g, w, 0.1, 1, "l2")
    torch.testing.assert_close(p.double(), truth, rtol=1e-5, atol=1e-6)
    assert p.is_contiguous(memory_format=torch.channels_last)


@usefixtures("where_the_norms_are")
@norms
@foreachs
def test_parts_of_layers_ascend_like_full_layers(norm, foreach):
    """Two threads, each with some rows of every layer, or none, share nothing but norms."""
    shapes = [(1, 6)] * 9 + [(4, 3), (2, 5), (3, 2, 2)]
    w, g, p = (layers(torch.float64, seed, shapes) for seed in range(3))
    p = [a + 0.05 * b for a, b in zip(w, p)]  # outside the ball, or soon to be
    g[-1][-1] = float("nan")  # in one part, and the layer stays where it is for both
    truth = [equation(*layer, 0.1, 2, norm) for layer in zip(p, g, w)]
    both_here, powers = threading.Barrier(2), [None, None]

    def ascend_part(i):
        def reduce_norms(norms):
            powers[i] = norms ** ORDER[norm]
            both_here.wait(10)
            total = sum(powers) ** (1 / ORDER[norm])
            both_here.wait(10)
            return total

        part = [[t[:1] if i == 0 else t[1:] for t in tensors] for tensors in (p, g, w)]
        sizes = [reduce_norms(layer_norms(t, norm, foreach=foreach)) for t in (part[2], part[1])]
        settings = {"gamma": 0.1, "steps": 2, "norm": norm, "foreach": foreach}
        ascend_(*part, *sizes, reduce_norms=reduce_norms, **settings)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ascend_part, range(2)))
    for result, expected in zip(p, truth):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)

"""What every attack promises: checked input, a model left as found, no weight gradients."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from awp_optim.attacks import FGSM, PGD, Attack

ATTACKS = {
    "fgsm": FGSM(),
    "fgsm-l2": FGSM(eps=0.5, norm="l2"),
    "pgd": PGD(steps=3),
    "pgd-l2": PGD(eps=0.5, step_size=0.1, steps=3, norm="l2"),
    "pgd-kl": PGD(steps=3, loss="kl"),
    "pgd-restarts": PGD(steps=2, restarts=3, loss="dlr"),
    "pgd-train": PGD(steps=3, model_mode="train"),
}
FORWARDS = {"fgsm": 1, "fgsm-l2": 1, "pgd": 3, "pgd-l2": 3, "pgd-kl": 4, "pgd-restarts": 9}
FORWARDS["pgd-train"] = 3
BACKWARDS = {**FORWARDS, "pgd-kl": 3, "pgd-restarts": 6}

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def radius(attack, x, x_adv):
    delta = (x_adv - x).double().flatten(1)
    return delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)


def snapshot(model):
    """All of a model that an attack could disturb, and what it is made of."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad_ids": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "state": copy.deepcopy(model.state_dict()),
        "parameter_ids": [id(p) for p in model.parameters()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "parameter_hooks": [list(p._backward_hooks or {}) for p in model.parameters()],
    }


def assert_same(before, after, buffers=True):
    for key in before.keys() - {"grads", "state"}:
        assert before[key] == after[key], key
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for key, value in before["state"].items():
        if buffers or ("running" not in key and "tracked" not in key):
            assert torch.equal(value, after["state"][key]), key


def disturb(model):
    """Give a model a state that resetting everything to some default would not bring back."""
    model.train()
    model[1].eval()
    model[6].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[3].weight.register_hook(lambda g: g)
    model[5].register_forward_hook(lambda *a: None)
    return model


@every_attack
def test_the_model_is_left_as_found(attack, cnn, batch):
    before = snapshot(disturb(cnn))
    attack(cnn, *batch)
    assert_same(before, snapshot(cnn), buffers=attack.model_mode == "eval")


@every_attack
@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_model_is_left_as_found_after_an_exception(attack, fails_at, cnn, batch):
    calls = 0

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("out of memory")

    disturb(cnn)[4].register_forward_hook(fail)
    before = snapshot(cnn)
    if FORWARDS[next(k for k, v in ATTACKS.items() if v is attack)] < fails_at:
        pytest.skip("makes one forward pass")
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(cnn, *batch)
    assert_same(before, snapshot(cnn), buffers=attack.model_mode == "eval")


def test_a_train_method_that_fails_leaves_the_modes(cnn, batch):
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            if not mode:
                raise RuntimeError("no")
            return self

    model = Stubborn(cnn, nn.Identity())
    model.train()
    with pytest.raises(RuntimeError, match="no"):
        FGSM()(model, *batch)
    assert all(m.training for m in model.modules())


@every_attack
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_runs_in_the_mode_asked_for(attack, mode, cnn, batch):
    seen = set()
    cnn.train(mode)
    for module in cnn.modules():
        module.register_forward_hook(lambda m, *a: seen.add(m.training))
    attack(cnn, *batch)
    assert seen == {attack.model_mode == "train"}


def test_batchnorm_statistics_move_in_train_mode_only(cnn, batch):
    mean, count = cnn[1].running_mean.clone(), int(cnn[1].num_batches_tracked)
    PGD(steps=4)(cnn, *batch)
    assert torch.equal(cnn[1].running_mean, mean)
    assert int(cnn[1].num_batches_tracked) == count
    PGD(steps=4, model_mode="train")(cnn, *batch)
    assert not torch.equal(cnn[1].running_mean, mean)
    assert int(cnn[1].num_batches_tracked) == count + 4


@every_attack
def test_costs_exactly_these_passes_and_no_weight_gradient(attack, cnn, batch):
    name = next(k for k, v in ATTACKS.items() if v is attack)
    calls = []
    cnn.register_forward_hook(lambda *a: calls.append(1))
    for p in cnn.parameters():
        p.register_hook(lambda g: pytest.fail("a weight gradient was accumulated"))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        cnn(batch[0])
    calls.clear()
    with FlopCounterMode(display=False) as counted:
        attack(cnn, *batch)
    assert len(calls) == FORWARDS[name]
    # A backward pass to the input costs as much as a forward pass, one to the weights again so.
    passes = FORWARDS[name] + BACKWARDS[name]
    assert counted.get_total_flops() == passes * forward.get_total_flops()


@every_attack
def test_the_result_is_detached_and_the_input_untouched(attack, cnn, batch):
    x, y = batch
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    x_before, y_before = x.detach().clone(), y.clone()
    x_adv = attack(cnn, x, y)
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert x_adv.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(x.detach(), x_before)
    assert torch.equal(y, y_before)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert x.requires_grad


@every_attack
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(attack, guard, cnn, batch):
    torch.manual_seed(3)
    expected = attack(copy.deepcopy(cnn), *batch)
    with guard():
        x, y = batch[0].clone(), batch[1].clone()
        torch.manual_seed(3)
        x_adv = attack(cnn, x, y)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (guard is torch.inference_mode)
    assert torch.equal(x_adv, expected)
    assert not x_adv.is_inference()


@every_attack
@pytest.mark.parametrize("kind", ["nan", "inf", "nan gradient"])
def test_a_model_that_blows_up_costs_nothing_but_the_step(attack, kind, batch):
    x, y = batch

    def model(x):
        z = x.flatten(1)[:, :5]
        if kind == "nan":
            return z * torch.nan
        if kind == "inf":
            return z * torch.inf
        return (z - z.detach()).abs().sqrt() * 0  # infinite slope times zero

    x_adv = attack(model, x, y)
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert bool((radius(attack, x, x_adv) <= attack.eps * (1 + 1e-6)).all())


def test_one_broken_example_leaves_the_others_alone(batch):
    x, y = batch
    w = torch.randn(192, 5)

    def model(x, broken):
        z = x.flatten(1) @ w
        return torch.where(broken[:, None], z * torch.nan, z)

    for attack in (ATTACKS["fgsm"], ATTACKS["fgsm-l2"]):
        broken = torch.arange(len(x)) == 2
        x_adv = attack(lambda x, b=broken: model(x, b), x, y)
        expected = attack(lambda x, b=broken & False: model(x, b), x, y)
        assert torch.equal(x_adv[~broken], expected[~broken])
        assert torch.equal(x_adv[broken], x[broken])


@every_attack
def test_a_zero_gradient_gives_no_step(attack, batch):
    x, y = batch
    x_adv = attack(lambda x: x.flatten(1)[:, :5] * 0, x, y)
    assert bool((radius(attack, x, x_adv) <= attack.eps * (1 + 1e-6)).all())
    if isinstance(attack, FGSM):
        assert torch.equal(x_adv, x)


@every_attack
def test_an_empty_batch_comes_back_without_asking_the_model(attack):
    x = torch.rand(0, 3, 8, 8)
    out = attack(lambda x: pytest.fail("called"), x, torch.zeros(0, dtype=torch.long))
    assert out.shape == x.shape
    assert out is not x


@every_attack
def test_eps_zero_returns_the_input_itself(attack, batch):
    x, y = batch
    out = dataclasses.replace(attack, eps=0)(lambda x: pytest.fail("called"), x, y)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert not out.requires_grad


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_stays_in_the_ball_and_climbs(attack, dtype, cnn, batch):
    x, y = batch[0].to(dtype), batch[1]
    model = cnn.to(dtype)
    x_adv = attack(model, x, y)
    assert x_adv.dtype == dtype
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert bool((radius(attack, x.double(), x_adv.double()) <= attack.eps + 1e-15).all())
    assert bool((x_adv != x).any())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_shorter_than_a_bfloat16_unit_still_add_up(norm):
    w = torch.linspace(-1, 1, 64)
    x, y = torch.full((2, 64), 0.75, dtype=torch.bfloat16), torch.tensor([0, 0])

    def model(x):
        return torch.stack([x.float() @ -w, x.float() @ w], dim=1)

    eps = 8 / 255 if norm == "linf" else 0.5
    attack = PGD(eps, eps / 40, steps=80, norm=norm, random_start=False)
    delta = (attack(model, x, y) - x).float()
    direction = w.sign() if norm == "linf" else w / w.norm()
    # Half a unit in the last place is 1/512 here; no element is more than a whole one short.
    assert (delta - eps * direction).abs().max() <= 1 / 256


@every_attack
@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3, 3, 2)])
def test_any_shape(attack, shape):
    x, y = torch.rand(shape), torch.tensor([0, 1, 2, 0])

    def model(x):
        s = x.unsqueeze(-1).flatten(1).sum(1)
        return torch.stack([s, -s, s.square()], dim=1)

    x_adv = attack(model, x, y)
    assert x_adv.shape == shape
    assert not torch.equal(x_adv, x)


@every_attack
def test_channels_last_is_kept(attack, cnn, batch):
    x = batch[0].to(memory_format=torch.channels_last)
    cnn = cnn.to(memory_format=torch.channels_last)
    x_adv = attack(cnn, x, batch[1])
    assert x_adv.is_contiguous(memory_format=torch.channels_last)


@every_attack
def test_frozen_models_can_be_attacked(attack, cnn, batch):
    cnn.requires_grad_(False)
    assert not torch.equal(attack(cnn, *batch), batch[0])


@every_attack
def test_other_integer_labels(attack, cnn, batch):
    x, y = batch
    torch.manual_seed(0)
    expected = attack(copy.deepcopy(cnn), x, y)
    for dtype in (torch.int32, torch.uint8):
        torch.manual_seed(0)
        assert torch.equal(attack(copy.deepcopy(cnn), x, y.to(dtype)), expected)


@every_attack
def test_the_surrounding_autocast_applies_and_survives(attack, cnn, batch):
    x, y = batch
    cnn.train()
    seen, cached = [], []

    def look(module, args, output):
        seen.append(output.dtype)
        cached.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))

    handle = cnn.register_forward_hook(look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = attack(cnn, x, y)
        handle.remove()
        assert torch.is_autocast_cache_enabled()
        nn.functional.cross_entropy(cnn(x_adv), y).backward()
    assert x_adv.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    # Weights cast in a pass without gradients must not reach the training pass by the cache.
    assert all(grad or not cache for grad, cache in cached)
    assert all(p.grad is not None and bool(p.grad.any()) for p in (cnn[0].weight, cnn[7].weight))


def test_any_callable_is_a_model(cnn, batch):
    torch.manual_seed(0)
    expected = PGD()(cnn, *batch)
    torch.manual_seed(0)
    assert torch.equal(PGD()(lambda x: cnn(x), *batch), expected)


@every_attack
def test_an_attack_is_a_value(attack):
    assert isinstance(attack, Attack)
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert copy.deepcopy(attack) == attack
    assert dataclasses.replace(attack, eps=0.125) != attack
    assert hash(dataclasses.replace(attack)) == hash(attack)
    assert "eps=" in repr(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.eps = 1.0


def test_settings_are_normalised():
    attack = PGD(eps=np.float32(0.5), steps=np.int64(3), clip=[0, 1])
    assert (attack.eps, attack.steps, attack.clip) == (0.5, 3, (0.0, 1.0))
    assert hash(attack) == hash(PGD(eps=0.5, steps=3))
    assert PGD(clip=(0, 1)) == PGD()


def test_an_attack_cannot_be_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Attack()


BAD_SETTINGS = [
    ({"eps": -0.1}, ValueError, r"eps must not be negative, got -0.1"),
    ({"eps": float("nan")}, ValueError, r"eps must be finite, got nan"),
    ({"eps": float("inf")}, ValueError, r"eps must be finite, got inf"),
    ({"eps": "8/255"}, TypeError, r"eps must be a number, got str '8/255'"),
    ({"eps": True}, TypeError, r"eps must be a number, got bool True"),
    ({"norm": "linfinity"}, ValueError, r"norm must be one of 'linf', 'l2', got 'linfinity'"),
    ({"loss": "mse"}, ValueError, r"loss must be one of 'ce', 'kl', 'cw', 'dlr', got 'mse'"),
    ({"model_mode": "test"}, ValueError, r"model_mode must be one of 'eval', 'train', got 'test'"),
    ({"clip": (1, 0)}, ValueError, r"clip must be \(lo, hi\) with lo < hi.*got \(1, 0\)"),
    ({"clip": (0, 0)}, ValueError, r"clip must be"),
    ({"clip": (0, 1, 2)}, ValueError, r"clip must be"),
    ({"clip": 1}, ValueError, r"clip must be"),
    ({"clip": (0, float("inf"))}, ValueError, r"clip must be"),
    ({"clip": (float("nan"), 1)}, ValueError, r"clip must be"),
    ({"clip": "01"}, ValueError, r"clip must be"),
]
BAD_PGD = [
    ({"step_size": 0}, ValueError, r"step_size must be above 0, got 0.0"),
    ({"step_size": -1}, ValueError, r"step_size must be above 0, got -1.0"),
    ({"step_size": float("nan")}, ValueError, r"step_size must be finite, got nan"),
    ({"steps": -1}, ValueError, r"steps must be at least 0, got -1"),
    ({"steps": 2.0}, TypeError, r"steps must be an integer, got float 2.0"),
    ({"steps": True}, TypeError, r"steps must be an integer, got bool True"),
    ({"restarts": 0}, ValueError, r"restarts must be at least 1, got 0"),
    ({"random_start": 1}, TypeError, r"random_start must be True or False, got 1"),
    ({"random_start": False, "restarts": 2}, ValueError, r"2 restarts from the same point"),
    ({"random_start": False, "loss": "kl"}, ValueError, r"zero gradient at the clean"),
]


@pytest.mark.parametrize("make", [FGSM, PGD])
@pytest.mark.parametrize(("settings", "error", "match"), BAD_SETTINGS)
def test_bad_settings_are_refused(make, settings, error, match):
    with pytest.raises(error, match=match):
        make(**settings)


@pytest.mark.parametrize(("settings", "error", "match"), BAD_PGD)
def test_bad_pgd_settings_are_refused(settings, error, match):
    with pytest.raises(error, match=match):
        PGD(**settings)


def test_replace_checks_too():
    with pytest.raises(ValueError, match="eps must not be negative"):
        dataclasses.replace(PGD(), eps=-1)


X, Y = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
Q = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5], [0.6, 0.2, 0.2]])
BAD_INPUTS = {
    "x not a tensor": ([[0.5]], Y, TypeError, r"x must be a tensor of dtype .*, got list"),
    "x integer": (
        (X * 255).byte(),
        Y,
        TypeError,
        r"got a tensor of dtype torch.uint8 and shape \(4, 6\); convert",
    ),
    "x scalar": (torch.tensor(0.5), Y, ValueError, r"x must be a batch"),
    "x normalised": (X * 4 - 2, Y, ValueError, r"x spans \[-.*outside clip=\(0.0, 1.0\).*a layer"),
    "x a little too large": (X + 0.5, Y, ValueError, r"outside clip"),
    "x nan": (X.clone().fill_(torch.nan), Y, ValueError, r"values that are not finite"),
    "y missing": (X, None, ValueError, r"y is None, but this attack needs labels"),
    "y not a tensor": (X, [0, 1, 2, 0], TypeError, r"y must be a tensor of integer .*got list"),
    "y one-hot integers": (
        X,
        torch.eye(3, dtype=torch.long)[Y],
        ValueError,
        r"shape \(4,\), got shape \(4, 3\).*y\.argmax\(1\) or .*y\.float\(\)",
    ),
    "y boolean": (X, Y > 0, TypeError, r"integer class indices, shape \(4,\), or of floating"),
    "y one-hot booleans": (
        X,
        torch.eye(3).bool()[Y],
        TypeError,
        r"got a tensor of dtype torch.bool",
    ),
    "y complex": (X, torch.eye(3)[Y] + 0j, TypeError, r"got a tensor of dtype torch.complex64"),
    "y indices in floats": (
        X,
        Y.float(),
        ValueError,
        r"shape \(4, C\), got shape \(4,\); class indices must be integers, y\.long\(\)",
    ),
    "probabilities of too few": (X, Q[:3], ValueError, r"of the 4 examples.*got shape \(3, 3\)"),
    "probabilities of pixels": (X, Q[:, :, None], ValueError, r"got shape \(4, 3, 1\)"),
    "probabilities elsewhere": (X, Q.to("meta"), ValueError, r"x is on cpu and y on meta"),
    "probabilities nan": (X, Q * torch.nan, ValueError, r"probabilities that are not finite"),
    "probabilities infinite": (X, Q / 0, ValueError, r"probabilities that are not finite"),
    "logits": (X, Q.log(), ValueError, r"probabilities must not be negative, got -1\.6094"),
    "negative, sum 1": (X, Q * 3 - 2 / 3, ValueError, r"must not be negative, got -0\.06"),
    "percentages": (X, Q * 100, ValueError, r"must sum to 1, got a sum of 100; divide"),
    "one row short": (
        X,
        Q * torch.tensor([[1.0], [1.0], [0.99], [1.0]]),
        ValueError,
        r"got a sum of 0\.99",
    ),
    "half a row short": (
        X,
        (Q * torch.tensor([[1.0], [1.0], [0.97], [1.0]])).bfloat16(),
        ValueError,
        r"got a sum of 0\.96875",
    ),
    "no classes": (X, Q[:, :0], ValueError, r"got a sum of 0"),
    "y too short": (
        X,
        Y[:3],
        ValueError,
        r"each of the 4 examples, shape \(4,\), got shape \(3,\)",
    ),
    "y two-dimensional": (X, Y[:, None], ValueError, r"got shape \(4, 1\)"),
    "y elsewhere": (X, Y.to("meta"), ValueError, r"x is on cpu and y on meta"),
    "y negative": (X, Y - 1, ValueError, r"labels must not be negative, got -1"),
}


@pytest.mark.parametrize(("x", "y", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_before_anything_runs(x, y, error, match):
    for attack in (FGSM(), PGD()):
        with pytest.raises(error, match=match):
            attack(lambda x: pytest.fail("called"), x, y)


BAD_MODELS = {
    "not logits": (lambda x: (x,), TypeError, r"must return a floating-point tensor.*got tuple"),
    "labels": (lambda x: x.argmax(1), TypeError, r"got a tensor of dtype torch.int64"),
    "too few dimensions": (lambda x: x.sum(1), ValueError, r"\(4, C\), got shape \(4,\)"),
    "too many dimensions": (lambda x: x[:, :, None], ValueError, r"got shape \(4, 6, 1\)"),
    "another batch": (lambda x: x[:2], ValueError, r"got shape \(2, 6\)"),
    "too few classes": (lambda x: x[:, :2], ValueError, r"label 2 is not among the model's 2 cl"),
    "detached": (lambda x: x.detach(), ValueError, r"do not depend on its input"),
    "deaf": (
        lambda x: nn.Parameter(torch.zeros(4, 3)) * 1,
        ValueError,
        r"do not depend on its input",
    ),
}


@pytest.mark.parametrize(("model", "error", "match"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_refused(model, error, match):
    for attack in (FGSM(), PGD()):
        with pytest.raises(error, match=match):
            attack(model, X, Y)


@pytest.mark.parametrize("y", [Q, torch.eye(4)[Y]], ids=["one more", "one less"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_probabilities_of_other_classes_than_the_model_s(loss, y):
    logits = 4 if y.shape[1] == 3 else 3
    with pytest.raises(
        ValueError, match=f"probabilities of {y.shape[1]} classes, but the model has {logits}"
    ):
        PGD(loss=loss)(lambda x: x[:, :logits], X, y)


@pytest.mark.parametrize("loss", ["cw", "dlr"])
@pytest.mark.parametrize("make", [FGSM, PGD])
def test_margins_need_indices(make, loss):
    match = (
        r"needs class indices.*dtype torch.float32 and shape \(4, 3\).*loss='ce'.*y\.argmax\(1\)"
    )
    with pytest.raises(TypeError, match=match):
        make(loss=loss)(lambda x: pytest.fail("called"), X, Q)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_probabilities_is_no_error(dtype, classes):
    """Mixed twice and smoothed, in a low precision throughout."""
    x = torch.rand(200, classes)
    q = torch.randn(200, classes).mul(3).softmax(1).to(dtype)
    for share in (0.3, 0.77):
        q = torch.lerp(q[torch.randperm(200)], q, share)
    q = 0.9 * q + 0.1 / classes
    assert q.dtype == dtype
    FGSM()(lambda x: x * 2, x, q)


@pytest.mark.parametrize("of_labels", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_attack
def test_certainty_gives_the_same_images_as_indices(attack, dtype, of_labels, cnn, batch):
    # Bit for bit: all that certainty adds to loss and gradient are zeros.
    attack = dataclasses.replace(attack, loss="ce") if attack.loss == "dlr" else attack
    x, y = batch[0].to(dtype), batch[1]
    results = []
    for labels in (y, torch.eye(5, dtype=of_labels)[y]):
        model = copy.deepcopy(cnn).to(dtype)
        torch.manual_seed(0)
        results.append(attack(model, x, labels))
    assert torch.equal(*results)


def mixed(y, share=0.7, classes=5):
    one_hot = torch.eye(classes)[y]
    return share * one_hot + (1 - share) * one_hot.roll(1, 0)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_probabilities_are_left_alone_and_may_come_from_anywhere(loss, cnn, batch):
    x, y = batch[0], mixed(batch[1])
    attack = PGD(steps=3, loss=loss)
    torch.manual_seed(0)
    expected = attack(cnn, x, y)
    before = y.clone()
    with torch.inference_mode():
        inference = y.clone()
    for labels in (inference, y.clone().requires_grad_(), y.t().contiguous().t()):
        torch.manual_seed(0)
        assert torch.equal(attack(cnn, x, labels), expected)
        assert torch.equal(labels, before)
        assert labels.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        other = attack(cnn, x, y)
    assert other.dtype == torch.float32
    assert (other - expected).abs().max() <= 2 * attack.eps + 1e-6
    empty = attack(lambda x: pytest.fail("called"), x[:0], y[:0])
    assert empty.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("y", [Y, Q], ids=["indices", "probabilities"])
@pytest.mark.parametrize("attack", [PGD(steps=2, restarts=2), PGD(loss="kl"), FGSM()])
def test_no_label_is_read_where_that_is_not_free(attack, y):
    # On "meta" there are no values: whoever reads one fails.
    x, y = X.to("meta"), y.to("meta")
    assert attack(lambda x: x[:, :3] * 2, x, y).shape == X.shape


def test_too_few_classes_for_a_loss():
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="3 classes or more, but the model has 2"):
        PGD(loss="dlr")(lambda x: x[:, :2], X, y)
    with pytest.raises(ValueError, match="2 classes or more, but the model has 1"):
        PGD(loss="cw")(lambda x: x[:, :1], X, y)


def test_inputs_at_the_edge_of_a_box_that_float32_cannot_hold_are_inside():
    x = torch.tensor([[0.1, 0.7]])
    out = FGSM(eps=0.5, clip=(0.1, 0.7))(lambda x: x * 3, x, torch.tensor([1]))
    assert bool(((out >= x[0, 0]) & (out <= x[0, 1])).all())


def test_no_box():
    x = torch.tensor([[-40.0, 70.0]])
    out = FGSM(eps=0.5, clip=None)(lambda x: x * 0.01, x, torch.tensor([1]))
    assert out.tolist() == [[-39.5, 69.5]]

"""What every attack promises: checked input, a model left as found, no weight gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from awp_optim._utils.checks import DTYPES
from awp_optim.attacks import APGD, CW, FGSM, NFGSM, PGD, SPSA, Attack, AutoAttack
from awp_optim.attacks.losses import Labels

from .conftest import radius, seeded

# Each with how many forward and backward passes it takes.
ATTACKS = {
    "fgsm": (FGSM(), 1, 1),
    "fgsm-l2": (FGSM(eps=0.5, norm="l2"), 1, 1),
    "nfgsm": (NFGSM(), 1, 1),
    "pgd": (PGD(steps=3), 3, 3),
    "pgd-l2": (PGD(eps=0.5, step_size=0.1, steps=3, norm="l2"), 3, 3),
    "pgd-kl": (PGD(steps=3, loss="kl"), 4, 3),
    "pgd-score": (PGD(steps=2, loss="score", restarts=2), 1 + 4 + 2, 4),
    "pgd-restarts": (PGD(steps=2, restarts=3, loss="dlr"), 9, 6),
    "pgd-train": (PGD(steps=3, model_mode="train"), 3, 3),
    "cw": (CW(steps=3), 3, 3),
    "apgd": (APGD(steps=4), 1 + 5, 4),
    "apgd-l2": (APGD(0.5, 4, "l2", "dlr", restarts=2), 1 + 10, 8),
    "apgd-l1": (APGD(2.0, 6, "l1"), 1 + 9, 6),
    "apgd-t": (APGD(steps=4, loss="dlr-targeted", restarts=2, targets=1), 1 + 10, 8),
    "spsa": (SPSA(steps=2, delta=0.01, samples=3, drop_fooled=False), 5, 0),
    "spsa-l2": (SPSA(0.5, 2, 0.01, samples=3, norm="l2", drop_fooled=False), 5, 0),
}
of_every_attack = pytest.mark.parametrize("name", ATTACKS)
every_attack = pytest.mark.parametrize("attack", [a for a, *_ in ATTACKS.values()], ids=ATTACKS)
PROBABLE = {k: a for k, (a, *_) in ATTACKS.items() if a.labels in (Labels.CLASSES, Labels.OPTIONAL)}


def reach(attack):
    """How far an attack may go: to the end of the ball, or of N-FGSM's noise and step."""
    return attack.eps * (1 + attack.noise) + 1e-7 if isinstance(attack, NFGSM) else attack.eps


def snapshot(model):
    """All of a model that an attack could disturb."""
    state = copy.deepcopy(model.state_dict())
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "grad_ids": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "weights": {k: v.tolist() for k, v in state.items() if "running" not in k},
        "statistics": {k: v.tolist() for k, v in state.items() if "running" in k},
        "parameter_ids": [id(p) for p in model.parameters()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "parameter_hooks": [list(p._backward_hooks or {}) for p in model.parameters()],
    }


def assert_as_found(model, before, attack):
    after = snapshot(model)
    if attack.model_mode == "train":
        for s in (before, after):
            del s["statistics"], s["weights"]["1.num_batches_tracked"]
    assert after == before


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
    assert_as_found(cnn, before, attack)


@of_every_attack
@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_model_is_left_as_found_after_an_exception(name, fails_at, cnn, batch):
    attack, forwards, _ = ATTACKS[name]
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == min(fails_at, forwards):
            raise RuntimeError("out of memory")

    disturb(cnn)[4].register_forward_hook(fail)
    before = snapshot(cnn)
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(cnn, *batch)
    assert_as_found(cnn, before, attack)


class Merging(nn.Module):
    """A layer whose train() changes more than a flag, as LoRA merges its weights for inference."""

    def __init__(self):
        super().__init__()
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        self.merged = not mode
        return self

    def forward(self, x):
        return x


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("attack", [FGSM(), FGSM(model_mode="train")], ids=["eval", "train"])
def test_modes_are_restored_by_the_models_train_method(attack, modes, cnn, batch):
    model = nn.Sequential(Merging(), cnn)
    model.train(modes[0])
    model[0].train(modes[1])
    attack(model, *batch)
    assert [m.training for m in (model, model[0], cnn)] == [modes[0], modes[1], modes[0]]
    assert model[0].merged is not modes[1]


@pytest.mark.parametrize("attack", [SPSA(steps=1, samples=2), PGD(steps=1, loss="kl")])
def test_a_model_that_normalizes_in_place_does_not_change_the_input(attack, cnn, batch):
    x, y = batch
    before = x.clone()
    with contextlib.suppress(RuntimeError):  # an input that is overwritten has no gradient
        attack(lambda z: cnn(z.sub_(0.5)), x, y)
    assert torch.equal(x, before)


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


@of_every_attack
def test_costs_exactly_these_passes_and_no_weight_gradient(name, cnn, batch):
    attack, forwards, backwards = ATTACKS[name]
    calls = []
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        cnn(batch[0])
    cnn.register_forward_hook(lambda *a: calls.append(1))
    for p in cnn.parameters():
        p.register_hook(lambda g: pytest.fail("a weight gradient was accumulated"))
    with FlopCounterMode(display=False) as counted:
        attack(cnn, *batch)
    if isinstance(attack, SPSA):
        passes = 1 + 2 * (2 * 3 + 1)  # 2 steps of 3 samples, several images in a pass
    else:
        assert len(calls) == forwards
        # A backward pass to the input costs as much as a forward pass; to the weights, again so.
        passes = forwards + backwards
    assert counted.get_total_flops() == passes * forward.get_total_flops()


@every_attack
def test_the_result_is_detached_and_the_input_untouched(attack, cnn, batch):
    x, y = batch
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    x_before, y_before = x.detach().clone(), y.clone()
    x_adv = attack(cnn, x, y)
    assert not x_adv.requires_grad
    assert x_adv.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(x.detach(), x_before)
    assert torch.equal(y, y_before)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert x.requires_grad


@every_attack
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(attack, guard, cnn, batch):
    expected = seeded(3, attack, copy.deepcopy(cnn), *batch)
    with guard():
        x_adv = seeded(3, attack, cnn, batch[0].clone(), batch[1].clone())
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (guard is torch.inference_mode)
    assert torch.equal(x_adv, expected)
    assert not x_adv.is_inference()


@every_attack
@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "nan gradient"])
def test_a_model_that_blows_up_leaves_nothing_outside(attack, kind, batch):
    x, y = batch

    def model(x):
        z = x.flatten(1)[:, :5]
        if kind == "nan gradient":
            return (z - z.detach()).abs().sqrt() * 0  # infinite slope times zero
        return z * {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}[kind]

    x_adv = attack(model, x, y)
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert bool((radius(x, x_adv, attack.norm) <= reach(attack) * (1 + 1e-6)).all())
    if isinstance(attack, (FGSM, SPSA)):
        assert torch.equal(x_adv, x)


def test_one_broken_example_leaves_the_others_alone(batch):
    x, y = batch
    w = torch.randn(192, 5)

    def model(x, broken):
        z = x.flatten(1) @ w
        return torch.where(broken[:, None], z * torch.nan, z)

    for norm in ("linf", "l2"):
        attack = FGSM(0.1, norm)
        broken = torch.arange(len(x)) == 2
        x_adv = attack(lambda x, b=broken: model(x, b), x, y)
        expected = attack(lambda x, b=broken & False: model(x, b), x, y)
        assert torch.equal(x_adv[~broken], expected[~broken])
        assert torch.equal(x_adv[broken], x[broken])


@every_attack
def test_nothing_to_do(attack, batch):
    x, y = batch
    out = dataclasses.replace(attack, eps=0)(lambda x: pytest.fail("called"), x, y)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    out = attack(lambda x: pytest.fail("called"), x[:0], y[:0])
    assert out.shape == (0, 3, 8, 8)


@every_attack
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [(0.0, 1.0), (-0.5, 1.5), None])
def test_every_dtype_stays_in_the_ball_and_the_box(attack, dtype, clip, cnn, batch):
    x, y = batch[0].to(dtype), batch[1]
    x_adv = dataclasses.replace(attack, clip=clip)(cnn.to(dtype), x, y)
    assert x_adv.dtype == dtype
    lo, hi = clip or (-torch.inf, torch.inf)
    assert bool(((x_adv >= lo) & (x_adv <= hi)).all())
    size = radius(x, x_adv, attack.norm)
    assert bool((size <= reach(attack) + 1e-15 * (1 + 192 * (attack.norm == "l1"))).all())
    assert bool(size.any())


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
    # Half a unit in the last place is 1/512 here; no element falls short by more than one unit.
    assert (delta - eps * direction).abs().max() <= 1 / 256


@every_attack
@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3, 3, 2)])
def test_any_shape(attack, shape):
    x, y = torch.rand(shape), torch.tensor([0, 1, 2, 0])

    def model(x):
        s = x.unsqueeze(-1).flatten(1).sum(1)
        return torch.stack([s, -s, s.square(), s - 1], dim=1)

    x_adv = attack(model, x, y)
    assert x_adv.shape == shape
    assert not torch.equal(x_adv, x)


@every_attack
def test_the_memory_format_is_kept(attack, cnn64, batch64):
    x, y = batch64
    expected = seeded(3, attack, copy.deepcopy(cnn64), x, y)
    view = torch.rand(12, 3, 8, 8, dtype=torch.float64)[::2].transpose(2, 3)
    assert attack(cnn64, view, y).shape == view.shape

    def model(z):
        assert z.is_contiguous(memory_format=torch.channels_last)
        return cnn64(z)

    x_adv = seeded(3, attack, model, x.to(memory_format=torch.channels_last), y)
    assert x_adv.is_contiguous(memory_format=torch.channels_last)
    if isinstance(attack, (FGSM, SPSA)):  # random starts are drawn in the order of the memory
        torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)


@every_attack
def test_frozen_models_can_be_attacked(attack, cnn, batch):
    cnn.requires_grad_(False)
    assert not torch.equal(attack(cnn, *batch), batch[0])


@every_attack
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integer_labels(attack, dtype, cnn, batch):
    x, y = batch
    expected = seeded(3, attack, copy.deepcopy(cnn), x, y)
    assert torch.equal(seeded(3, attack, cnn, x, y.to(dtype)), expected)


@every_attack
def test_the_surrounding_autocast_applies_and_survives(attack, cnn, batch):
    x, y = batch
    cnn.train()
    seen, cached = [], []

    def record(module, args, output):
        seen.append(output.dtype)
        cached.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))

    handle = cnn.register_forward_hook(record)
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


@every_attack
def test_any_callable_is_a_model(attack, cnn, batch):
    attack = dataclasses.replace(attack, model_mode="eval")
    expected = seeded(3, attack, cnn, *batch)
    assert torch.equal(seeded(3, attack, lambda x: cnn(x), *batch), expected)


@every_attack
def test_no_value_is_read_where_that_is_not_free(attack):
    # On "meta" there are no values: reading one fails.
    x = torch.rand(4, 12, device="meta")
    y = torch.zeros(4, dtype=torch.long, device="meta")
    assert attack(lambda z: z[:, :5] * 2, x, y).shape == x.shape
    if attack.labels in (Labels.CLASSES, Labels.OPTIONAL):
        q = torch.rand(4, 5, device="meta")
        assert attack(lambda z: z[:, :5] * 2, x, q).shape == x.shape


@every_attack
def test_an_attack_is_a_value(attack):
    assert isinstance(attack, Attack)
    assert pickle.loads(pickle.dumps(attack)) == attack == copy.deepcopy(attack)
    assert dataclasses.replace(attack, eps=0.125) != attack
    assert hash(dataclasses.replace(attack)) == hash(attack)
    assert "eps=" in repr(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.eps = 1.0
    assert attack.uses_gradients == (not isinstance(attack, SPSA))


COMMON = {"clip": (0, 1), "model_mode": "eval"}
SIGNATURES = {
    FGSM: {"eps": 8 / 255, "norm": "linf", "loss": "ce", **COMMON},
    PGD: {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "norm": "linf", "loss": "ce"}
    | {"random_start": True, "restarts": 1, **COMMON, "start_std": None},
    CW: {"eps": 8 / 255, "step_size": None, "steps": 100, "norm": "linf"}
    | {"random_start": True, "restarts": 1, **COMMON},
    SPSA: {"eps": 8 / 255, "steps": 100, "delta": 0.001, "lr": 0.01, "samples": 256}
    | {"norm": "linf", "loss": "cw", **COMMON, "batch_size": None, "drop_fooled": True},
}


@pytest.mark.parametrize("attack", SIGNATURES)
def test_the_arguments_in_their_order(attack):
    parameters = inspect.signature(attack).parameters
    assert [(k, p.default) for k, p in parameters.items()] == list(SIGNATURES[attack].items())


def test_settings_are_normalized():
    attack = PGD(eps=np.float32(0.5), steps=np.int64(3), clip=[0, 1])
    assert (attack.eps, attack.steps, attack.clip) == (0.5, 3, (0.0, 1.0))
    assert hash(attack) == hash(PGD(eps=0.5, steps=3))
    assert PGD(clip=(0, 1)) == PGD()


every_class = pytest.mark.parametrize("make", [FGSM, PGD, CW, SPSA, APGD, AutoAttack])
BAD_SETTINGS = [
    *(("eps", eps, ValueError) for eps in (-0.1, torch.nan, torch.inf)),
    *(("eps", eps, TypeError) for eps in ("8/255", True)),
    ("norm", "linfinity", ValueError),
    ("model_mode", "test", ValueError),
    *(
        ("clip", clip, ValueError)
        for clip in [(1, 0), (0, 0), (0, 1, 2), 1, (0, torch.inf), (torch.nan, 1), "01"]
    ),
]


@every_class
def test_bad_settings_are_refused(make):
    for name, value, error in BAD_SETTINGS:
        with pytest.raises(error, match=name):
            make(**{name: value})
    with pytest.raises(ValueError, match="eps"):
        dataclasses.replace(make(), eps=-1)
    if make is not AutoAttack:
        with pytest.raises((ValueError, TypeError), match="loss"):
            make(loss="mse")


@every_class
def test_an_eps_wider_than_the_box_is_refused_with_its_likely_meaning(make):
    with pytest.raises(ValueError, match=r"width of the box.*8/255"):
        make(eps=8)
    assert make(eps=1).eps == 1
    assert make(eps=8, norm="l2").eps == 8
    if make is not AutoAttack:
        assert make(eps=8, clip=(0, 255)).eps == make(eps=8, clip=None).eps == 8


@every_class
def test_a_class_used_as_an_attack_is_refused_with_the_way_out(make, cnn, batch):
    with pytest.raises(TypeError, match=rf"{make.__name__}\(eps=...\)\(model, x, y\)"):
        make(cnn, *batch)


X, Y = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
Q = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5], [0.6, 0.2, 0.2]])


def short(share):
    """Probabilities of which one row does not sum to 1."""
    return Q * torch.tensor([[1.0], [1.0], [share], [1.0]])


EYE, IS_0 = torch.eye(3), Y == 0
BAD_INPUTS = {
    "x not a tensor": ([[0.5]], Y, TypeError, r"x must be a tensor of dtype .*, got list"),
    "x integer": ((X * 255).byte(), Y, TypeError, r"torch.uint8 and shape \(4, 6\); convert"),
    "x scalar": (torch.tensor(0.5), Y, ValueError, r"x must be a batch"),
    "x normalized": (X * 4 - 2, Y, ValueError, r"x spans \[-.*outside clip=\(0.0, 1.0\).*a layer"),
    "x a little too large": (X + 0.5, Y, ValueError, "outside clip"),
    "x nan": (X.clone().fill_(torch.nan), Y, ValueError, "not finite"),
    "y missing": (X, None, ValueError, "y is None"),
    "y not a tensor": (X, [0, 1, 2, 0], TypeError, "y must be a tensor of integer .*got list"),
    "y one-hot integers": (X, EYE.long()[Y], ValueError, r"y\.argmax\(1\) or .*y\.float\(\)"),
    "y boolean": (X, IS_0, TypeError, "integer class indices"),
    "y one-hot booleans": (X, EYE.bool()[Y], TypeError, "got a tensor of dtype torch.bool"),
    "y complex": (X, EYE[Y] + 0j, TypeError, "got a tensor of dtype torch.complex64"),
    "y indices in floats": (X, Y.float(), ValueError, r"shape \(4, C\), .* y\.long\(\)"),
    "y too short": (X, Y[:3], ValueError, r"shape \(4,\), got shape \(3,\)"),
    "y two-dimensional": (X, Y[:, None], ValueError, r"got shape \(4, 1\)"),
    "y elsewhere": (X, Y.to("meta"), ValueError, "x is on cpu and y on meta"),
    "y negative": (X, Y - 1, ValueError, "negative, got -1"),
    "probabilities of too few": (X, Q[:3], ValueError, r"4 examples.*got shape \(3, 3\)"),
    "probabilities of pixels": (X, Q[:, :, None], ValueError, r"got shape \(4, 3, 1\)"),
    "probabilities elsewhere": (X, Q.to("meta"), ValueError, "x is on cpu and y on meta"),
    "probabilities nan": (X, Q * torch.nan, ValueError, "not finite"),
    "probabilities infinite": (X, Q / 0, ValueError, "not finite"),
    "logits": (X, Q.log(), ValueError, r"negative, got -1\.6094"),
    "negative, sum 1": (X, Q * 3 - 2 / 3, ValueError, r"negative, got -0\.06"),
    "percentages": (X, Q * 100, ValueError, "must sum to 1, got a sum of 100; divide"),
    "a short row": (X, short(0.99), ValueError, r"got a sum of 0\.99"),
    "a short row in half": (X, short(0.97).bfloat16(), ValueError, r"got a sum of 0\.96875"),
    "no classes": (X, Q[:, :0], ValueError, "got a sum of 0"),
}


@pytest.mark.parametrize(("x", "y", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_before_anything_runs(x, y, error, match):
    for attack in (FGSM(), PGD(), SPSA(loss="ce")):
        with pytest.raises(error, match=match):
            attack(lambda x: pytest.fail("called"), x, y)


BAD_MODELS = {
    "not logits": (lambda x: (x,), TypeError, "must return a floating-point tensor.*got tuple"),
    "labels": (lambda x: x.argmax(1), TypeError, "got a tensor of dtype torch.int64"),
    "too few dimensions": (lambda x: x.sum(1), ValueError, r"\(4, C\), got shape \(4,\)"),
    "too many dimensions": (lambda x: x[:, :, None], ValueError, r"got shape \(4, 6, 1\)"),
    "another batch": (lambda x: x[:2], ValueError, r"got shape \(2, 6\)"),
    "too few classes": (lambda x: x[:, :2], ValueError, "label 2 is not among the model's 2 cl"),
    "detached": (lambda x: x.detach(), ValueError, "do not depend on its input"),
    "deaf": (lambda x: nn.Parameter(torch.zeros(4, 3)) * 1, ValueError, "do not depend on its"),
    "reentrant checkpoint": (
        lambda x: checkpoint(lambda z: z * 2, x, use_reentrant=True),
        RuntimeError,
        "set use_reentrant=False",
    ),
}


@pytest.mark.parametrize(("model", "error", "match"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_refused(model, error, match):
    for attack in (FGSM(), PGD(), APGD(loss="cw")):
        with pytest.raises(error, match=match):
            attack(model, X, Y)


def test_a_checkpoint_that_is_not_reentrant_is_no_obstacle(cnn, batch):
    def model(x):
        return checkpoint(cnn, x, use_reentrant=False)

    torch.testing.assert_close(seeded(3, PGD(), model, *batch), seeded(3, PGD(), cnn, *batch))


@pytest.mark.parametrize("y", [Q, torch.eye(4)[Y]], ids=["one more", "one less"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_probabilities_of_other_classes_than_the_model_s(loss, y):
    logits = 4 if y.shape[1] == 3 else 3
    with pytest.raises(ValueError, match=f"of {y.shape[1]} classes, but the model has {logits}"):
        PGD(loss=loss)(lambda x: x[:, :logits], X, y)


@pytest.mark.parametrize("loss", ["cw", "dlr"])
@pytest.mark.parametrize("make", [FGSM, PGD, SPSA, APGD])
def test_margins_need_indices(make, loss):
    with pytest.raises(TypeError, match=r"needs class indices.*\(4, 3\).*loss='ce'.*argmax"):
        make(loss=loss)(lambda x: pytest.fail("called"), X, Q)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_probabilities_is_no_error(dtype, classes):
    """Mixed twice and smoothed, in a low precision throughout."""
    x = torch.rand(200, classes)
    q = torch.randn(200, classes).mul(3).softmax(1).to(dtype)
    for share in (0.3, 0.77):
        q = torch.lerp(q[torch.randperm(200)], q, share)
    q = 0.9 * q + 0.1 / classes
    assert q.dtype == dtype
    FGSM()(lambda x: x * 2, x, q)


@pytest.mark.parametrize("labels_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", PROBABLE.values(), ids=PROBABLE)
def test_certainty_gives_the_same_images_as_indices(attack, dtype, labels_dtype, cnn, batch):
    # Bit for bit: all that certainty adds to loss and gradient are zeros.
    x, y = batch[0].to(dtype), batch[1]
    results = [
        seeded(3, attack, copy.deepcopy(cnn).to(dtype), x, labels)
        for labels in (y, torch.eye(5, dtype=labels_dtype)[y])
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_probabilities_are_left_alone_and_may_come_from_anywhere(loss, cnn, batch):
    one_hot = torch.eye(5)[batch[1]]
    x, y = batch[0], 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
    attack = PGD(steps=3, loss=loss)
    expected = seeded(3, attack, cnn, x, y)
    before = y.clone()
    with torch.inference_mode():
        inference = y.clone()
    for labels in (inference, y.clone().requires_grad_(), y.t().contiguous().t()):
        assert torch.equal(seeded(3, attack, cnn, x, labels), expected)
        assert torch.equal(labels, before)
        assert labels.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = seeded(3, attack, cnn, x, y)
    assert other.dtype == torch.float32
    assert (other - expected).abs().max() <= 2 * attack.eps + 1e-6


FEW_CLASSES = [
    *((make(loss="cw"), 1, 2) for make in (FGSM, PGD, SPSA, APGD)),
    *((make(loss="dlr"), 2, 3) for make in (FGSM, PGD, SPSA, APGD)),
    *((APGD(loss="dlr-targeted"), classes, 4) for classes in (1, 3)),
    (APGD(loss="dlr", drop_fooled=True), 2, 3),
    (CW(), 1, 2),
]


@pytest.mark.parametrize(("attack", "classes", "least"), FEW_CLASSES)
def test_too_few_classes_for_a_loss(attack, classes, least):
    y = torch.zeros(4, dtype=torch.long)
    # Whether the last class is the largest or not: whether all examples are fooled already.
    for model in (lambda x: x[:, :classes], lambda x: x[:, :classes] + 9 * torch.arange(classes)):
        with pytest.raises(
            ValueError, match=f"{least} classes or more, but the model has {classes}"
        ):
            attack(model, X, y)


def test_inputs_at_the_edge_of_a_box_that_float32_cannot_hold_are_inside():
    x = torch.tensor([[0.1, 0.7]])
    out = FGSM(eps=0.5, clip=(0.1, 0.7))(lambda x: x * 3, x, torch.tensor([1]))
    assert bool(((out >= x[0, 0]) & (out <= x[0, 1])).all())

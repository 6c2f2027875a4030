"""AutoAttack behind our interface: its reference's verdicts, and none of its side effects."""

from __future__ import annotations

import builtins
import logging
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from awp_optim.attacks import AutoAttack, AutoAttackWarning
from awp_optim.attacks._autoattack_reference import NORMS
from awp_optim.attacks.autoattack import VERSIONS
from awp_optim.evaluation import evaluate

from .conftest import radius, wrong

pyautoattack = pytest.importorskip("pyautoattack")

EPS = {"linf": 0.012, "l2": 0.1, "l1": 0.5}
# Tests' networks are small enough for a part to be honest and still give odd gradients.
pytestmark = pytest.mark.filterwarnings("ignore::awp_optim.attacks.AutoAttackWarning")


@pytest.fixture
def fewer_steps(monkeypatch) -> None:
    """The reference with a fraction of its steps, on both sides of a comparison."""
    build = pyautoattack.AutoAttack.__init__

    def patched(self, *args, **settings):
        build(self, *args, **settings)
        self.square.n_queries, self.fab.n_iter = 50, 10
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = 20
            apgd.eot_iter = min(apgd.eot_iter, 3)

    monkeypatch.setattr(pyautoattack.AutoAttack, "__init__", patched)


def by_the_reference(model, x: Tensor, y: Tensor, norm: str, eps: float, **settings) -> Tensor:
    attack = pyautoattack.AutoAttack(model, norm=NORMS[norm], eps=eps, seed=5, **settings)
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = 4  # of five
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return attack.run_standard_evaluation(x, y, batch_size=len(x))[0].detach()


@pytest.mark.parametrize(
    ("norm", "version"),
    [("linf", "standard"), ("l2", "standard"), ("l1", "standard"), ("linf", "rand")],
)
def test_equals_its_reference(norm, version, solid, fewer_steps):
    model, x, y = solid(12)
    eps = EPS[norm] / 2
    theirs = by_the_reference(model, x, y, norm, eps, version=version)
    ours = AutoAttack(eps, norm, version, seed=5)(model, x, y)
    fooled = wrong(model, theirs, y)
    assert 0.1 < fooled.float().mean() < 0.9
    assert torch.equal(wrong(model, ours, y), fooled)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attacks", [("fab",), ("apgd-dlr", "fab-t"), ("fab-t", "apgd-ce")])
def test_custom_equals_its_reference(attacks, solid, fewer_steps):
    model, x, y = solid(10)
    theirs = by_the_reference(model, x, y, "linf", 0.006, version="custom", attacks=list(attacks))
    ours = AutoAttack(0.006, "linf", "custom", attacks, seed=5)(model, x, y)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert wrong(model, ours, y).any()


@pytest.mark.parametrize("norm", EPS)
def test_the_native_parts_fool_the_same(norm, solid):
    model, x, y = solid()
    attacks = ("apgd-ce", "apgd-t")
    verdicts = [
        wrong(model, AutoAttack(EPS[norm], norm, "custom", attacks, backend)(model, x, y), y)
        for backend in ("reference", "native")
    ]
    assert 0.2 < verdicts[0].float().mean() < 0.95
    assert (verdicts[0] != verdicts[1]).sum() <= 1


def test_the_versions_are_those_of_the_reference():
    for version, names in VERSIONS.items():
        reference = pyautoattack.AutoAttack(lambda x: x, eps=0.1, version=version)
        assert tuple(reference.attacks_to_run) == names
        parts = AutoAttack(version=version).parts()
        assert tuple(parts) == names
        assert all(part.uses_gradients == (name != "square") for name, part in parts.items())


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stays_in_ball_and_box(norm, dtype, solid, fewer_steps):
    model, x, y = solid(8)
    x = x.to(dtype)
    x_adv = AutoAttack(EPS[norm], norm)(model.to(dtype), x, y)
    assert (x_adv.dtype, x_adv.shape) == (dtype, x.shape)
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert (radius(x, x_adv, norm) <= EPS[norm] * (1 + 1e-6)).all()


def test_leaves_everything_as_it_was_and_prints_nothing(solid, fewer_steps, capfd):
    model, x, y = solid(6)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logger = logging.getLogger("auto-attack")
    log = logger.level, logger.propagate, list(logger.handlers)
    torch.manual_seed(1)
    trace = sys.gettrace()
    own = lambda *a: None  # noqa: E731
    sys.settrace(own)
    try:
        AutoAttack(0.01)(model, x, y)
        assert sys.gettrace() is own
    finally:
        sys.settrace(trace)
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(2))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and (p.grad == 1).all() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (logger.level, logger.propagate, list(logger.handlers)) == log
    assert capfd.readouterr() == ("", "")


def test_warnings_are_pythons_and_belong_to_one_model(solid, fewer_steps):
    model, x, y = solid(6)
    attack = AutoAttack(0.01, version="custom", attacks=("apgd-ce",))

    def grad(z: Tensor) -> Tensor:
        return z

    for defended, match in [
        (lambda z: model(z + 0.1 * torch.randn_like(z)), "randomized defense.*github.com"),
        (lambda z: model(z).softmax(1), "probability distribution"),
        (lambda z: model(grad(z)), "dynamic defense"),
    ]:
        with pytest.warns(AutoAttackWarning, match=match):
            attack(defended, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(model, x, y)


def test_one_evaluation_records_the_parts(solid, fewer_steps):
    model, x, y = solid()
    attack = AutoAttack(0.006, seed=5)
    r = evaluate(model, (x, y), {"aa": attack}, checks=False, seed=None)
    assert list(r.records) == [*(f"aa/{name}" for name in VERSIONS["standard"]), "aa"]
    fooled = wrong(model, attack(model, x, y), y)
    assert r.robust["aa"] == pytest.approx(1 - fooled.double().mean().item(), abs=1e-9)
    assert (
        r.records["aa/apgd-t"].attacked
        == ~(wrong(model, x, y).numpy() | r.records["aa/apgd-ce"].fooled)
    ).all()
    assert set(r.broken_by) <= {"", "natural", *r.records}


class TestOddModels:
    def linear(self, classes: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))

    @pytest.mark.parametrize(
        ("classes", "left_out"), [(2, {"apgd-dlr", "apgd-t"}), (3, {"apgd-t"}), (4, set())]
    )
    def test_few_classes(self, classes, left_out, fewer_steps):
        model, x = self.linear(classes), torch.rand(5, 3, 4, 4)
        y = model(x).argmax(1)
        for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t"):
            attack = AutoAttack(0.5, version="custom", attacks=(name,))
            if name in left_out:
                with pytest.warns(AutoAttackWarning, match=f"{name} is left out"):
                    assert torch.equal(attack(model, x, y), x)
            else:
                assert wrong(model, attack(model, x, y), y).all()

    def test_one_class(self):
        with pytest.raises(ValueError, match="2 classes or more"):
            AutoAttack()(self.linear(1), torch.rand(2, 3, 4, 4), torch.zeros(2).long())

    @pytest.mark.parametrize("shape", [(48,), (6, 8), (2, 2, 3, 4)])
    def test_inputs_that_are_no_images(self, shape, fewer_steps):
        model, x = self.linear(5), torch.rand(5, *shape)
        y = model(x).argmax(1)
        x_adv = AutoAttack(0.4)(model, x, y)
        assert x_adv.shape == x.shape
        assert wrong(model, x_adv, y).all()
        if len(shape) != 2:
            with pytest.warns(AutoAttackWarning, match="square is left out"):
                AutoAttack(0.4, version="custom", attacks=("square",))(model, x, y)

    @pytest.mark.parametrize("norm", EPS)
    def test_channels_last_is_attacked_alike(self, norm, solid, fewer_steps):
        model, x, y = solid(6)
        model, x = model.double(), x.double()  # many steps magnify how a convolution rounds
        for name in ("apgd-ce", "apgd-dlr", "fab-t", "square"):
            attack = AutoAttack(EPS[norm], norm, "custom", (name,))
            plain = attack(model, x, y)
            laid_out = x.contiguous(memory_format=torch.channels_last)
            turned = attack(model.to(memory_format=torch.channels_last), laid_out, y)
            assert turned.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(turned, plain, atol=1e-8, rtol=0)
            model.to(memory_format=torch.contiguous_format)

    @pytest.mark.parametrize("name", ["apgd-t", "fab", "fab-t"])
    def test_a_functions_weights_get_no_gradients(self, name, solid, fewer_steps):
        model, x, y = solid(4)
        AutoAttack(0.01, version="custom", attacks=(name,))(lambda z: model(z), x, y)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("name", ["apgd-ce", "fab", "fab-t", "square"])
    def test_logits_that_are_a_view_of_the_input(self, name):
        """Exactly the margins below 2 * eps fall; the package writes to logits it was given."""
        g = torch.Generator().manual_seed(3)
        x = 0.2 + 0.6 * torch.rand(12, 5, 1, 1, generator=g)
        first, second = x.flatten(1).topk(2).values.T
        y = x.flatten(1).argmax(1)
        x_adv = AutoAttack(0.05, version="custom", attacks=(name,))(lambda z: z.flatten(1), x, y)
        assert torch.equal(x_adv.flatten(1).argmax(1) != y, first - second < 0.1)

    @pytest.mark.parametrize("size", [(3, 3), (4, 4), (12, 12), (14, 14), (12, 8), (8, 12)])
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_square_on_images_of_any_size(self, norm, size, fewer_steps):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), torch.rand(4, 3, *size)
        y = model(x).argmax(1)
        x_adv = AutoAttack(5.0, norm, "custom", ("square",))(model, x, y)
        assert x_adv.shape == x.shape
        assert (radius(x, x_adv, norm) <= 5 * (1 + 1e-6)).all()
        assert wrong(model, x_adv, y).any()

    def test_batchnorm_in_train_mode(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
        x = torch.rand(6, 3, 4, 4)
        attack = AutoAttack(0.01, version="custom", attacks=("apgd-ce",), model_mode="train")
        assert attack(model, x, model(x).argmax(1)).isfinite().all()

    @pytest.mark.parametrize("norm", EPS)
    def test_nan_at_some_points(self, norm, solid, fewer_steps):
        model, x, _ = solid(12)
        x[:, 0, 0, 0] = 0.501  # a step away from where the model says nothing
        y = model(x).argmax(1)

        def torn(z: Tensor) -> Tensor:
            logits = model(z)
            return torch.where(z.flatten(1)[:, :1] > 0.5, logits, logits * torch.nan)

        for name in ("apgd-ce", "apgd-t"):
            x_adv = AutoAttack(EPS[norm], norm, "custom", (name,))(torn, x, y)
            assert x_adv.isfinite().all()

    def test_no_gradient_to_climb(self, solid):
        model, x, y = solid(4)
        attack = AutoAttack(0.01, version="custom", attacks=("apgd-ce",))
        with pytest.raises(ValueError, match="no gradient to climb"):
            attack(lambda z: model(z.detach()).detach(), x, y)

    def test_none_or_one_left(self, solid):
        model, x, y = solid(6)
        attack = AutoAttack(0.01, version="custom", attacks=("apgd-ce", "fab-t"))
        assert torch.equal(attack(model, x, (model(x).argmax(1) + 1) % 5), x)
        assert attack(model, x[:1], y[:1]).shape == x[:1].shape
        assert attack(model, x[:0], y[:0]).shape == x[:0].shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "Linf"}, "norm"),
        ({"version": "fast"}, "version"),
        ({"version": "custom"}, "attacks"),
        ({"version": "custom", "attacks": "square"}, "attacks"),
        ({"version": "custom", "attacks": ("pgd",)}, "attacks"),
        ({"version": "custom", "attacks": ("fab", "fab")}, "differ"),
        ({"attacks": ("fab",)}, "version='custom'"),
        ({"backend": "fast"}, "backend"),
        ({"backend": "native", "version": "rand"}, "averages"),
        ({"clip": (0, 255)}, r"\[0, 1\]"),
        ({"clip": None}, r"\[0, 1\]"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        AutoAttack(**settings)


def test_without_the_package(monkeypatch, solid):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pyautoattack":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'awp_optim\[eval\]'"):
        AutoAttack(0.01)(*solid(4))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("version", ["standard", "plus", "custom"])
def test_native_parts_have_the_references_settings(norm, version):
    names = ["apgd-ce", "apgd-dlr", "apgd-t"] if version == "custom" else None
    reference = pyautoattack.AutoAttack(
        lambda x: x, norm=NORMS[norm], eps=0.1, version=version, attacks=names
    )
    attack = AutoAttack(0.1, norm, version, names and tuple(names), "native")
    for name, part in attack.parts().items():
        if name.startswith("apgd"):
            theirs = reference.apgd_targeted if name == "apgd-t" else reference.apgd
            ours = part.native()
            assert (ours.steps, ours.restarts, ours.rho) == (
                theirs.n_iter, theirs.n_restarts, theirs.thr_decr,
            )  # fmt: skip
            if name == "apgd-t":
                assert ours.targets == theirs.n_target_classes

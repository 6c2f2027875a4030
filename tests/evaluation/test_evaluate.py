"""Accuracies under attack against loops of their own, and every way an evaluation can go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim.attacks import FGSM, NFGSM, PGD, AutoAttack, Captured
from awp_optim.attacks.base import Attack
from awp_optim.evaluation import EvaluationWarning, evaluate

N = 60
pytestmark = [
    pytest.mark.filterwarnings("ignore::awp_optim.evaluation.EvaluationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
ATTACKS = {
    "fgsm": FGSM(eps=0.04),
    "pgd": PGD(eps=0.06, step_size=0.02, steps=5),
    "l2": PGD(eps=0.1, step_size=0.03, steps=5, norm="l2", restarts=2),
}
STEADY = PGD(0.06, 0.02, 5, random_start=False)


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(),
            nn.Linear(16, classes, bias=False),
        ).eval()  # fmt: skip
        nn.init.normal_(model[1].weight)
        model[1].bias.data = -model[1].weight.sum(1) / 2  # gray is in the middle
        return model


def images(n: int = N) -> tuple[Tensor, Tensor]:
    """Images of which the network gets about three in four right."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 2, 2, generator=g)
    with torch.no_grad():
        y = network()(x).argmax(1)
    wrong = torch.rand(n, generator=g) < 0.25
    return x, torch.where(wrong, (y + 1) % 4, y)


def relabeled() -> tuple[Tensor, Tensor]:
    """The same with another label in the second batch of 16."""
    x, y = images()
    y[20] = (y[20] + 1) % 4
    return x, y


def two_classes(z: Tensor) -> Tensor:
    """Class 0 where the first pixel is positive."""
    z = z.flatten(1)[:, 0]
    return torch.stack([z, -z], 1)


class Scaled(nn.Sequential):
    """A network whose logits are multiplied by an attribute."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def scaled(factor: float) -> Scaled:
    model = Scaled(*network())
    model.factor = factor
    return model


def local_class() -> nn.Module:
    """Its class has the name of any other that this function may make."""

    class Local(Scaled):
        pass

    return Local(*network()[:-1], nn.Linear(16, 2))


def run(model, data, attacks=ATTACKS, **settings):
    return evaluate(model, data, attacks, **{"checks": False, "progress": False, **settings})


def assert_same(a, b) -> None:
    assert (a.natural, a.robust, a.worst_case, a.n) == (b.natural, b.robust, b.worst_case, b.n)
    assert a.broken_by.tolist() == b.broken_by.tolist()
    assert a.warnings == b.warnings
    assert list(a.records) == list(b.records)
    for name, record in a.records.items():
        for what in ("attacked", "fooled", "prediction", "loss"):
            np.testing.assert_array_equal(getattr(record, what), getattr(b.records[name], what))
        assert record.passes == b.records[name].passes


def differ(a, b) -> bool:
    return bool((np.nan_to_num(a.loss) != np.nan_to_num(b.loss)).any())


class TestAccuracies:
    def test_equal_a_plain_loop(self):
        model, (x, y) = network(), images()
        attacks = {"fgsm": FGSM(eps=0.03), "brighter": lambda m, x, y: (x + 0.2).clamp(0, 1)}
        r = run(model, (x, y), attacks)
        right = model(x).argmax(1) == y
        assert 0.5 < r.natural < 0.9
        assert r.natural == pytest.approx(right.double().mean().item(), abs=1e-12)
        stood, first = right.clone(), np.where(right.numpy(), "", "natural").astype(object)
        for name, attack in attacks.items():
            logits = model(attack(model, x, y)).detach()
            fooled = right & (logits.argmax(1) != y)
            assert 0 < fooled.sum() < right.sum()
            assert r.robust[name] == (right & ~fooled).double().mean().item()
            record = r.records[name]
            assert (record.attacked == right.numpy()).all()
            assert (record.fooled == fooled.numpy()).all()
            loss = F.cross_entropy(logits, y, reduction="none").numpy()
            np.testing.assert_allclose(record.loss[right], loss[right], rtol=1e-5)
            assert np.isnan(record.loss[~right]).all()
            assert (record.prediction[right] == logits.argmax(1).numpy()[right]).all()
            assert (record.prediction[~right] == -1).all()
            first[fooled.numpy() & (first == "")] = name
            stood &= ~fooled
        assert r.worst_case == stood.double().mean().item() < min(r.robust.values())
        assert r.broken_by.tolist() == first.tolist()
        assert r.broken_by.dtype.kind == "U"
        assert (r.labels == y.numpy()).all()
        assert (r.predictions == model(x).argmax(1).numpy()).all()
        none = run(model, (x, y), {})
        assert (none.robust, none.worst_case) == ({}, none.natural)

    @pytest.mark.parametrize("eps", [0.01, 0.05, 0.2])
    def test_a_linear_classifier_falls_where_its_margin_is_short(self, eps):
        """Under L_inf the margin of w.x falls by eps |w|_1, and no further."""
        g = torch.Generator().manual_seed(0)
        w = torch.randn(6, generator=g, dtype=torch.float64)
        x = torch.rand(500, 6, generator=g, dtype=torch.float64) * 0.5 + 0.25
        score = (x - 0.5) @ w

        def model(z: Tensor) -> Tensor:
            z = (z - 0.5) @ w
            return torch.stack([-z, z], 1) / 2

        stands = (score.abs() > eps * w.abs().sum()).double().mean().item()
        r = run(model, (x, (score > 0).long()), {"fgsm": FGSM(eps), "pgd": PGD(eps, eps / 2, 5)})
        assert (r.natural, r.worst_case) == (1, stands)
        assert r.robust == {"fgsm": stands, "pgd": stands}

    def test_skipping_broken_examples_keeps_the_worst_case_and_saves_passes(self):
        model, data = network(), images()
        every = run(model, data, seed=3)
        fewer = run(model, data, seed=3, skip_broken=True)
        assert fewer.worst_case == pytest.approx(every.worst_case, abs=2 / N)
        accuracies = list(fewer.robust.values())
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[-1] == fewer.worst_case
        broken = np.zeros(N, dtype=bool)
        for name, record in fewer.records.items():
            assert not (record.attacked & broken).any()
            broken |= record.fooled
            assert record.attacked.sum() <= every.records[name].attacked.sum()
        assert fewer.records["l2"].attacked.sum() < every.records["l2"].attacked.sum()

    def test_forward_passes_are_counted(self):
        pgd = {loss: PGD(0.05, 0.01, 7, loss=loss) for loss in ("ce", "kl")}
        r = run(network(), images(), {"fgsm": FGSM(0.04), **pgd}, batch_size=7)
        passes = {name: record.passes for name, record in r.records.items()}
        assert passes == {"fgsm": 1, "ce": 7, "kl": 8}
        assert all(record.seconds > 0 for record in r.records.values())

    @pytest.mark.parametrize(
        ("right", "n", "lo", "hi"),
        [  # Agresti & Coull (1998), and R's binconf
            (50, 100, 0.40383, 0.59617),
            (0, 10, 0.0, 0.27753),
            (10, 10, 0.72247, 1.0),
            (8, 10, 0.49016, 0.94332),
        ],
    )
    def test_the_interval_is_wilsons(self, right, n, lo, hi):
        x = (torch.arange(n) < right).float() * 2 - 1
        r = run(two_classes, (x[:, None], torch.zeros(n).long()), {})
        assert r.interval("natural") == pytest.approx((lo, hi), abs=1e-5)
        assert r.interval("worst_case") == r.interval("natural")
        with pytest.raises(ValueError, match="level"):
            r.interval("natural", 1.0)
        with pytest.raises(KeyError, match="no accuracy 'pgd'"):
            r.interval("pgd")

    def test_to_dict_is_json(self):
        r = run(network(), images())
        d = json.loads(json.dumps(r.to_dict()))
        assert d["robust"] == r.robust
        assert d["intervals"]["pgd"] == list(r.interval("pgd"))
        assert sum(d["broken_first_by"].values()) == round((1 - r.worst_case) * N)


class TestData:
    @pytest.mark.parametrize("batch_size", [1, 7, 60, 1000])
    def test_how_it_is_held_and_cut_does_not_matter(self, batch_size):
        model, (x, y) = network(), images()
        attacks = {"fgsm": FGSM(eps=0.04), "pgd": STEADY}
        expected = run(model, (x, y), attacks)
        loader = DataLoader(TensorDataset(x, y), batch_size=9)
        pair = x.numpy(), y.numpy()
        forms = ((x, y), [(x, y)], loader, iter(loader), loader.dataset, pair, [pair])
        for data in forms:
            got = run(model, data, attacks, batch_size=batch_size)
            assert got.broken_by.tolist() == expected.broken_by.tolist()
            assert got.robust == expected.robust

    def test_memory_is_bounded_by_the_batch_size(self):
        model, sizes = network(), []
        model.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
        x, y = images(500)
        assert run(model, zip(x.split(50), y.split(50)), batch_size=8).n == 500
        assert max(sizes) == 8

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    def test_labels_of_any_integer_dtype_and_empty_batches(self, dtype):
        x, y = images()
        expected = run(network(), (x, y)).robust
        data = [(x[:0], y[:0]), (x, y.to(dtype)), (x[:0], y[:0])]
        assert run(network(), [(x, y)]).robust == expected
        assert run(network(), data, {"fgsm": FGSM(0.04)}).robust["fgsm"] == expected["fgsm"]

    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            ([], ValueError, "no data"),
            ([torch.rand(3, 12)], TypeError, "batches"),
            ((torch.randint(255, (3, 12)), torch.zeros(3).long()), TypeError, "/ 255"),
            ((np.ones((3, 12), np.uint8), np.zeros(3, int)), TypeError, "/ 255"),
            ((torch.rand(3, 12), torch.zeros(3)), TypeError, "class indices"),
            ((torch.rand(3, 12), torch.zeros(4).long()), ValueError, "one class index"),
            ((torch.rand(3, 12), torch.zeros(3, 4).long()), ValueError, "one class index"),
            ((torch.rand(3, 12), torch.full((3,), 4)), ValueError, "label 4"),
            ((torch.rand(3, 12), torch.tensor([0, -1, 1])), ValueError, "from 0, got -1"),
            ((torch.rand(3, 12), torch.tensor([0, -100, 1])), ValueError, "from 0, got -100"),
        ],
    )
    def test_bad_data_give_a_clear_error(self, data, error, words):
        with pytest.raises(error, match=words):
            run(network(), data)

    def test_inputs_outside_the_box(self):
        model, x = network(), torch.rand(3, 12) * 9
        with pytest.raises(ValueError, match="outside clip"):
            run(model, (x, model(x).argmax(1)))

    def test_without_numpy_it_says_so_before_any_work(self):
        program = """
            import sys
            sys.modules["numpy"] = None
            import torch
            from awp_optim import AWP
            from awp_optim.attacks import PGD
            from awp_optim.evaluation import evaluate
            from awp_optim.landscape import filter_normalized_direction, loss_curve
            model = torch.nn.Linear(2, 2)
            def unused(*args): raise AssertionError
            PGD(0.1, 0.05, 2)(model, torch.rand(1, 2), torch.tensor([0]))
            direction = filter_normalized_direction(model)
            for call in (lambda: evaluate(unused, unused, {"a": unused}),
                         lambda: loss_curve(model, unused, unused, [1.0], direction)):
                try:
                    call()
                except ImportError as error:
                    print(error)
        """
        lines = "\n".join(line[12:] for line in program.splitlines())
        done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
        assert done.stdout.count("awp_optim[eval]") == 2, done.stderr


class TestSettings:
    @pytest.mark.parametrize(
        ("attacks", "error", "words"),
        [
            ([FGSM()], TypeError, "dict"),
            ({"a/b": FGSM()}, ValueError, "another name"),
            ({"natural": FGSM()}, ValueError, "another name"),
            ({3: FGSM()}, TypeError, "str"),
            ({"a": "fgsm"}, TypeError, "callable"),
            ({"a": PGD}, TypeError, r"instance, PGD\("),
            ({"a": NFGSM()}, ValueError, "leaves its ball"),
            ({"a": Captured(NFGSM())}, ValueError, "leaves its ball"),
        ],
    )
    def test_wrong_attacks(self, attacks, error, words):
        with pytest.raises(error, match=words):
            run(network(), images(), attacks)

    def test_wrong_model_batch_size_and_device(self):
        with pytest.raises(TypeError, match="model"):
            run(None, images())
        with pytest.raises(ValueError, match="batch_size"):
            run(network(), images(), batch_size=0)
        with pytest.raises(ValueError, match="model is on cpu: move it"):
            run(network(), images(), device="meta")

    def test_every_attack_has_its_own_seed(self):
        model, data, l2 = network(), images(), ATTACKS["l2"]
        both, alone = run(model, data), run(model, data, {"l2": l2})
        np.testing.assert_array_equal(both.records["l2"].loss, alone.records["l2"].loss)
        other = run(model, data, {"l2": l2}, seed=1)
        assert differ(other.records["l2"], alone.records["l2"])
        twice = run(model, data, {"a": l2, "b": l2})
        assert differ(twice.records["a"], twice.records["b"])

    def test_a_random_model_gives_the_same_result_whatever_else_is_asked(self):
        class Noisy(Scaled):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + 0.3 * torch.randn_like(x))

        model, data = Noisy(*network()), images()
        state = torch.get_rng_state()
        pgd = {"pgd": ATTACKS["pgd"]}
        first = run(model, data, pgd, batch_size=16)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        for attacks, checks in ((pgd, False), ({"fgsm": FGSM(), **pgd}, False), (pgd, True)):
            r = run(model, data, attacks, batch_size=16, checks=checks)
            assert r.natural == first.natural
            np.testing.assert_array_equal(r.records["pgd"].loss, first.records["pgd"].loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert run(model, data, pgd, batch_size=16, seed=1).natural != first.natural

    def test_torchs_generator_is_restored_but_used_without_a_seed(self):
        data, l2 = images(), {"l2": ATTACKS["l2"]}
        torch.manual_seed(5)
        run(network(), TensorDataset(*data))
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))
        a, b = (run(network(), data, l2, seed=None) for _ in range(2))
        assert differ(a.records["l2"], b.records["l2"])

    def test_only_generators_that_are_restored_are_seeded(self, monkeypatch):
        def refuse(seed):
            raise AssertionError("torch.manual_seed seeds the generators of all devices")

        model, data = network(), images()
        monkeypatch.setattr(torch, "manual_seed", refuse)
        native = AutoAttack(0.04, version="custom", attacks=("apgd-ce",), backend="native")
        run(model, data, {**ATTACKS, "aa": native})

    def test_attacks_in_train_mode_change_nothing_for_the_others(self):
        model, data = network(), images()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        in_train = PGD(eps=0.06, step_size=0.02, steps=2, model_mode="train")
        both = run(model, data, {"train": in_train, "l2": ATTACKS["l2"]}, batch_size=20)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        alone = run(model, data, {"l2": ATTACKS["l2"]}, batch_size=20)
        np.testing.assert_array_equal(both.records["l2"].loss, alone.records["l2"].loss)

    def test_an_attack_that_fails_in_train_mode_leaves_the_statistics(self):
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}

        def failing(model, x, y):
            model.train()(x)
            model.eval()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(model, images(), {"failing": failing})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_the_model_is_restored(self):
        model = network().train()
        model[2].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.warns(EvaluationWarning, match="train mode"):
            in_train = run(model, images())
        with pytest.raises(ZeroDivisionError):
            run(model, images(), {"bad": lambda *a: 1 / 0})
        assert [m.training for m in model] == [True, True, False, True, True, True]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert [f.check for f in in_train.warnings] == ["train_mode"]
        assert in_train.robust == run(network(), images()).robust

    def test_logits_are_picked_out_of_what_a_model_returns(self):
        inner, data = network(), images()
        expected = run(inner, data)

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return SimpleNamespace(logits=self.inner(x))

        got = run(Wrapped().eval(), data, logits=lambda out: out.logits, checks=True)
        assert got.robust == expected.robust
        assert run(lambda x: (inner(x), 0), data, logits=lambda out: out[0]).robust == got.robust


class TestForeignAttacks:
    def test_any_function_will_do(self):
        model, data = network(), images()
        r = run(model, data, {"own": lambda m, x, y: STEADY(m, x, y), "pgd": STEADY})
        assert r.robust["own"] == r.robust["pgd"]
        assert r.records["own"].passes == 5

    def test_one_that_leaves_the_model_in_train_mode_harms_nobody(self):
        """As the loop of many scripts does, which ends with model.train()."""

        def careless(model, x, y):
            x_adv = STEADY(model, x, y)
            model.train()
            return x_adv

        model = network()
        before = model[2].running_mean.clone()
        r = run(model, images(), {"own": careless, "pgd": STEADY}, batch_size=16)
        assert r.robust["own"] == r.robust["pgd"]
        assert r.natural == run(network(), images()).natural
        assert torch.equal(model[2].running_mean, before)

    def test_the_wrong_shape(self):
        with pytest.raises(TypeError, match=r"attack 'cut' must return a tensor of shape"):
            run(network(), images(), {"cut": lambda m, x, y: x[:1]})

    def test_writing_in_place_harms_no_other_attack_and_not_the_caller(self):
        def in_place(model, x, y):
            y.zero_()
            return x.add_(0.3).clamp_(0, 1)

        def copying(model, x, y):
            return (x + 0.3).clamp(0, 1)

        model, (x, y) = network(), images()
        kept = x.clone(), y.clone()
        r = run(model, (x, y), {"in_place": in_place, "fgsm": ATTACKS["fgsm"], "copying": copying})
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])
        assert r.robust["in_place"] == r.robust["copying"] < r.natural
        assert r.robust["fgsm"] == run(model, (x, y)).robust["fgsm"]

    @pytest.mark.parametrize("far", [0.2, float("nan")])
    def test_what_leaves_the_ball_or_is_not_finite_does_not_count(self, far):
        class Cheat(FGSM):
            def run(self, oracle, x, y):
                return (x + far).clamp(0, 1)

        with pytest.warns(EvaluationWarning, match="outside its ball"):
            r = run(network(), images(), {"cheat": Cheat(eps=0.1)}, checks=True)
        assert r.robust["cheat"] == r.natural
        assert "outside" in [f.check for f in r.warnings]

    def test_captured_ones_replay_one_graph(self, cpu_graphs):
        """Though the model gets more of one batch right than of another."""
        model, data = network(), images()
        plain = run(model, data, {"pgd": STEADY}, batch_size=10)
        r = run(model, data, {"pgd": Captured(STEADY)}, batch_size=10)
        assert (cpu_graphs.captures, cpu_graphs.replays) == (1, N // 10 - 2)
        assert r.broken_by.tolist() == plain.broken_by.tolist()
        assert (r.records["pgd"].attacked == plain.records["pgd"].attacked).all()
        np.testing.assert_allclose(r.records["pgd"].loss, plain.records["pgd"].loss, rtol=1e-5)
        assert r.records["pgd"].passes is None
        attack = Captured(STEADY)
        for _ in range(3):
            run(model, data, {"pgd": attack}, batch_size=10)
        assert cpu_graphs.captures == 2  # the second, for all three

    def test_attacks_of_several_parts(self):
        class Both(Attack):
            clip, model_mode = (0, 1), "eval"

            def parts(self):
                return {"weak": FGSM(eps=0.02), "strong": PGD(0.06, 0.02, 5)}

            def run(self, oracle, x, y):
                raise AssertionError("its parts are run")

        r = run(network(), images(), {"both": Both()})
        record, weak, strong = (r.records[name] for name in ("both", "both/weak", "both/strong"))
        assert weak.fooled.any()
        assert (strong.attacked == (weak.attacked & ~weak.fooled)).all()
        assert (record.fooled == (weak.fooled | strong.fooled)).all()
        assert r.robust == {"both": r.worst_case}
        assert set(r.broken_by) == {"", "natural", "both/weak", "both/strong"}
        np.testing.assert_array_equal(
            record.prediction, np.where(strong.attacked, strong.prediction, weak.prediction)
        )
        np.testing.assert_array_equal(record.loss[strong.attacked], strong.loss[strong.attacked])
        passes = weak.passes * weak.attacked.sum() + strong.passes * strong.attacked.sum()
        assert record.passes == pytest.approx(passes / weak.attacked.sum())

    def test_what_an_attack_warns_of_is_a_finding(self):
        def doubtful(model, x, y):
            warnings.warn("doubtful", UserWarning, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            return x

        with (
            pytest.warns(EvaluationWarning, match="a: doubtful"),
            pytest.warns(DeprecationWarning, match="old"),
        ):
            r = run(network(), images(), {"a": doubtful}, checks=True, batch_size=20)
        assert [(f.check, f.message) for f in r.warnings] == [("a", "doubtful")]


class TestOddModels:
    """On everything wrong, on everything right, one class or a thousand, NaN."""

    def test_wrong_on_everything(self):
        model, (x, _) = network(), images()
        r = run(model, (x, (model(x).argmax(1) + 1) % 4), checks=True)
        assert (r.natural, r.worst_case, set(r.broken_by)) == (0, 0, {"natural"})
        assert r.robust == dict.fromkeys(ATTACKS, 0.0)
        assert r.records["pgd"].passes == 0
        assert r.interval("pgd")[0] == 0 < r.interval("pgd")[1] < 0.1

    def test_right_on_everything(self):
        def model(z: Tensor) -> Tensor:
            return torch.stack([z.flatten(1).sum(1) * 0 + 1, z.flatten(1).sum(1) * 0], 1)

        with pytest.warns(EvaluationWarning, match="exactly zero"):
            r = run(model, (images()[0], torch.zeros(N).long()), checks=True)
        assert (r.natural, r.worst_case, set(r.broken_by)) == (1, 1, {""})
        assert {"vanishing", "unbounded"} <= {f.check for f in r.warnings}
        assert r.interval("worst_case")[1] == 1

    def test_one_class(self):
        data = images()[0], torch.zeros(N).long()
        with pytest.warns(EvaluationWarning, match="single class"):
            r = run(network(classes=1), data, checks=True)
        assert r.worst_case == 1
        with pytest.raises(ValueError, match="2 classes or more"):
            run(network(classes=1), data, {"cw": PGD(loss="cw")})

    def test_nan_names_no_class(self):
        """Its argmax would be class 0 or wherever the NaN is, and so right at times."""

        def model(z: Tensor) -> Tensor:
            return network()(z).where(z.flatten(1)[:, :1] > 0.5, torch.nan)

        x, y = images()
        nan = (x.flatten(1)[:, 0] <= 0.5).numpy()
        with pytest.warns(EvaluationWarning, match="logits hold NaN"):
            r = run(model, (x, y), {"fgsm": FGSM(0.0)}, checks=True)
        assert 0.2 < nan.mean() < 0.8
        assert (r.broken_by[nan] == "natural").all()
        assert "not_finite" in {f.check for f in r.warnings}
        everywhere = run(lambda z: z.flatten(1) * torch.nan, (x, torch.zeros(N).long()))
        assert everywhere.natural == everywhere.worst_case == 0

    def test_nan_under_attack_is_broken_and_reported(self):
        def model(z: Tensor) -> Tensor:
            return network()(z).where((z != 0.5).flatten(1).all(1, keepdim=True), torch.nan)

        with pytest.warns(EvaluationWarning, match="under gray"):
            r = run(model, images(), {"gray": lambda m, x, y: x * 0 + 0.5}, checks=True)
        assert r.worst_case == 0

    def test_a_buffer_whose_elements_share_memory(self):
        model = network()
        model.register_buffer("mask", torch.zeros(1).expand(5))
        r = run(model, images(), {"own": lambda m, x, y: STEADY(m, x, y)})
        assert r.robust["own"] == run(network(), images(), {"own": STEADY}).robust["own"]

    def test_infinite_logits_of_excluded_classes_are_fine(self):
        def model(z: Tensor) -> Tensor:
            return F.pad(network()(z), (0, 1), value=-torch.inf)

        assert run(model, images()).natural == run(network(), images()).natural


class Killed(BaseException):
    """What no handler of errors catches."""


class TestResume:
    def test_interrupted_anywhere_it_gives_the_same(self, tmp_path):
        data, state = images(), tmp_path / "state"
        expected = run(network(), data, batch_size=16)
        calls = 0

        def killed_at(at: int) -> nn.Module:
            model = network()

            def count(*_):
                nonlocal calls
                calls += 1
                if calls == at:
                    raise Killed

            model.register_forward_pre_hook(count)
            return model

        run(killed_at(0), data, batch_size=16)
        total = calls
        for at in range(1, total, 7):
            state.unlink(missing_ok=True)
            calls = 0
            with pytest.raises(Killed):
                run(killed_at(at), data, batch_size=16, state=state)
            before = calls
            assert_same(run(killed_at(0), data, batch_size=16, state=state), expected)
            assert calls - before <= total - at + 20  # no more than one attack again
            kept = state.read_bytes()
            calls = 0
            assert_same(run(killed_at(0), data, batch_size=16, state=state), expected)
            assert calls == 0
            assert state.read_bytes() == kept

    def test_cut_at_any_byte(self, tmp_path):
        model, data, state = network(), images(12), tmp_path / "state"
        settings = {"attacks": {"fgsm": FGSM(0.04)}, "batch_size": 5, "state": state}
        expected = run(model, data, **settings)
        content = state.read_bytes()
        for cut in range(content.index(b"\n") + 1, len(content), 13):
            state.write_bytes(content[:cut])
            assert_same(run(model, data, **settings), expected)

    @pytest.mark.parametrize("skip_broken", [True, False])
    def test_more_attacks_continue_an_evaluation(self, tmp_path, skip_broken):
        model, data, state = network(), images(), tmp_path / "state"
        settings = {"batch_size": 16, "skip_broken": skip_broken}
        first, *_ = ATTACKS
        run(model, data, {first: ATTACKS[first]}, state=state, **settings)
        before = state.read_text().splitlines()[1:]
        assert_same(run(model, data, state=state, **settings), run(model, data, **settings))
        after = state.read_text().splitlines()[1:]
        assert after[: len(before)] == before
        new = [json.loads(line)["name"] for line in after[len(before) :]]
        assert first not in new
        assert "natural" not in new

    def test_the_probes_warnings_come_back(self, tmp_path):
        data, state = (images()[0], torch.zeros(N).long()), tmp_path / "state"
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        nn.init.zeros_(model[1].weight)
        first, again = (run(model, data, checks=True, state=state).warnings for _ in range(2))
        assert first == again != ()

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"attacks": {"fgsm": FGSM(0.05)}}, "other attacks"),
            ({"attacks": {"l2": ATTACKS["l2"], "fgsm": FGSM(0.04)}}, "other attacks"),
            ({"attacks": {}}, "other attacks"),
            ({"seed": 1}, "other seed"),
            ({"skip_broken": True}, "other skip_broken"),
            ({"key": "other"}, "other key"),
            ({"model": network(1)}, "other model"),
            ({"model": nn.Sequential(*network()[:3], nn.ReLU(), *network()[4:])}, "other model"),
            ({"data": relabeled()}, "other data: batch 1"),
            ({"batch_size": 8}, "other data: batch 0"),
        ],
    )
    def test_another_evaluations_state_is_refused_untouched(self, changed, words, tmp_path):
        state = tmp_path / "state"
        settings = {
            "model": network(), "data": images(), "attacks": {"fgsm": FGSM(0.04)},
            "batch_size": 16, "state": state,
        }  # fmt: skip
        run(**settings)
        kept = state.read_bytes()
        with pytest.raises(ValueError, match=words):
            run(**settings | changed)
        assert state.read_bytes() == kept

    def test_a_models_plain_attributes_identify_it(self, tmp_path):
        state = tmp_path / "state"
        run(scaled(1.0), images(), state=state)
        run(scaled(1.0), images(), state=state)
        with pytest.raises(ValueError, match="other model"):
            run(scaled(-1.0), images(), state=state)

    @pytest.mark.parametrize(
        ("changed", "what"),
        [
            ({"model": two_classes}, "the model"),
            ({"model": local_class()}, "the model"),
            ({"attacks": {"own": lambda m, x, y: x}}, "attack 'own'"),
            ({"attacks": {"own": PGD(loss=lambda z, y: z.sum(1))}}, "attack 'own'"),
            ({"logits": lambda out: out}, "logits"),
        ],
    )
    def test_a_function_must_be_named_for_a_state(self, changed, what, tmp_path):
        """Functions cannot be compared: a second one would get the numbers of the first."""
        state = tmp_path / "state"
        settings = {
            "model": network(), "data": (images()[0], torch.zeros(N).long()), "attacks": {},
            "state": state,
        }  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot identify {what}, .*key="):
            run(**settings | changed)
        assert not state.exists()
        named = run(**settings | changed, key="first")
        assert_same(run(**settings | changed, key="first"), named)
        with pytest.raises(ValueError, match="other key"):
            run(**settings | changed, key="second")

    @pytest.mark.parametrize(
        "content", [b"", b"\n", b"{}\n", b"nonsense\n", b'{"evaluation": 3}\n[]\n', b"\x80\x00\n"]
    )
    def test_another_file_is_refused_untouched(self, content, tmp_path):
        state = tmp_path / "state"
        state.write_bytes(content)
        with pytest.raises(ValueError, match="not the state of an evaluation"):
            run(network(), images(), state=state)
        assert state.read_bytes() == content

    @pytest.mark.parametrize(
        "change", [{"name": None}, {"index": [99]}, {"loss": []}, {"extra": 1}, {"batch": "x"}]
    )
    def test_damaged_entries_are_refused(self, change, tmp_path):
        state = tmp_path / "state"
        run(network(), images(), state=state)
        header, natural, entry, *rest = state.read_text().splitlines(keepends=True)
        values = {k: v for k, v in (json.loads(entry) | change).items() if v is not None}
        state.write_text("".join([header, natural, json.dumps(values) + "\n", *rest]))
        with pytest.raises(ValueError, match="delete it"):
            run(network(), images(), state=state)

    def test_a_file_that_cannot_be_written_is_named(self, tmp_path):
        state = tmp_path / "missing" / "state"
        with pytest.raises(FileNotFoundError) as caught:
            run(network(), images(), state=state)
        assert caught.value.filename == str(state)

    def test_killed_for_real(self, tmp_path):
        """SIGKILL at a random moment, again and again, until it is through."""
        script, state = tmp_path / "script.py", tmp_path / "state"
        script.write_text(
            "import sys, time, torch\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_evaluate import images, network, run\n"
            "torch.set_num_threads(1)\n"
            "print('ready', flush=True)\n"
            "model = network()\n"
            "model.register_forward_hook(lambda *a: time.sleep(0.004))\n"
            "run(model, images(), batch_size=8, state=sys.argv[1])\n"
        )
        rng, kills = np.random.default_rng(0), 0
        while kills < 4:
            process = subprocess.Popen(
                [sys.executable, script, state], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.01, 0.3))
            process.kill()
            _, error = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, error.decode()
            kills += 1
        assert kills >= 2
        resumed = run(network(), images(), batch_size=8, state=state)
        assert_same(resumed, run(network(), images(), batch_size=8))

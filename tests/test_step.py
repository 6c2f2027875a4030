"""AdversarialStep against Algorithm 2 written out."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD, SPSA, Captured
from awp_optim.attacks.oracle import COMPILER_SEES_REQUIRES_GRAD
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES
from tests.toolbox import batches, mixed, network

SGD = torch.optim.SGD
ATTACK = PGD(eps=0.1, step_size=0.04, steps=3)
ascents = pytest.mark.parametrize("ascent", ["exact", "attack"])


@pytest.fixture
def net():
    return network()


def ascend(v, w, g, gamma, steps):
    """Eq. (10) and (15), in place in v."""
    for n in w:
        if w[n].ndim > 1 and gamma > 0 and g[n].any():
            v[n] = v[n] + gamma / steps * w[n].norm() * g[n] / g[n].norm()
            v[n] *= min(1, gamma * w[n].norm() / v[n].norm())


def algorithm_2(
    model, data, gamma, alternations, k2, lr, objective, ascent_objective=None, attack=ATTACK
):
    """With w and v kept apart; the attack alone is the package's."""
    steps = alternations * k2
    for x, y in data:
        w = {n: p.detach().clone() for n, p in model.named_parameters()}
        v = {n: torch.zeros_like(p) for n, p in w.items()}
        statistics = {n: b.clone() for n, b in model.named_buffers()}

        def at(v, w=w):
            return {n: (w[n] + v[n]).requires_grad_() for n in w}

        def gradient(objective, x_adv, buffers, w=w, v=v, x=x, y=y):
            weights = at(v)
            call = lambda z: functional_call(model, {**weights, **buffers}, (z,))  # noqa: E731
            loss = objective(call, x_adv, x, y)
            grads = torch.autograd.grad(loss, list(weights.values()))
            return loss, dict(zip(weights, grads))

        for _ in range(alternations):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(w[n] + v[n])
            x_adv = attack(model, x, y)
            for _ in range(k2):
                scratch = {n: b.clone() for n, b in statistics.items()}
                _, g = gradient(ascent_objective or objective, x_adv, scratch)
                ascend(v, w, g, gamma, steps)
        loss, g = gradient(objective, x_adv, statistics)  # updates the statistics in place
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(w[n] - lr * g[n])
            for n, b in model.named_buffers():
                b.copy_(statistics[n])
        yield loss, x_adv


class Both:
    """An objective that uses the natural examples, too."""

    needs_natural = True

    def __call__(self, logits_adv, logits_nat, y):
        return F.cross_entropy(logits_adv, y) + 0.5 * F.cross_entropy(logits_nat, y)


def cross_entropy(call, x_adv, x, y):
    return F.cross_entropy(call(x_adv), y)


def both(call, x_adv, x, y):
    return F.cross_entropy(call(x_adv), y) + 0.5 * F.cross_entropy(call(x), y)


def expected_cross_entropy(call, x_adv, x, y):
    return -(y * call(x_adv).log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(("alternations", "k2"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("loss", [cross_entropy, both, expected_cross_entropy])
def test_is_algorithm_2(net, alternations, k2, loss):
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), SGD, gamma=0.05, ascent_steps=alternations * k2, lr=0.1)
    kwargs = {"objective": Both()} if loss is both else {}
    step = AdversarialStep(net, opt, ATTACK, alternations=alternations, **kwargs)
    data = mixed(batches(4)) if loss is expected_cross_entropy else batches(4)
    torch.manual_seed(3)
    ours = [step(x, y) for x, y in data]
    torch.manual_seed(3)
    truth = list(algorithm_2(other, data, 0.05, alternations, k2, 0.1, loss))
    for out, (value, x_adv) in zip(ours, truth):
        torch.testing.assert_close(out.loss, value.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.x_adv, x_adv, rtol=1e-9, atol=1e-9)
        assert not any(t.requires_grad for t in out)
    assert out.logits.shape == (8, 3)
    assert (step.logits_nat is not None) == (loss is both)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


# --- Targets that are no labels ---------------------------------------------------------------


def distance(z, target):
    return (z - target).square().flatten(1).sum(1)


class Distance:
    needs_natural = False

    def __call__(self, z_adv, z_nat, target):
        assert z_nat is None
        return distance(z_adv, target).mean()


@pytest.mark.parametrize("kind", ["embeddings of a frozen model", "feature maps", "numbers"])
def test_any_target_reaches_attack_and_objective(net, kind):
    """FARE (Schlarmann et al., ICML 2024), and regression."""
    model = net[:3] if kind == "feature maps" else net
    if kind == "numbers":
        data = [(x, torch.randn(8, 3, dtype=torch.float64)) for x, _ in batches(3)]
    else:
        frozen = copy.deepcopy(model).eval()
        data = [(x, frozen(x).detach()) for x, _ in batches(3)]
    other, attack = copy.deepcopy(model), replace(ATTACK, loss=distance)
    opt = AWP(model.parameters(), SGD, gamma=0.05, lr=0.01)
    step = AdversarialStep(model, opt, attack, Distance())
    torch.manual_seed(3)
    ours = [step(x, y) for x, y in data]

    def loss(call, x_adv, x, y):
        return sum(((z - t) ** 2).sum() for z, t in zip(call(x_adv), y, strict=True)) / len(y)

    torch.manual_seed(3)
    truth = list(algorithm_2(other, data, 0.05, 1, 1, 0.01, loss, attack=attack))
    for out, (value, x_adv) in zip(ours, truth):
        torch.testing.assert_close(out.loss, value.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.x_adv, x_adv, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


# --- Ascent below a loss ----------------------------------------------------------------------


def trades_by_example(call, x_adv, x, q):
    """The cross-entropy at x' and the loss of TRADES, for each example."""
    log_p_adv, log_p = call(x_adv).log_softmax(1), call(x).log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_p_adv)).sum(1)
    return -(q * log_p_adv).sum(1), -(q * log_p).sum(1) + 6.0 * divergence


def at_by_example(call, x_adv, x, q):
    losses = -(q * call(x_adv).log_softmax(1)).sum(1)
    return losses, losses


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("alternations", "k2"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("by_example", [at_by_example, trades_by_example])
def test_the_ascent_counts_only_examples_with_a_low_loss(net, by_example, alternations, k2, soft):
    """Yu et al. (2022): the gradient of sum_i 1[loss_i < c] loss_i, one example at a time."""
    other, seen = copy.deepcopy(net), []
    objective = TRADES() if by_example is trades_by_example else AT()
    attack = replace(ATTACK, loss=objective.attack_loss)
    data = mixed(batches(4), dtype=torch.float64) if soft else batches(4)

    def labels(y):
        return y if soft else torch.eye(3, dtype=torch.float64)[y]

    def mean(call, x_adv, x, y):
        return by_example(call, x_adv, x, labels(y))[1].mean()

    def low(call, x_adv, x, y):
        rows = list(zip(*by_example(call, x_adv, x, labels(y)), strict=True))
        seen.extend(loss < 1.1 for loss, _ in rows)
        return sum(value if loss < 1.1 else 0 * value for loss, value in rows)

    opt = AWP(net.parameters(), SGD, gamma=0.05, ascent_steps=alternations * k2, lr=0.1)
    settings = {"alternations": alternations, "ascent_below": 1.1}
    step = AdversarialStep(net, opt, attack, objective, **settings)
    torch.manual_seed(3)
    ours = [step(x, y) for x, y in data]
    torch.manual_seed(3)
    truth = list(algorithm_2(other, data, 0.05, alternations, k2, 0.1, mean, low, attack))
    assert 0.2 < sum(seen) / len(seen) < 0.8
    for out, (value, x_adv) in zip(ours, truth):
        torch.testing.assert_close(out.loss, value.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.x_adv, x_adv, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("c", "gamma"), [(1e-9, 0.0), (1e9, 0.05)])
def test_no_example_gives_no_perturbation_and_all_the_usual_one(net, c, gamma):
    other, data = copy.deepcopy(net), batches(3)
    _, outputs = trained(net, data, ascent_below=c)
    opt = AWP(other.parameters(), SGD, gamma=gamma, lr=0.1, momentum=0.9)
    step = AdversarialStep(other, opt, ATTACK)
    torch.manual_seed(3)
    for ours, (x, y) in zip(outputs, data):
        assert ours.loss == step(x, y).loss
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def trained(model, data, call=None, attack=ATTACK, **settings):
    opt = AWP(model.parameters(), SGD, gamma=0.05, lr=0.1, momentum=0.9)
    step = AdversarialStep(call or model, opt, attack, **settings)
    torch.manual_seed(3)
    return model, [step(x, y) for x, y in data]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"ascent": "attack"},
        {"objective": AT(0.1)},
        {"objective": TRADES(6.0, 0.1), "attack": PGD(0.1, 0.04, steps=2, loss="kl")},
        {"objective": MART(6.0, 0.1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_certain_labels_train_as_indices_do(net, kwargs, autocast):
    data = batches(4, dtype=torch.float32 if autocast else torch.float64)
    net.to(data[0][0].dtype)
    settings = {"autocast": autocast, **kwargs}
    ours, theirs = (
        (model.state_dict(), outputs[-1].x_adv)
        for model, outputs in (
            trained(copy.deepcopy(net), batches, **settings) for batches in (mixed(data, 1.0), data)
        )
    )
    tolerance = 2e-2 if autocast else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", [AT(), TRADES(), MART(), GKL(), SCORE()])
@pytest.mark.parametrize("labels", [lambda data: data, mixed])
def test_autocast_runs_the_forward_passes_in_its_dtype(objective, labels):
    net, seen = network(dtype=torch.float32), set()
    net[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    opt = AWP(net.parameters(), SGD, gamma=0.01, lr=0.1)
    attack = PGD(eps=0.1, steps=2, loss=objective.attack_loss)
    step = AdversarialStep(net, opt, attack, objective, autocast=torch.bfloat16)
    for x, y in labels(batches(2)):
        y_before = y.clone()
        out = step(x.float(), y)
        assert torch.equal(y, y_before)
    assert seen == {out.logits.dtype} == {torch.bfloat16}
    assert out.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y: y * 2, "sum to 1"),
        (lambda y: y[:, :2] / y[:, :2].sum(1, keepdim=True), "2 classes, but the model has 3"),
        (lambda y: y[:4], "each of the 8 examples"),
    ],
)
def test_bad_probabilities_change_nothing(net, change, match):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    before = copy.deepcopy(net.state_dict())
    (x, y), *_ = mixed(batches(1))
    y = torch.where(y == 0, 0.1, y * 0.9) if match.startswith("2") else y
    with pytest.raises(ValueError, match=match):
        AdversarialStep(net, opt, ATTACK)(x, change(y))
    assert not opt.is_perturbed
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_a_plain_optimizer_gives_plain_adversarial_training(net):
    plain, zero, data = copy.deepcopy(net), copy.deepcopy(net), batches(3)
    torch.manual_seed(3)
    list(algorithm_2(plain, data, 0.0, 1, 1, 0.1, cross_entropy))
    for model, opt in [
        (net, SGD(net.parameters(), lr=0.1)),
        (zero, AWP(zero.parameters(), SGD, gamma=0.0, lr=0.1)),
    ]:
        torch.manual_seed(3)
        step = AdversarialStep(model, opt, ATTACK)
        for x, y in data:
            step(x, y)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


class Passes(TorchDispatchMode):
    """Counts the convolutions of each kind: forward, to the input, to the weight."""

    def __init__(self):
        super().__init__()
        self.forward, self.to_weight, self.backward = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.forward += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.backward += 1
            self.to_weight += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "kwargs", "passes", "to_weight"),
    [
        ("at", {}, 11, 1),
        ("gradient", {}, 12, 2),
        ("gradient", {"ascent": "attack"}, 11, 2),
        ("random", {}, 11, 1),
    ],
)
def test_counts_no_pass_too_many(kind, kwargs, passes, to_weight):
    """PGD-10: forward passes, backward passes, and how many of these reach the weights."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1).double(), network())  # the second has an input to reach
    if kind == "at":
        opt = SGD(net.parameters(), lr=0.1)
    else:
        opt = AWP(net.parameters(), SGD, direction=kind, gamma=0.01, lr=0.1)
    step = AdversarialStep(net, opt, PGD(steps=10), **kwargs)
    (x, y), *_ = batches(1)
    with Passes() as count:
        step(x, y)
    convolutions = 2
    assert count.forward == passes * convolutions
    assert count.backward == passes * convolutions
    assert count.to_weight == to_weight * convolutions


@pytest.mark.parametrize("in_place", [True, False])
@ascents
def test_a_compiled_attack_computes_no_weight_gradients_either(net, in_place, ascent):
    """A compiled backward pass computes every gradient that a weight requires."""
    masks = []

    def backward(graph, example):
        nodes = [n for n in graph.graph.nodes if "convolution_backward" in str(n.target)]
        return make_boxed_func(
            lambda *args: (masks.extend(n.args[-1][1] for n in nodes), graph(*args))[1]
        )

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=backward)
    model = copy.deepcopy(net)
    if in_place:
        model.compile(backend=backend)
    call = model if in_place else torch.compile(model, backend=backend)
    opt = AWP(model.parameters(), SGD, gamma=0.01, lr=0.1)
    step = AdversarialStep(call, opt, PGD(steps=10), ascent=ascent)
    step(*batches(1)[0])
    if in_place and not masks:
        pytest.skip("this torch does not compile such a module in place")
    needed = {"exact": [False] * 10 + [True] * 2, "attack": [False] * 9 + [True] * 2}[ascent]
    # A torch that would not notice gets all of them, so that those wanted are there.
    assert masks == (needed if COMPILER_SEES_REQUIRES_GRAD else [True] * len(needed))
    assert all(p.requires_grad for p in model.parameters())


def test_ascent_along_the_attacks_last_gradient(net):
    opt = AWP(net.parameters(), SGD, gamma=0.05, lr=0.1)
    (x, y), *_ = batches(1)
    attack = PGD(eps=0.1, step_size=0.04, steps=3, random_start=False)
    x_before = PGD(eps=0.1, step_size=0.04, steps=2, random_start=False)(net, x, y)
    twin = copy.deepcopy(net).eval()
    F.cross_entropy(twin(x_before), y, reduction="sum").backward()
    expected = {
        p: 0.05 * q.detach().norm() * q.grad / q.grad.norm()
        for p, q in zip(net.parameters(), twin.parameters())
        if p.ndim > 1
    }
    seen = {}
    net.register_forward_hook(lambda *a: seen.update(opt.perturbation()))  # the last is at w + v
    AdversarialStep(net, opt, attack, ascent="attack")(x, y)
    assert seen.keys() == expected.keys()
    for p, v in seen.items():
        torch.testing.assert_close(v, expected[p], rtol=1e-9, atol=1e-12)
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@ascents
def test_a_compiled_model_trains_alike(net, ascent, attack_mode):
    torch._dynamo.reset()
    model, data = copy.deepcopy(net), batches(10)
    settings = {"attack": replace(ATTACK, model_mode=attack_mode), "ascent": ascent}
    compiled = torch.compile(model, backend="aot_eager")
    _, truth = trained(net, data, **settings)
    _, outputs = trained(model, data, compiled, **settings)
    ours, theirs = ((m.state_dict(), o) for m, o in ((model, outputs), (net, truth)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@ascents
def test_channels_last_trains_alike_and_stays(net, ascent):
    layout = {"memory_format": torch.channels_last}
    model, data = copy.deepcopy(net).to(**layout), batches(10)
    trained(net, data, ascent=ascent)
    _, outputs = trained(model, [(x.to(**layout), y) for x, y in data], ascent=ascent)
    assert outputs[-1].x_adv.is_contiguous(**layout)
    assert model[0].weight.is_contiguous(**layout)
    torch.testing.assert_close(model.state_dict(), net.state_dict(), rtol=1e-9, atol=1e-9)


def test_batch_norm_counts_the_pass_at_the_perturbed_weights_alone(net):
    opt = AWP(net.parameters(), SGD, gamma=0.5, lr=0.0)
    (x, y), *_ = batches(1)
    x_adv = AdversarialStep(net, opt, ATTACK)(x, y).x_adv
    assert net[1].num_batches_tracked == 1
    with torch.no_grad():
        at_w = net[0](x_adv).mean((0, 2, 3)) * 0.1
    assert not torch.allclose(net[1].running_mean, at_w, rtol=1e-3)


@pytest.mark.parametrize("fails_in_pass", [0, 3, 4])
def test_an_exception_leaves_the_weights_unperturbed(net, fails_in_pass):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    step = AdversarialStep(net, opt, ATTACK)
    before = [p.detach().clone() for p in net.parameters()]
    passes = []

    def fail(module, inputs):
        if len(passes) == fails_in_pass:
            raise KeyboardInterrupt
        passes.append(1)

    handle = net.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        step(*batches(1)[0])
    handle.remove()
    assert not opt.is_perturbed
    assert all(torch.equal(p, c) for p, c in zip(net.parameters(), before))
    assert net.training
    assert net[1].track_running_stats
    step(*batches(1)[0])


def test_an_attack_that_leaves_another_mode_does_not_change_the_models(net):
    def careless(model, x, y):
        model.eval()
        return ATTACK(model, x, y)

    other, data = copy.deepcopy(net), batches(3)
    for model, attack in ((net, careless), (other, ATTACK)):
        step = AdversarialStep(model, AWP(model.parameters(), SGD, gamma=0.1, lr=0.1), attack)
        torch.manual_seed(3)
        for batch in data:
            step(*batch)
    assert net.training
    assert all(
        torch.equal(*pair) for pair in zip(net.state_dict().values(), other.state_dict().values())
    )


@pytest.mark.parametrize("gamma", [0.1, 0.0])
def test_no_gradient_flows_into_what_the_batch_was_computed_from(net, gamma):
    """Soft labels of a teacher, inputs of a learned preprocessor."""
    teacher, scale = copy.deepcopy(net), torch.ones((), requires_grad=True)
    opt = AWP(net.parameters(), SGD, gamma=gamma, lr=0.1)
    step = AdversarialStep(net, opt, PGD(eps=0.1, steps=2, loss="kl"), TRADES())
    (x, _), *_ = batches(1)
    for _ in range(2):
        step((scale * x).clamp(0, 1), teacher(x).softmax(1))
    assert scale.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_clips_the_gradient_of_the_descent(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    AdversarialStep(net, opt, ATTACK, clip_grad_norm=1e-3)(*batches(1)[0])
    moved = torch.stack([(p - b).norm() for p, b in zip(net.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer"),
        ({"attack": None}, TypeError, "attack"),
        ({"attack": PGD}, TypeError, r"attack=PGD\(\)"),
        ({"objective": "trades"}, TypeError, r"objective=TRADES\(\)"),
        ({"objective": TRADES}, TypeError, r"objective=TRADES\(\)"),
        ({"objective": F.cross_entropy}, TypeError, "objective"),
        ({"alternations": 0}, ValueError, "alternations"),
        ({"alternations": 2}, ValueError, r"ascent_steps=K2 \* 2"),
        ({"ascent": "momentum"}, ValueError, "ascent"),
        ({"ascent_below": 0.0}, ValueError, "ascent_below must be above 0"),
        ({"ascent_below": 1.7, "ascent": "attack"}, ValueError, "ascent_below needs"),
        ({"ascent": "attack", "attack": lambda m, x, y: x}, ValueError, "FGSM, PGD or CW"),
        ({"ascent": "attack", "attack": SPSA(loss="ce")}, ValueError, "FGSM, PGD or CW.*SPSA"),
        ({"ascent": "attack", "attack": PGD(eps=0)}, ValueError, "FGSM, PGD or CW"),
        ({"ascent": "attack", "attack": PGD(steps=0)}, ValueError, "FGSM, PGD or CW"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm"),
        ({"autocast": torch.float16}, ValueError, "float16 needs a loss scale"),
        ({"autocast": True}, ValueError, "autocast"),
        ({"cuda_graph": "no"}, ValueError, "cuda_graph"),
    ],
)
def test_bad_settings_are_named(net, kwargs, error, match):
    settings = {"optimizer": AWP(net.parameters(), SGD, lr=0.1), "attack": ATTACK, **kwargs}
    with pytest.raises(error, match=match):
        AdversarialStep(net, **settings)


def test_one_gradient_of_the_attack_is_not_enough_for_several_ascents(net):
    opt = AWP(net.parameters(), SGD, ascent_steps=2, lr=0.1)
    with pytest.raises(ValueError, match="one gradient for each attack"):
        AdversarialStep(net, opt, ATTACK, ascent="attack")


@pytest.mark.parametrize("captured", [False, True])
def test_warns_of_an_attack_on_another_loss_than_the_objectives(net, captured):
    opt = SGD(net.parameters(), lr=0.1)
    attack = Captured(PGD()) if captured else PGD()
    with pytest.warns(UserWarning, match="loss='kl'"):
        AdversarialStep(net, opt, attack, TRADES())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdversarialStep(net, opt, attack, MART())
        AdversarialStep(net, opt, attack, Both())
        AdversarialStep(net, opt, PGD(loss="kl"), TRADES())
        AdversarialStep(net, opt, PGD(loss="score"), SCORE())
    with pytest.warns(UserWarning, match="loss='score'"):
        AdversarialStep(net, opt, PGD(loss="kl"), SCORE())


def test_a_step_does_not_start_from_perturbed_weights(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    step = AdversarialStep(net, opt, ATTACK)
    opt.first_step()
    with pytest.raises(RuntimeError, match="already perturbed"):
        step(*batches(1)[0])
    assert opt.is_perturbed

"""AdversarialStep against Algorithm 2 written out."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD

SGD = torch.optim.SGD
ATTACK = PGD(eps=0.1, step_size=0.04, steps=3)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 8, 1, 6, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (n, 8), generator=generator)))


def algorithm_2(model, data, gamma, alternations, k2, lr, objective):
    """With w and v kept apart; the attack alone is the package's."""
    steps = alternations * k2
    for x, y in data:
        w = {n: p.detach().clone() for n, p in model.named_parameters()}
        v = {n: torch.zeros_like(p) for n, p in w.items()}
        statistics = {n: b.clone() for n, b in model.named_buffers()}

        def at(v, w=w):
            return {n: (w[n] + v[n]).requires_grad_() for n in w}

        def gradient(x_adv, buffers, w=w, v=v, x=x, y=y):
            weights = at(v)
            call = lambda z: functional_call(model, {**weights, **buffers}, (z,))  # noqa: E731
            loss = objective(call, x_adv, x, y)
            grads = torch.autograd.grad(loss, list(weights.values()))
            return loss, dict(zip(weights, grads))

        for _ in range(alternations):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(w[n] + v[n])
            x_adv = ATTACK(model, x, y)
            for _ in range(k2):
                scratch = {n: b.clone() for n, b in statistics.items()}
                _, g = gradient(x_adv, scratch)
                for n in w:
                    if w[n].ndim > 1 and gamma > 0:
                        v[n] = v[n] + gamma / steps * w[n].norm() * g[n] / g[n].norm()
                        v[n] *= min(1, gamma * w[n].norm() / v[n].norm())
        loss, g = gradient(x_adv, statistics)  # updates the statistics in place
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(w[n] - lr * g[n])
            for n, b in model.named_buffers():
                b.copy_(statistics[n])
        yield loss, x_adv


class Both:
    """A TRADES-like objective, to see that natural examples are used where they are needed."""

    needs_natural = True

    def __call__(self, logits_adv, logits_nat, y):
        return F.cross_entropy(logits_adv, y) + 0.5 * F.cross_entropy(logits_nat, y)


def cross_entropy(call, x_adv, x, y):
    return F.cross_entropy(call(x_adv), y)


def both(call, x_adv, x, y):
    return F.cross_entropy(call(x_adv), y) + 0.5 * F.cross_entropy(call(x), y)


@pytest.mark.parametrize(("alternations", "k2"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("natural", [False, True])
def test_is_algorithm_2(net, alternations, k2, natural):
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), SGD, gamma=0.05, ascent_steps=alternations * k2, lr=0.1)
    kwargs = {"objective": Both()} if natural else {}
    step = AdversarialStep(net, opt, ATTACK, alternations=alternations, **kwargs)
    data = batches(4)
    torch.manual_seed(3)
    ours = [step(x, y) for x, y in data]
    torch.manual_seed(3)
    objective = both if natural else cross_entropy
    truth = list(algorithm_2(other, data, 0.05, alternations, k2, 0.1, objective))
    for out, (loss, x_adv) in zip(ours, truth):
        torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.x_adv, x_adv, rtol=1e-9, atol=1e-9)
        assert not any(t.requires_grad for t in out)
    assert out.logits.shape == (8, 3)
    for (name, ours_), theirs in zip(net.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_a_plain_optimizer_gives_plain_adversarial_training(net):
    plain, zero = copy.deepcopy(net), copy.deepcopy(net)
    data = batches(3)
    nets = {
        net: SGD(net.parameters(), lr=0.1),
        zero: AWP(zero.parameters(), SGD, gamma=0.0, lr=0.1),
    }
    for model, optimizer in nets.items():
        torch.manual_seed(3)
        step = AdversarialStep(model, optimizer, ATTACK)
        for x, y in data:
            step(x, y)
    torch.manual_seed(3)
    list(algorithm_2(plain, data, 0.0, 1, 1, 0.1, cross_entropy))
    for model in nets:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "training", "attacking"), [("at", 1, 3), ("awp", 2, 3), ("rwp", 1, 3)]
)
def test_counts_no_pass_too_many(net, kind, training, attacking):
    """Forward passes by the mode they run in, backward passes by the layer's weight gradient."""
    opt = {
        "at": lambda: SGD(net.parameters(), lr=0.1),
        "awp": lambda: AWP(net.parameters(), SGD, gamma=0.01, lr=0.1),
        "rwp": lambda: AWP(net.parameters(), SGD, gamma=0.01, direction="random", lr=0.1),
    }[kind]()
    forwards, weight_gradients = [], []
    net.register_forward_hook(lambda m, i, o: forwards.append(m.training))
    net[0].weight.register_hook(lambda g: weight_gradients.append(1))
    AdversarialStep(net, opt, ATTACK)(*batches(1)[0])
    assert forwards == [False] * attacking + [True] * training
    assert len(weight_gradients) == training


def test_batch_norm_counts_the_pass_at_the_perturbed_weights_alone(net):
    opt = AWP(net.parameters(), SGD, gamma=0.5, lr=0.0)
    (x, y), *_ = batches(1)
    x_adv = AdversarialStep(net, opt, ATTACK)(x, y).x_adv
    assert net[1].num_batches_tracked == 1
    with torch.no_grad():
        at_centre = net[0](x_adv).mean((0, 2, 3)) * 0.1
    assert not torch.allclose(net[1].running_mean, at_centre, rtol=1e-3)


@pytest.mark.parametrize("fails_in_pass", [0, 3, 4])
def test_an_exception_leaves_the_weights_at_the_centre(net, fails_in_pass):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    step = AdversarialStep(net, opt, ATTACK)
    centre = [p.detach().clone() for p in net.parameters()]
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
    assert all(torch.equal(p, c) for p, c in zip(net.parameters(), centre))
    assert net.training
    assert net[1].track_running_stats
    step(*batches(1)[0])


def test_clips_the_gradient_of_the_descent(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    AdversarialStep(net, opt, ATTACK, clip_grad_norm=1e-3)(*batches(1)[0])
    moved = torch.stack([(p - b).norm() for p, b in zip(net.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_autocast_runs_the_forward_passes_in_its_dtype():
    torch.manual_seed(0)
    net = Net()
    seen = set()
    net[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    opt = AWP(net.parameters(), SGD, gamma=0.01, lr=0.1)
    (x, y), *_ = batches(1)
    out = AdversarialStep(net, opt, ATTACK, autocast=torch.bfloat16)(x.float(), y)
    assert seen == {torch.bfloat16}
    assert out.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be"),
        ({"attack": None}, TypeError, "attack must be callable"),
        ({"alternations": 0}, ValueError, "alternations must be an integer"),
        ({"alternations": 2}, ValueError, r"ascent_steps=K2 \* 2"),
        ({"ascent": "wrong"}, ValueError, "ascent must be one of"),
        ({"ascent": "attack", "attack": lambda m, x, y: x}, ValueError, "attack that takes grad"),
        ({"interval": 0}, ValueError, "interval must be an integer >= 1"),
        ({"interval": 2, "ascent": "momentum"}, ValueError, "interval saves nothing"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm must be positive"),
        ({"autocast": torch.float16}, ValueError, "float16 needs a loss scale"),
        ({"autocast": True}, ValueError, r"autocast must be torch\.bfloat16"),
        ({"cuda_graph": "no"}, ValueError, "cuda_graph must be"),
    ],
)
def test_bad_settings_are_named(net, kwargs, error, match):
    settings = {"optimizer": AWP(net.parameters(), SGD, lr=0.1), "attack": ATTACK, **kwargs}
    with pytest.raises(error, match=match):
        AdversarialStep(net, **settings)


def test_a_step_does_not_start_from_perturbed_weights(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    step = AdversarialStep(net, opt, ATTACK)
    opt.first_step()
    with pytest.raises(RuntimeError, match="starts at the centre"):
        step(*batches(1)[0])
    assert opt.is_perturbed

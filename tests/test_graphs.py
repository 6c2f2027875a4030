"""A captured step is the step: with CUDA graphs, or on a CPU with what stands in for them."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import nn

from awp_optim import AWP, AdversarialStep
from awp_optim._cuda_graphs import graphs
from awp_optim._cuda_graphs.graphs import CaptureError, Graphs
from awp_optim.attacks import FGSM, PGD, Captured
from awp_optim.objectives import AT, MART, TRADES

SGD = torch.optim.SGD


def network(device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )
    return model.to(device, dtype)


def batches(n, device="cpu", size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, size, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n, size), generator=generator)
    return list(zip(x.to(device), y.to(device)))


def mixed(data, dtype=torch.float32):
    """The labels as probabilities, each with some of its neighbour's."""

    def of(y):
        one_hot = torch.eye(3, device=y.device)[y]
        return (0.7 * one_hot + 0.3 * one_hot.roll(1, 0)).to(dtype)

    return [(x, of(y)) for x, y in data]


def awp(model, base=SGD, **kwargs):
    kwargs = {"gamma": 0.0625, "lr": 0.125, "momentum": 0.875, **kwargs}
    return AWP(model.parameters(), base, **kwargs)


def attack(device, **kwargs):
    # A GPU's graph may draw other random numbers than the launches it stands for.
    return PGD(0.1, 0.04, steps=3, random_start=device == "cpu", **kwargs)


def run(step, data, before=lambda i: None):
    torch.manual_seed(3)
    outputs = []
    for i, (x, y) in enumerate(data):
        before(i)
        outputs.append(step(x, y))
    return outputs


def assert_same(a, b, outputs_a=(), outputs_b=(), rtol=None):
    """Exactly, but for the order of sums on a GPU."""
    cuda = next(a.parameters()).is_cuda
    rtol = rtol if rtol is not None else 1e-7 if cuda else 1e-12
    for i, (ours, theirs) in enumerate(zip(outputs_a, outputs_b, strict=True)):
        for name, s, t in zip(ours._fields, ours, theirs):
            torch.testing.assert_close(
                s, t, rtol=rtol, atol=rtol, msg=lambda m, n=name, i=i: f"{n} of step {i}: {m}"
            )
    for (name, s), t in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def trained(device, mode, data, make=awp, before=lambda i, opt, model: None, **kwargs):
    model = network(device)
    opt = make(model)
    settings = {"attack": attack(device), **kwargs}
    step = AdversarialStep(model, opt, cuda_graph=mode, **settings)
    outputs = run(step, data, lambda i: before(i, opt, model))
    return model, outputs, step


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"ascent": "attack"},
        {"ascent": "momentum"},
        {"interval": 3},
        {"interval": 2, "ascent": "attack"},
        {"clip_grad_norm": 0.5},
        {"objective": TRADES(), "attack": PGD(0.1, 0.04, steps=2, loss="kl")},
        {"objective": MART()},
        {"attack": PGD(0.1, 0.04, steps=2, random_start=False, model_mode="train")},
        {"attack": FGSM(0.1, norm="l2")},
    ],
    ids=str,
)
def test_captured_equals_the_readable_step(graph_device, kwargs):
    device, counts = graph_device
    if device == "cuda" and kwargs.get("objective") == TRADES():
        pytest.skip("the random start decides")
    data = batches(10, device)
    readable, truth, _ = trained(device, False, data, lambda m: awp(m, foreach=False), **kwargs)
    model, outputs, _ = trained(device, True, data, **kwargs)
    assert_same(model, readable, outputs, truth)
    assert counts.captures == (1 if "interval" not in kwargs else 2)
    assert counts.replays >= 5


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"ascent": "attack"},
        {"interval": 3},
        {"objective": AT(0.1)},
        {"objective": TRADES(6.0, 0.1), "attack": PGD(0.1, 0.04, steps=2, loss="kl")},
        {"objective": MART(6.0, 0.1)},
        {"attack": PGD(0.1, 0.04, steps=2, restarts=2)},
    ],
    ids=str,
)
def test_captured_with_mixed_labels(graph_device, kwargs):
    device, counts = graph_device
    if device == "cuda" and "attack" in kwargs:
        pytest.skip("the random start decides")
    data = mixed(batches(10, device))
    eager, truth, _ = trained(device, False, data, **kwargs)
    model, outputs, _ = trained(device, True, data, **kwargs)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == (1 if "interval" not in kwargs else 2)
    assert counts.replays >= 5


def test_each_kind_of_labels_has_its_graph(graph_device):
    device, counts = graph_device
    data = batches(24, device)
    kinds = data[:8], mixed(data[8:16]), mixed(data[16:], torch.float64)
    turns = [batch for turn in zip(*kinds) for batch in turn]
    eager, truth, _ = trained(device, False, turns)
    model, outputs, _ = trained(device, True, turns)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 3
    assert counts.replays >= 3 * 5


def test_labels_that_require_gradients_get_none_from_a_graph(graph_device):
    device, counts = graph_device
    data = mixed(batches(8, device))
    eager, truth, _ = trained(device, False, data)
    model, outputs, step = trained(device, True, [(x, y.clone().requires_grad_()) for x, y in data])
    assert_same(model, eager, outputs, truth)
    assert counts.replays >= 4
    (graph,) = step._graphs._graphs.values()
    assert not any(t.requires_grad for t in graph._inputs)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_captured_attack_with_mixed_labels(graph_device, loss):
    device, counts = graph_device
    if device == "cuda" and loss == "kl":
        pytest.skip("the random start decides")
    model = network(device)
    plain = PGD(0.1, 0.04, steps=3, loss=loss, random_start=loss == "kl")
    captured = Captured(plain, cuda_graph=True)
    data = batches(16, device)
    for i, pair in enumerate(zip(data[:8], mixed(data[8:]))):
        for x, y in pair:
            results = []
            for a in (captured, plain):
                torch.manual_seed(i)
                results.append(a(model, x, y.requires_grad_(y.is_floating_point())))
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert counts.captures == 2
    assert counts.replays == 12
    buffers = [t for graph in captured._graphs._graphs.values() for t in graph._inputs]
    assert not any(t.requires_grad for t in buffers)
    with pytest.raises(TypeError, match="needs class indices"):
        Captured(PGD(loss="cw"))(model, x, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SGD(m.parameters(), lr=0.125),
        lambda m: SGD(m.parameters(), lr=0.125, momentum=0.5, nesterov=True, weight_decay=0.125),
        lambda m: awp(m, momentum=0.0, norm="l1"),
        lambda m: awp(m, ascent_steps=2),
        lambda m: awp(m, direction="momentum"),
        lambda m: AWP(m.parameters(), torch.optim.Adam, gamma=0.0625, lr=0.0625),
        lambda m: AWP(m.parameters(), torch.optim.RMSprop, gamma=0.0625, lr=0.0625),
        lambda m: AWP(
            [{"params": [m[0].weight], "gamma": 0.25, "lr": 0.5}, {"params": m[4].parameters()}],
            SGD,
            gamma=0.0,
            lr=0.125,
        ),
    ],
)
def test_any_optimizer(graph_device, make):
    device, counts = graph_device
    data = batches(8, device)
    eager, truth, _ = trained(device, False, data, make)
    model, outputs, _ = trained(device, True, data, make)
    assert_same(model, eager, outputs, truth, rtol=1e-7)
    assert counts.captures == 1
    assert counts.replays >= 4


def test_algorithm_2_with_alternations(graph_device):
    device, counts = graph_device
    data, make = batches(6, device), lambda m: awp(m, ascent_steps=4)
    eager, truth, _ = trained(device, False, data, make, alternations=2)
    model, outputs, _ = trained(device, True, data, make, alternations=2)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 1


def test_learning_rate_and_gamma_change_without_a_new_graph(graph_device):
    device, counts = graph_device
    data = batches(10, device)

    def before(i, opt, model):
        opt.param_groups[0]["lr"] = 2.0**-i
        opt.param_groups[0]["gamma"] = 0.25 if i % 2 else 0.03125

    eager, truth, _ = trained(device, False, data, before=before)
    model, outputs, step = trained(device, True, data, before=before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 1
    assert step.optimizer.param_groups[0]["lr"] == 2.0**-9  # the caller's number, not a tensor
    assert step.optimizer.param_groups[0]["fused"] is None


def test_a_scheduler_drives_a_captured_step(graph_device):
    device, counts = graph_device
    results = []
    for mode in (False, True):
        model = network(device)
        opt = awp(model)
        step = AdversarialStep(model, opt, attack(device), cuda_graph=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
            torch.manual_seed(3)
            for x, y in batches(8, device):
                step(x, y)
                scheduler.step()
        results.append(model)
    assert_same(*results)
    assert counts.captures == 1


def test_tensors_as_learning_rate_and_gamma_are_read_at_every_replay(graph_device):
    device, counts = graph_device
    data = batches(8, device)
    lr, gamma = (torch.tensor(v, device=device) for v in (0.125, 0.0625))

    def make(model):
        return AWP(model.parameters(), SGD, gamma=gamma, lr=lr, fused=True)

    def before(i, opt, model):
        lr.fill_(2.0**-i)
        gamma.fill_(2.0 ** -(i + 2))

    eager, truth, _ = trained(device, False, data, make, before)
    model, outputs, _ = trained(device, True, data, make, before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 1


def test_another_setting_moves_the_update_out_of_the_graph(graph_device):
    device, counts = graph_device
    data = batches(16, device)

    def before(i, opt, model):
        opt.param_groups[0]["weight_decay"] = 0.25 if i >= 5 else 0.0
        opt.param_groups[0]["momentum"] = 0.5 + 2.0**-i if i >= 10 else 0.875

    eager, truth, _ = trained(device, False, data, before=before)
    model, outputs, _ = trained(device, True, data, before=before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 2
    assert counts.replays >= 9  # from then on every change is free


def test_hooks_on_the_update_run_at_every_step(graph_device):
    device, counts = graph_device
    model, seen = network(device), []
    opt = awp(model)
    opt.base_optimizer.register_step_post_hook(lambda *a: seen.append("base"))
    opt.register_step_pre_hook(lambda *a: seen.append("awp"))
    run(AdversarialStep(model, opt, attack(device), cuda_graph=True), batches(8, device))
    assert seen == ["awp", "base"] * 8
    assert counts.replays >= 4
    eager, _, _ = trained(device, False, batches(8, device))
    assert_same(model, eager)


def test_a_smaller_last_batch(graph_device):
    device, counts = graph_device
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(16, device), [8, 8, 8, 5] * 4)]
    eager, truth, _ = trained(device, False, data)
    model, outputs, _ = trained(device, True, data)
    assert_same(model, eager, outputs, truth)
    assert [len(out.logits) for out in outputs[:4]] == [8, 8, 8, 5]
    assert counts.captures == 2  # a graph each, once they have come often enough


def test_what_the_caller_changes_meanwhile(graph_device):
    """Modes, frozen weights, gamma switched on, state loaded: each asks for other kernels."""
    device, counts = graph_device
    data = batches(40, device)
    saved = copy.deepcopy(awp(network(device)).state_dict())

    def before(i, opt, model):
        if i in (5, 10):
            model.train(i != 5)
        if i in (15, 20):
            model[0].weight.requires_grad_(i != 15)
            opt.zero_grad()
        if i in (25, 30):
            opt.param_groups[0]["gamma"] = 0.0 if i == 25 else 0.0625
        if i == 35:
            state = opt.state_dict()
            opt.load_state_dict(copy.deepcopy(state))  # the same numbers in other memory
            for p in model.parameters():
                p.data = p.data.clone()
        assert saved["param_groups"][0].keys() == opt.state_dict()["param_groups"][0].keys()

    eager, truth, _ = trained(device, False, data, before=before)
    model, outputs, _ = trained(device, True, data, before=before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures >= 5


@pytest.mark.parametrize("surrounding", [False, True])
def test_bf16_and_channels_last(graph_device, surrounding):
    """By the step's own autocast or by one around it, whose cache of weights must not be used."""
    device, counts = graph_device
    results = []
    for mode in (False, True):
        model = network(device, torch.float32).to(memory_format=torch.channels_last)
        kwargs = {} if surrounding else {"autocast": torch.bfloat16}
        step = AdversarialStep(model, awp(model), attack(device), cuda_graph=mode, **kwargs)
        torch.manual_seed(3)
        for x, y in batches(8, device):
            x = x.float().to(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=surrounding):
                model(x).sum()  # fills the cache
                out = step(x, y)
        assert out.x_adv.is_contiguous(memory_format=torch.channels_last)
        assert out.logits.dtype == torch.bfloat16
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    assert counts.captures == 1


def test_several_steps_in_one_autocast_region(graph_device):
    """What the caller computes between them sees the weights of now."""
    device, counts = graph_device
    model = network(device, torch.float32)
    step = AdversarialStep(model, awp(model), attack(device), cuda_graph=True)
    with torch.autocast(device, torch.bfloat16):
        for x, y in batches(8, device):
            step(x.float(), y)
            ours = model(x.float())
            with torch.autocast(device, torch.bfloat16, cache_enabled=False):
                assert torch.equal(ours, model(x.float()))
    assert counts.replays >= 4


class Weighted:
    """An objective with a number that the caller changes as training goes on."""

    needs_natural = False
    factor = 1.0

    def __call__(self, logits_adv, logits_nat, y):
        return self.factor * nn.functional.cross_entropy(logits_adv, y)


@pytest.mark.parametrize("what", ["objective", "momentum of a BatchNorm", "dropout"])
def test_numbers_of_the_host_are_part_of_the_key(graph_device, what):
    device, counts = graph_device
    if device == "cuda" and what == "dropout":
        pytest.skip("a graph may draw other random numbers")
    results = []
    for mode in (False, True):
        model = network(device)
        model.insert(3, nn.Dropout(0.0))
        objective = Weighted()
        opt = awp(model)
        step = AdversarialStep(model, opt, attack(device), objective, cuda_graph=mode)
        torch.manual_seed(3)
        for i, (x, y) in enumerate(batches(10, device)):
            if i == 5 and what == "objective":
                objective.factor = 0.25
            elif i == 5 and what == "dropout":
                model[3].p = 0.5
            elif i == 5:
                model[1].momentum = 0.5
            step(x, y)
        results.append(model)
    assert_same(*results)
    assert counts.captures == 2


def test_an_awp_with_a_step_of_its_own(graph_device):
    device, counts = graph_device
    calls = []

    class Own(AWP):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    def make(model):
        return Own(model.parameters(), SGD, gamma=0.0625, lr=0.125)

    trained(device, True, batches(8, device), make)
    assert len(calls) == 8
    assert counts.replays >= 4


def test_a_learning_rate_in_float64_on_the_device(graph_device):
    device, counts = graph_device
    lr = torch.tensor(0.125, device=device, dtype=torch.float64)

    def make(model):
        return AWP(model.parameters(), SGD, gamma=0.0625, lr=lr, momentum=0.875)

    data = batches(8, device)
    eager, truth, _ = trained(device, False, data, make)
    model, outputs, _ = trained(device, True, data, make)
    assert_same(model, eager, outputs, truth)
    assert counts.replays >= 4


@pytest.mark.parametrize("case", ["gamma", "group", "frozen", "loaded", "one cycle"])
@pytest.mark.parametrize("interval", [1, 4])
def test_what_changes_while_a_direction_is_kept(graph_device, case, interval):
    device, counts = graph_device
    results = []
    for mode in (False, True):
        model = network(device)
        params = [{"params": [model[0].weight]}] if case == "group" else model.parameters()
        opt = AWP(params, SGD, gamma=0.0625, lr=0.125, momentum=0.875)
        step = AdversarialStep(model, opt, attack(device), interval=interval, cuda_graph=mode)
        scheduler = None
        if case == "one cycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.125, total_steps=40)
        torch.manual_seed(3)
        kept, saved = [], {}
        for i, (x, y) in enumerate(batches(38, device)):
            if case == "gamma":
                opt.param_groups[0]["gamma"] = 0.0 if i < 13 else 0.0625
            elif case == "group" and i == 13:
                opt.add_param_group({"params": [model[4].weight], "gamma": 0.25})
            elif case == "frozen" and i in (13, 26):
                model[0].weight.requires_grad_(i == 26)
            elif case == "loaded" and i == 26:
                step.load_state_dict(copy.deepcopy(saved))
            if case == "loaded" and i == 13:
                saved = copy.deepcopy(step.state_dict())
            step(x, y)
            if scheduler:
                scheduler.step()
            kept.append({k: v.clone() for k, v in step.state_dict()["kept"].items()})
        results.append((model, kept))
    (eager, kept_eager), (model, kept) = results
    # Among this scheduler's learning rates are some that float32 has not.
    rtol = 1e-6 if device == "cuda" or case == "one cycle" else 1e-10
    assert_same(model, eager, rtol=rtol)
    torch.testing.assert_close(kept, kept_eager, rtol=rtol, atol=rtol)
    assert counts.replays >= 10


def test_a_weight_that_joins_later(graph_device):
    """Some momenta are there, others not: more than the fused update can do."""
    device, counts = graph_device
    data = batches(12, device)

    def before(i, opt, model):
        model[0].weight.requires_grad_(i >= 6)

    eager, truth, _ = trained(device, False, data, before=before)
    model, outputs, _ = trained(device, True, data, before=before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures == 2


def test_every_replay_draws_fresh_random_numbers(graph_device):
    device, counts = graph_device
    model = network(device)
    step = AdversarialStep(
        model, awp(model, lr=0.0, momentum=0.0), PGD(0.1, steps=0), cuda_graph=True
    )
    (x, y), *_ = batches(1, device)
    x_advs = [step(x, y).x_adv for _ in range(8)]
    assert counts.replays >= 5
    deltas = torch.stack([x_adv - x for x_adv in x_advs])
    assert len(torch.unique(deltas[:, 0, 0, 2, 2])) == 8  # and outputs are the caller's own
    assert deltas.abs().max() <= 0.1 + 1e-12


def test_after_a_replay_all_is_as_after_a_step(graph_device):
    device, _ = graph_device
    data = batches(6, device)
    eager, _, _ = trained(device, False, data)
    model, outputs, step = trained(device, True, data)
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
    step.optimizer.zero_grad()
    step(*data[0])
    assert all(p.grad is not None for p in model.parameters())
    assert not step.optimizer.is_perturbed
    assert model[1].num_batches_tracked == 7
    assert not any(t.requires_grad for t in outputs[-1])
    step.optimizer.state_dict()  # refuses while perturbed


@pytest.mark.parametrize("inside", [True, False])
def test_a_capture_that_fails_changes_nothing(graph_device, inside, monkeypatch):
    device, _ = graph_device
    model = network(device)
    opt = awp(model)
    if not inside:
        opt.register_step_pre_hook(lambda *a: None)
    step = AdversarialStep(model, opt, attack(device), cuda_graph=True)
    run(step, batches(3, device))
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    descend = step._descend

    def failing(*args):
        if step._graphs.is_recording:
            raise ValueError("a reason")
        return descend(*args)

    monkeypatch.setattr(step, "_descend", failing)
    with pytest.raises(CaptureError, match=r"training step cannot be captured.*a reason"):
        step(*batches(1, device)[0])
    assert not opt.is_perturbed
    after = model.state_dict(), opt.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_auto_does_without_where_capturing_fails(graph_device, monkeypatch):
    device, _ = graph_device

    class Net(nn.Sequential):
        def forward(self, x):
            if step._graphs.is_recording:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().forward(x)

    eager, truth, _ = trained(device, False, batches(8, device))
    model = Net(*network(device))
    step = AdversarialStep(model, awp(model), attack(device))
    with pytest.warns(UserWarning, match="runs without one from now on") as warned:
        outputs = run(step, batches(8, device))
    assert len(warned) == 1
    assert_same(model, eager, outputs, truth)


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(()).item()])
def test_random_numbers_of_the_host_are_no_matter_for_a_graph(graph_device, draw):
    device, _ = graph_device
    if device == "cpu" and draw is not random.random:
        pytest.skip("on a CPU the device's generator is the host's")

    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * (0.5 + draw())

    model = Net(*network(device))
    step = AdversarialStep(model, awp(model), attack(device), cuda_graph=True)
    with pytest.raises(CaptureError, match="draws random numbers on the host"):
        run(step, batches(8, device))
    assert not step.optimizer.is_perturbed


def test_an_error_in_the_update_after_a_replay_brings_the_weights_home(graph_device):
    device, counts = graph_device
    model, fail = network(device), []
    opt = awp(model)

    def hook(*args):
        if fail:
            raise KeyboardInterrupt

    opt.register_step_pre_hook(hook)
    step = AdversarialStep(model, opt, attack(device), cuda_graph=True)
    run(step, batches(6, device))
    assert counts.replays
    before = [p.detach().clone() for p in model.parameters()]
    fail.append(True)
    with pytest.raises(KeyboardInterrupt):
        step(*batches(1, device)[0])
    assert not opt.is_perturbed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_ctrl_c_before_a_replay_takes_nothing_back(graph_device):
    device, counts = graph_device
    model = network(device)
    opt = awp(model)
    opt.register_step_pre_hook(lambda *a: None)  # the update is not in the graph
    step = AdversarialStep(model, opt, attack(device), cuda_graph=True)
    run(step, batches(6, device))
    assert counts.replays
    before = copy.deepcopy(model.state_dict())

    class Interrupted:
        def copy_(self, *args, **kwargs):
            raise KeyboardInterrupt

    (graph,) = step._graphs._graphs.values()
    graph._inputs[0] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        step(*batches(1, device)[0])
    assert not opt.is_perturbed
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spoil", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_after_a_spoiled_capture_the_device_is_as_before(spoil):
    class Net(nn.Sequential):
        def forward(self, x):
            spoil(x)
            return super().forward(x)

    eager, truth, _ = trained("cuda", False, batches(8, "cuda"))
    stream = torch.cuda.current_stream()
    model = Net(*network("cuda"))
    step = AdversarialStep(model, awp(model), attack("cuda"))
    with pytest.warns(UserWarning, match="runs without one from now on"):
        outputs = run(step, batches(8, "cuda"))
    assert_same(model, eager, outputs, truth)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert len(torch.rand(9, device="cuda").unique()) == 9
    trained("cuda", True, batches(8, "cuda"))  # others can be captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inside_a_graph_of_the_callers_own():
    model, (x, y) = network("cuda"), batches(1, "cuda")[0]
    step = AdversarialStep(model, awp(model), attack("cuda"), cuda_graph=False)
    captured = Captured(attack("cuda"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x_adv = captured(model, x, y)
    graph.replay()
    torch.testing.assert_close(x_adv, attack("cuda")(model, x, y), rtol=1e-9, atol=1e-9)


def test_settings_are_checked_before_a_replay(graph_device):
    device, _ = graph_device
    model, _, step = trained(device, True, batches(6, device))
    before = [p.detach().clone() for p in model.parameters()]
    step.optimizer.param_groups[0]["gamma"] = -1.0
    with pytest.raises(ValueError, match="gamma must be finite"):
        step(*batches(1, device)[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_graph_where_there_are_none_is_an_error():
    model = network()
    step = AdversarialStep(model, awp(model), attack("cpu"), cuda_graph=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no CUDA graphs"):
        step(*batches(1)[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_auto_leaves_functions_of_the_callers_own_alone(graph_device):
    device, counts = graph_device
    data, calls = batches(6, device), []

    def own(model, x, y):
        calls.append(1)
        return x

    trained(device, "auto", data, attack=own)
    assert len(calls) == 6
    assert counts.captures == 0
    trained(device, "auto", data)
    assert counts.captures == 1


def test_only_so_many_graphs_are_kept(graph_device, monkeypatch):
    device, counts = graph_device
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    call = Graphs(True, "it")
    # Each is captured at its third call; 3 takes the place of 2, which was used before 1.
    for n in (1, 1, 1, 2, 2, 2, 1, 3, 3, 3, 1):
        x = torch.arange(n, device=device, dtype=torch.float64)
        (y,) = call(lambda x: (x * 2,), (x,), "key")
        assert torch.equal(y, x * 2)
    assert len(call._graphs) == 2
    assert counts.captures == 3
    call(lambda x: (x * 2,), (torch.ones(2, device=device, dtype=torch.float64),), "key")
    assert counts.captures == 4


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_a_captured_attack_is_the_attack(graph_device, loss, model_mode):
    device, counts = graph_device
    model, twin = network(device), network(device)
    plain = PGD(0.1, 0.04, steps=3, loss=loss, model_mode=model_mode, random_start=loss == "kl")
    captured = Captured(plain, cuda_graph=True)
    for i, (x, y) in enumerate(batches(6, device)):
        y = None if loss == "kl" else y
        results = []
        for m, a in ((model, captured), (twin, plain)):
            torch.manual_seed(i)
            results.append(a(m, x, y))
        if device == "cpu" or loss == "ce":
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert counts.captures == 1
    assert counts.replays == 4
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert_same(model, twin, rtol=1e-6)
    # The weights may change in place, and another model is another model.
    for m in (model, twin):
        with torch.no_grad():
            m[0].weight.mul_(-1)
    torch.manual_seed(0)
    ours = captured(model, x, y)
    torch.manual_seed(0)
    theirs = plain(twin, x, y)
    if device == "cpu" or loss == "ce":
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert captured(network(device), x, y).shape == x.shape
    assert counts.captures == 1
    # The weights and the buffers may lie elsewhere.
    state = copy.deepcopy(model.state_dict())
    state["1.running_mean"] += 1.0
    for i in range(4):
        if i == 1:
            model.load_state_dict(state, assign=True)
        elif i == 2:
            model[4].weight.data = torch.randn_like(model[4].weight)
        torch.manual_seed(0)
        ours = captured(model, x, y)
        torch.manual_seed(0)
        if device == "cpu" or loss == "ce":
            torch.testing.assert_close(ours, plain(model, x, y), rtol=1e-12, atol=1e-12)
    # Of a function nobody knows what it works with.
    with pytest.raises(ValueError, match=r"wrap the function in an nn\.Module"):
        captured(lambda x: model(x), x, y)
    for training in [False] * 5 + [True]:
        model.train(training)
        torch.manual_seed(0)
        ours = Captured(plain)(lambda x: model(x), x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, plain(lambda x: model(x), x, y), rtol=1e-6, atol=1e-6)


def test_autocast_switched_on_meanwhile(graph_device):
    device, counts = graph_device
    model = network(device, torch.float32)
    step = AdversarialStep(model, awp(model), attack(device), cuda_graph=True)
    for i, (x, y) in enumerate(batches(10, device)):
        with torch.autocast(device, torch.bfloat16, enabled=i >= 5):
            out = step(x.float(), y)
        assert out.logits.dtype == (torch.bfloat16 if i >= 5 else torch.float32)
    assert counts.captures == 2


def test_captured_takes_an_attack():
    with pytest.raises(TypeError, match="attack must be one of this package's"):
        Captured(lambda m, x, y: x)
    with pytest.raises(ValueError, match="cuda_graph must be"):
        Captured(PGD(), cuda_graph="maybe")
    with pytest.raises(ValueError, match="no CUDA graphs"):
        Captured(PGD(), cuda_graph=True)(network(), *batches(1)[0])

"""A captured step equals the eager one: with CUDA graphs, or with their stand-in on a CPU."""

from __future__ import annotations

import copy
import gc
import types
import warnings
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from awp_optim import AWP, AdversarialStep, frozen_batch_norm
from awp_optim._cuda_graphs.graphs import CaptureError
from awp_optim.attacks import FGSM, PGD, Captured
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES
from tests.toolbox import batches, mixed, network

from .conftest import (
    SGD,
    assert_captured_equals_eager,
    assert_same,
    attack,
    awp,
    graphs_of,
    is_capturing,
    run,
    trained,
)

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


KL = PGD(0.1, 0.04, steps=2, loss="kl")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"ascent": "attack"},
        {"clip_grad_norm": 0.5},
        {"objective": TRADES(), "attack": KL},
        {"objective": MART()},
        {"objective": GKL(), "attack": KL},
        {"objective": SCORE(), "attack": replace(KL, loss="score")},
        {"ascent_below": 1.1},
        {"ascent_below": 1.1, "objective": TRADES(), "attack": KL, "mixed": True},
        {"attack": PGD(0.1, 0.04, steps=2, random_start=False, model_mode="train")},
        {"attack": FGSM(0.1, norm="l2")},
        {"mixed": True, "ascent": "attack"},
        {"mixed": True, "objective": AT(0.1)},
        {"mixed": True, "objective": TRADES(6.0, 0.1), "attack": KL},
        {"mixed": True, "objective": MART(6.0, 0.1)},
        {"mixed": True, "attack": PGD(0.1, 0.04, steps=2, restarts=2)},
    ],
    ids=str,
)
def test_captured_equals_the_readable_step(graph_device, kwargs):
    device, counts = graph_device
    if device == "cuda" and getattr(kwargs.get("attack"), "random_start", False):
        pytest.skip("a graph may draw other random numbers")
    kwargs = dict(kwargs)
    data = mixed(batches(10, device)) if kwargs.pop("mixed", False) else batches(10, device)
    readable, truth, _ = trained(device, False, data, lambda m: awp(m, foreach=False), **kwargs)
    model, outputs, _ = trained(device, True, data, **kwargs)
    assert_same(model, readable, outputs, truth)
    assert counts.captures == 1
    assert counts.replays >= 5


def test_a_network_inside_torch_compile(graph_device):
    """The wrapper has no mode of its own until somebody sets it."""
    device, counts = graph_device
    torch._dynamo.reset()
    data = batches(8, device)
    eager, truth, _ = trained(device, False, data)
    net = network(device)
    step = AdversarialStep(
        torch.compile(net, backend="eager"), awp(net), attack(device), cuda_graph=True
    )
    assert_same(net, eager, run(step, data), truth)
    assert (counts.captures, counts.replays) == (1, 5)


def test_each_kind_of_labels_has_its_graph(graph_device):
    device, _ = graph_device
    data = batches(24, device)
    kinds = data[:8], mixed(data[8:16]), mixed(data[16:], dtype=torch.float64)
    turns = [batch for turn in zip(*kinds) for batch in turn]
    assert_captured_equals_eager(graph_device, turns, captures=3, replays=15)


def test_labels_that_require_gradients_get_none_from_a_graph(graph_device):
    device, counts = graph_device
    data = mixed(batches(8, device))
    eager, truth, _ = trained(device, False, data)
    data = [(x, y.clone().requires_grad_()) for x, y in data]
    model, outputs, _ = trained(device, True, data)
    assert_same(model, eager, outputs, truth)
    assert counts.replays >= 4
    assert data[-1][1].grad is None


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (lambda m: SGD(m.parameters(), lr=0.125), {}),
        (lambda m: SGD(m.parameters(), 0.125, 0.5, nesterov=True, weight_decay=0.125), {}),
        (lambda m: awp(m, momentum=0.0, norm="l1"), {}),
        (lambda m: awp(m, ascent_steps=4), {"alternations": 2}),
        (lambda m: AWP(m.parameters(), torch.optim.Adam, gamma=0.0625, lr=0.0625), {}),
        (lambda m: AWP(m.parameters(), torch.optim.RMSprop, gamma=0.0625, lr=0.0625), {}),
        (
            lambda m: AWP(
                [{"params": [m[0].weight], "gamma": 0.25}, {"params": m[4].parameters()}],
                SGD,
                gamma=0.0,
                lr=0.125,
            ),
            {},
        ),
    ],
)
def test_any_optimizer(graph_device, make, kwargs):
    data = batches(8, graph_device[0])
    assert_captured_equals_eager(graph_device, data, make=make, rtol=1e-7, **kwargs)


def distance(z, target):
    return (z - target).square().sum(1)


class Distance:
    needs_natural = False

    def __call__(self, z_adv, z_nat, target):
        return distance(z_adv, target).mean()


def test_targets_that_are_no_labels(graph_device):
    data = [
        (x, torch.randn(8, 3, dtype=x.dtype).to(x.device)) for x, _ in batches(8, graph_device[0])
    ]
    settings = {"attack": replace(KL, loss=distance, start_std=0.01), "objective": Distance()}
    assert_captured_equals_eager(graph_device, data, **settings)


def test_class_probabilities_are_read_at_every_replay(graph_device):
    device, _ = graph_device
    probs = torch.empty(3, 3, device=device, dtype=torch.float64)

    def before(i, opt, model):
        rows = torch.Generator().manual_seed(i)
        probs.copy_(torch.rand(3, 3, generator=rows, dtype=torch.float64).softmax(1))

    attack, objective = replace(KL, random_start=True), GKL(class_probs=probs)
    data = batches(10, device)
    kwargs = {"attack": attack, "objective": objective, "before": before}
    assert_captured_equals_eager(graph_device, data, **kwargs)


def test_other_class_probabilities_and_losses_to_stay_below_get_their_own_graph(graph_device):
    device, counts = graph_device
    data, (one, two) = batches(15, device), torch.rand(2, 3, 3, dtype=torch.float64)
    opt = awp(model := network(device))
    step = AdversarialStep(model, opt, KL, GKL(class_probs=one.to(device)), cuda_graph=True)
    run(step, data[:5])
    step.objective = GKL(class_probs=two.to(device))
    run(step, data[5:10])
    step.ascent_below = 1.5
    run(step, data[10:])
    assert counts.captures == 3


def test_learning_rate_and_gamma_change_without_a_new_graph(graph_device):
    schedulers = {}

    def before(i, opt, model):
        opt.param_groups[0]["gamma"] = 0.25 if i % 2 else 0.03125
        if i == 0:
            schedulers[opt] = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        else:
            schedulers[opt].step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = batches(10, graph_device[0])
        step = assert_captured_equals_eager(graph_device, data, before=before)
    # The caller's number, not a tensor.
    assert step.optimizer.param_groups[0]["lr"] == 0.125 * 2.0**-9
    assert step.optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_as_learning_rate_and_gamma_are_read_at_every_replay(graph_device, dtype):
    """The fused update reads float32; with other learning rates it is not captured."""
    device, _ = graph_device
    lr, gamma = (torch.tensor(v, device=device, dtype=dtype) for v in (0.125, 0.0625))

    def make(model):
        return AWP(model.parameters(), SGD, gamma=gamma, lr=lr, momentum=0.875)

    def before(i, opt, model):
        lr.fill_(2.0**-i)
        gamma.fill_(2.0 ** -(i + 2))

    data = batches(8, device)
    assert_captured_equals_eager(graph_device, data, make=make, before=before)


def test_another_setting_moves_the_update_out_of_the_graph(graph_device):
    def before(i, opt, model):
        opt.param_groups[0]["weight_decay"] = 0.25 if i >= 5 else 0.0
        opt.param_groups[0]["momentum"] = 0.5 + 2.0**-i if i >= 10 else 0.875

    data = batches(16, graph_device[0])
    # From then on every change is free.
    assert_captured_equals_eager(graph_device, data, captures=2, replays=9, before=before)


class OwnStep(AWP):
    def step(self, closure=None):
        self.seen.append("awp")
        return super().step(closure)


@pytest.mark.parametrize("cls", [AWP, OwnStep])
def test_code_of_the_callers_around_the_update_runs_at_every_step(graph_device, cls):
    device, counts = graph_device
    model = network(device)
    opt = cls(model.parameters(), SGD, gamma=0.0625, lr=0.125, momentum=0.875)
    opt.seen = []
    opt.base_optimizer.register_step_post_hook(lambda *a: opt.seen.append("base"))
    if cls is AWP:
        opt.register_step_pre_hook(lambda *a: opt.seen.append("awp"))
    run(AdversarialStep(model, opt, attack(device), cuda_graph=True), batches(8, device))
    assert opt.seen == ["awp", "base"] * 8
    assert counts.replays >= 4
    assert_same(model, trained(device, False, batches(8, device))[0])


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_step_is_never_replayed(graph_device, loaded):
    """Without momenta an update starts them; it must not do so again and again."""

    def before(i, opt, model):
        if i % 5 == 0 and loaded:
            opt.load_state_dict({**opt.state_dict(), "state": {}})
        elif i % 5 == 0:
            opt.state.clear()

    assert_captured_equals_eager(graph_device, batches(25, graph_device[0]), None, 1, before=before)


class Capturable(torch.optim.Optimizer):
    """SGD with momentum as an optimizer of the caller's own, which says that it is capturable."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "capturable": True})

    @torch.no_grad()
    def step(self):
        self._accelerator_graph_capture_health_check()
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum"] = p.grad.clone()
                else:
                    self.state[p]["momentum"].mul_(0.875).add_(p.grad)
                p.sub_(self.state[p]["momentum"] * group["lr"])


@pytest.mark.skipif(
    not hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"),
    reason="this torch has another name for the check",
)
def test_an_optimizer_that_says_it_is_capturable(cpu_graphs, monkeypatch, recwarn):
    """It starts its state outside of the graph, and is not warned of the steps before the first."""
    gpu, stream = torch.device("cuda"), types.SimpleNamespace(is_capturing=lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kwargs: gpu)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)

    def make(model):
        return copy.deepcopy(AWP.wrap(Capturable(model.parameters(), lr=0.125), gamma=0.0625))

    def before(i, opt, model):
        opt.param_groups[0]["params"][:] = model.parameters()  # after the copy
        if i % 5 == 0:
            opt.state.clear()

    data = batches(20)
    model, outputs, _ = trained("cpu", True, data, make, before)
    assert not [w for w in recwarn if "capturable" in str(w.message)]
    assert cpu_graphs.captures >= 1
    eager, truth, _ = trained("cpu", False, data, make, before)
    assert_same(model, eager, outputs, truth)


@pytest.mark.parametrize("change", ["weights", "state", "a weight joins"])
def test_momenta_missing_or_laid_out_unlike_the_weights(graph_device, change):
    """More than the fused update can do; plain SGD can."""

    def before(i, opt, model):
        weight = model[0].weight
        if change == "a weight joins":
            weight.requires_grad_(i >= 6)
        elif i == 4 and change == "weights":
            model.to(memory_format=torch.channels_last)
        elif i == 4:
            buffer = opt.state[weight]["momentum_buffer"]
            strided = torch.empty_strided(buffer.shape, (9, 9, 1, 3)).to(buffer)
            opt.state[weight]["momentum_buffer"] = strided.copy_(buffer)

    data = batches(12, graph_device[0])
    assert_captured_equals_eager(graph_device, data, captures=2, before=before)


def test_a_smaller_last_batch(graph_device):
    device, _ = graph_device
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(16, device), [8, 8, 8, 5] * 4)]
    # A graph each, once they have come often enough.
    assert_captured_equals_eager(graph_device, data, captures=2)


def test_what_the_caller_changes_meanwhile(graph_device):
    """Modes, frozen weights, gamma switched on, state loaded: each asks for other kernels."""
    device, counts = graph_device
    data = batches(40, device)
    names = awp(network(device)).state_dict()["param_groups"][0].keys()

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
        assert names == opt.state_dict()["param_groups"][0].keys()

    eager, truth, _ = trained(device, False, data, before=before)
    model, outputs, _ = trained(device, True, data, before=before)
    assert_same(model, eager, outputs, truth)
    assert counts.captures >= 5


class Weighted:
    """An objective with a number that the caller changes in training."""

    needs_natural = False
    factor = 1.0

    def __call__(self, logits_adv, logits_nat, y):
        return self.factor * nn.functional.cross_entropy(logits_adv, y)


@pytest.mark.parametrize("what", ["objective", "momentum", "frozen"])
def test_numbers_of_the_host_are_part_of_the_key(graph_device, what):
    device, counts = graph_device
    results = []
    for mode in (False, True):
        model = network(device)
        objective = Weighted()
        step = AdversarialStep(model, awp(model), attack(device), objective, cuda_graph=mode)
        torch.manual_seed(3)
        for i, (x, y) in enumerate(batches(12, device)):
            if i == 6 and what == "objective":
                objective.factor = 0.25
            elif i == 6 and what == "momentum":
                model[1].momentum = 0.5
            is_frozen = i >= 6 and what == "frozen"
            with frozen_batch_norm(model) if is_frozen else nullcontext():
                step(x, y)
        results.append(model)
    assert_same(*results)
    assert counts.captures == 2


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
    """What the caller computes between them uses the present weights."""
    device, counts = graph_device
    model = network(device, torch.float32)
    step = AdversarialStep(model, awp(model), attack(device), cuda_graph=True)
    with torch.autocast(device, torch.bfloat16):
        for x, y in batches(8, device):
            step(x.float(), y)
            ours = model(x.float())  # its autograd graph is there when the next step is captured
            with torch.autocast(device, torch.bfloat16, cache_enabled=False):
                assert torch.equal(ours, model(x.float()))
    assert counts.replays >= 4


def test_autocast_switched_on_meanwhile(graph_device):
    device, counts = graph_device
    model = network(device, torch.float32)
    step = AdversarialStep(model, awp(model), attack(device), cuda_graph=True)
    for i, (x, y) in enumerate(batches(12, device)):
        with torch.autocast(device, torch.bfloat16, enabled=i >= 6):
            out = step(x.float(), y)
        assert out.logits.dtype == (torch.bfloat16 if i >= 6 else torch.float32)
    assert counts.captures == 2


def test_every_replay_draws_fresh_random_numbers(graph_device):
    device, counts = graph_device
    model = network(device)
    opt = awp(model, lr=0.0, momentum=0.0)
    step = AdversarialStep(model, opt, PGD(0.1, steps=0), cuda_graph=True)
    (x, y), *_ = batches(1, device)
    x_advs = [step(x, y).x_adv for _ in range(8)]
    assert counts.replays >= 5
    deltas = torch.stack([x_adv - x for x_adv in x_advs])
    assert len(torch.unique(deltas[:, 0, 0, 2, 2])) == 8  # and outputs are the caller's own
    assert deltas.abs().max() <= 0.1 + 1e-12


def test_a_replay_leaves_the_host_as_a_step_does(graph_device):
    device, _ = graph_device
    data = batches(7, device)
    eager, _, _ = trained(device, False, data)
    model, outputs, step = trained(device, True, data)
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
    step.optimizer.zero_grad()
    step(*data[0])
    assert all(p.grad is not None for p in model.parameters())
    assert not step.optimizer.is_perturbed
    assert model[1].num_batches_tracked == 8
    assert not any(t.requires_grad for t in outputs[-1][:3])
    step.optimizer.state_dict()  # refuses while perturbed


def test_autograd_sees_that_a_replay_changed_the_weights(graph_device):
    device, counts = graph_device
    model, _, step = trained(device, True, batches(6, device))
    replays = counts.replays
    (x, y), *_ = batches(1, device)
    loss = model(x.requires_grad_()).sum()
    step(x.detach(), y)
    assert counts.replays > replays
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_a_capture_that_fails_changes_nothing(graph_device, inside, monkeypatch):
    device, _ = graph_device
    model = network(device)
    opt = awp(model)
    if not inside:
        opt.register_step_pre_hook(lambda *a: None)
    step = AdversarialStep(model, opt, attack(device), cuda_graph=True)
    run(step, batches(2, device))
    backpropagate = step._backpropagate

    def failing(x_adv, *args):
        if is_capturing(x_adv) and opt.is_perturbed:
            raise ValueError("a reason")
        return backpropagate(x_adv, *args)

    monkeypatch.setattr(step, "_backpropagate", failing)
    with pytest.raises(CaptureError, match=r"training step cannot be captured.*a reason"):
        for x, y in batches(2, device):
            before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
            step(x, y)
    assert not opt.is_perturbed
    after = model.state_dict(), opt.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_auto_does_without_where_capturing_fails(graph_device):
    device, _ = graph_device

    class Net(nn.Sequential):
        def forward(self, x):
            if is_capturing(x):
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().forward(x)

    eager, truth, _ = trained(device, False, batches(8, device))
    model = Net(*network(device))
    step = AdversarialStep(model, awp(model), attack(device))
    with pytest.warns(UserWarning, match="not permitted when stream is capturing") as warned:
        outputs = run(step, batches(8, device))
    assert len(warned) == 1
    assert_same(model, eager, outputs, truth)


def captured_passes(device, hook=lambda *args: None):
    """A step whose graph does not contain the update, because of a hook."""
    model = network(device)
    opt = awp(model)
    opt.register_step_pre_hook(hook)
    step = AdversarialStep(model, opt, attack(device), cuda_graph=True)
    run(step, batches(6, device))
    return model, opt, step


@pytest.mark.parametrize("interrupted", ["before the replay", "in the update"])
def test_ctrl_c_around_a_replay_restores_the_weights(graph_device, interrupted):
    device, counts = graph_device
    hooks = [lambda *args: None]
    model, opt, step = captured_passes(device, lambda *args: hooks[-1](*args))
    assert counts.replays
    before = copy.deepcopy([*model.parameters()])
    interrupt = Mock(side_effect=KeyboardInterrupt)
    if interrupted == "in the update":
        hooks.append(interrupt)
    else:
        (graph,) = graphs_of(step)._graphs.values()
        graph._inputs[0] = Mock(copy_=interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(*batches(1, device)[0])
    assert not opt.is_perturbed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_settings_are_checked_before_a_replay(graph_device):
    device, _ = graph_device
    model, _, step = trained(device, True, batches(6, device))
    before = copy.deepcopy([*model.parameters()])
    step.optimizer.param_groups[0]["gamma"] = -1.0
    with pytest.raises(ValueError, match="gamma"):
        step(*batches(1, device)[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_graph_where_there_are_none_is_an_error():
    model = network()
    step = AdversarialStep(model, awp(model), attack("cpu"), cuda_graph=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no CUDA graphs"):
        step(*batches(1)[0])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_distributed_models_run_eagerly(cpu_graphs, compiled):
    net = network()
    model = nn.DataParallel(net)
    model = torch.compile(model) if compiled else model
    with pytest.raises(ValueError, match="DataParallel"):
        AdversarialStep(model, awp(net), attack("cpu"), cuda_graph=True)
    step = AdversarialStep(model, awp(net), attack("cpu"))
    assert not step._captured.applies_to(torch.device("cpu"))


def test_parameters_on_several_devices_run_eagerly(cpu_graphs):
    model = network()
    model.elsewhere = nn.Linear(1, 1, device="meta")
    with pytest.raises(ValueError, match="several devices"):
        AdversarialStep(model, awp(model), attack("cpu"), cuda_graph=True)
    step = AdversarialStep(model, awp(model), attack("cpu"))
    assert not step._captured.applies_to(torch.device("cpu"))


def test_auto_does_not_capture_functions_or_sparse_gradients(graph_device):
    device, counts = graph_device
    data, calls = batches(6, device), []

    def own(model, x, y):
        calls.append(1)
        return x

    trained(device, "auto", data, attack=own)
    assert len(calls) == 6
    model = network(device)
    model.embedding = nn.Embedding(2, 2, sparse=True)
    step = AdversarialStep(model, awp(model), attack(device))
    assert not step._captured.applies_to(torch.device(device))
    assert counts.captures == 0
    trained(device, "auto", data)
    assert counts.captures == 1


def memory_pools():
    """The pools from which memory on the GPU is reserved: each recorder of graphs has its own."""
    gc.collect()
    torch.cuda.empty_cache()
    return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize(
        "spoil", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()]
    )
    def test_after_a_spoiled_capture_the_device_is_as_before(self, spoil):
        class Net(nn.Sequential):
            def forward(self, x):
                spoil(x)
                return super().forward(x)

        eager, truth, _ = trained("cuda", False, batches(8, "cuda"))
        stream, pools = torch.cuda.current_stream(), memory_pools()
        model = Net(*network("cuda"))
        step = AdversarialStep(model, awp(model), attack("cuda"))
        with pytest.warns(UserWarning, match="runs eagerly"):
            outputs = run(step, batches(8, "cuda"))
        assert_same(model, eager, outputs, truth)
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.get_sync_debug_mode() == 0
        assert len(torch.rand(9, device="cuda").unique()) == 9
        assert memory_pools() <= pools  # that of the capture was released
        trained("cuda", True, batches(8, "cuda"))  # others can be captured

    def test_the_callers_autograd_graph_does_not_spoil_a_capture(self):
        model, data = network("cuda"), batches(8, "cuda")
        logits = model(data[0][0])  # holds the weights' AccumulateGrad nodes, on another stream
        step = AdversarialStep(model, awp(model), attack("cuda"), cuda_graph=True)
        run(step, data)
        assert logits.requires_grad
        assert graphs_of(step)._graphs

    def test_inside_a_graph_of_the_callers_own(self):
        model, (x, y) = network("cuda"), batches(1, "cuda")[0]
        step = AdversarialStep(model, awp(model), attack("cuda"))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(x, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            assert not step._captured.applies_to(x.device)
            x_adv = Captured(attack("cuda"))(model, x, y)
        graph.replay()
        torch.testing.assert_close(x_adv, attack("cuda")(model, x, y), rtol=1e-9, atol=1e-9)

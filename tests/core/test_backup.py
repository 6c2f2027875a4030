"""The unperturbed weights survive two optimizers, nested contexts and parameters that change."""

import pytest
import torch
from torch import nn

from awp_optim import AWP
from tests.core.toolbox import SGD, assert_restored, assert_same_bits, ready, snapshot


def test_two_optimizers_cannot_perturb_the_same_parameters_at_once(net):
    first, _, start = ready(net)
    second = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    first.first_step()
    perturbed = snapshot(net.parameters())
    with pytest.raises(RuntimeError, match="another AWP"):
        second.first_step()
    assert not second.is_perturbed
    assert_same_bits(net.parameters(), perturbed)
    first.restore()
    assert_restored(first, start)
    second.first_step()  # nothing prevents it now
    second.restore()
    assert_restored(second, start)


def test_optimizers_of_different_parameters_are_independent(net):
    _, _, start = ready(net)
    halves = [list(net.parameters())[:3], list(net.parameters())[3:]]
    opts = [AWP(half, SGD, gamma=0.1, lr=0.1) for half in halves]
    for opt in opts:
        opt.first_step()
    for opt in opts:
        opt.restore()
    assert_same_bits(net.parameters(), start)


def test_the_outermost_context_restores(net):
    opt, _, start = ready(net)
    with opt.perturbed():
        perturbed = snapshot(net.parameters())
        with opt.perturbed():
            pass
        assert opt.is_perturbed
        assert_same_bits(net.parameters(), perturbed)
    assert_restored(opt, start)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_parameter_that_was_resized_is_named_and_the_others_are_restored(foreach):
    params = [nn.Parameter(torch.randn(3, 3)) for _ in range(3)]
    start = snapshot(params)
    opt = AWP(params, SGD, gamma=0.1, lr=0.1, foreach=foreach)
    for p in params:
        p.grad = torch.randn(3, 3)
    opt.first_step()
    params[1].data = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"\(3, 3\) -> \(5, 3\)"):
        opt.restore()
    assert not opt.is_perturbed
    assert_same_bits([params[0], params[2]], [start[0], start[2]])
    opt.restore()  # does nothing
    for p in params:
        p.grad = torch.randn_like(p)
    with opt.perturbed():
        assert params[1].isfinite().all()


def test_buffers_are_allocated_once(net):
    opt, _, _ = ready(net)
    addresses = []
    for _ in range(3):
        opt.first_step()
        addresses.append([b.data_ptr() for b in opt.backup.buffers.values()])
        opt.restore()
    assert addresses[0] == addresses[1] == addresses[2]
    perturbed = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert sum(b.numel() for b in opt.backup.buffers.values()) == perturbed


def test_buffers_made_in_inference_mode_serve_afterwards(net):
    opt, _, start = ready(net)
    with torch.inference_mode(), opt.perturbed():
        pass
    opt.first_step()
    opt.second_step()
    assert not torch.equal(net[0].weight, start[0])


def test_a_model_may_change_its_dtype_between_steps(net):
    opt, _, _ = ready(net)
    with opt.perturbed():
        pass
    net.double()  # the gradients, too
    with torch.no_grad():
        net[0].weight.add_(torch.rand_like(net[0].weight))  # not a float32 number
    start = snapshot(net.parameters())
    with opt.perturbed():
        assert {v.dtype for v in opt.perturbation().values()} == {torch.float64}
    assert_restored(opt, start)

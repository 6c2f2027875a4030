"""The unperturbed weights survive two optimizers, nested contexts and parameters that change."""

import pytest
import torch
from torch import nn

from awp_optim import AWP
from tests.core.toolbox import SGD, assert_same_bits, backward, batches, snapshot


def test_two_optimizers_cannot_perturb_the_same_parameters_at_once(net):
    start = snapshot(net.parameters())
    first, second = (AWP(net.parameters(), SGD, gamma=0.1, lr=0.1) for _ in range(2))
    backward(net, *batches(1)[0])
    first.first_step()
    perturbed = snapshot(net.parameters())
    with pytest.raises(RuntimeError, match="another AWP optimizer"):
        second.first_step()
    assert not second.is_perturbed
    assert_same_bits(net.parameters(), perturbed)
    first.restore()
    assert_same_bits(net.parameters(), start)
    second.first_step()  # now it is free to
    second.restore()
    assert_same_bits(net.parameters(), start)


def test_optimizers_of_different_parameters_do_not_mind_each_other(net):
    halves = [list(net.parameters())[:3], list(net.parameters())[3:]]
    opts = [AWP(half, SGD, gamma=0.1, lr=0.1) for half in halves]
    start = snapshot(net.parameters())
    backward(net, *batches(1)[0])
    for opt in opts:
        opt.first_step()
    for opt in opts:
        opt.restore()
    assert_same_bits(net.parameters(), start)


def test_the_outermost_context_restores(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    start = snapshot(net.parameters())
    backward(net, *batches(1)[0])
    with opt.perturbed():
        perturbed = snapshot(net.parameters())
        with opt.perturbed():
            pass
        assert opt.is_perturbed
        assert_same_bits(net.parameters(), perturbed)
    assert_same_bits(net.parameters(), start)


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

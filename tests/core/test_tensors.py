"""Odd gradients and parameters."""

import pytest
import torch
from torch import Tensor, nn

from awp_optim import AWP
from tests.core.toolbox import SGD, assert_restored, assert_same_bits, snapshot


@pytest.mark.parametrize("foreach", [True, False, None])
def test_gradients_none_zero_infinite_and_nan_give_no_perturbation(foreach):
    params = [nn.Parameter(torch.randn(3, 3)) for _ in range(5)]
    params[4].requires_grad_(False)
    start = snapshot(params)
    opt = AWP(params, SGD, gamma=0.1, lr=0.1, foreach=foreach)
    params[0].grad = torch.zeros(3, 3)
    params[1].grad = torch.full((3, 3), float("inf"))
    params[2].grad = torch.randn(3, 3)
    params[2].grad[0, 0] = float("nan")
    for _ in range(2):
        opt.first_step()
        assert_same_bits(params, start)
    params[1].grad = torch.randn(3, 3)
    params[3].grad = torch.randn(3, 3)  # had no gradient in the first ascents
    opt.first_step()
    for i, (p, c) in enumerate(zip(params, start, strict=True)):
        size = 0.1 * c.norm() if i in (1, 3) else torch.zeros(())
        torch.testing.assert_close((p.detach() - c).norm(), size, rtol=1e-5, atol=0)
    opt.restore()
    assert_restored(opt, start)


@pytest.mark.parametrize("foreach", [True, False])
def test_sparse_gradients_act_like_those_of_a_dense_embedding(foreach):
    torch.manual_seed(0)
    dense, sparse = nn.Embedding(9, 4), nn.Embedding(9, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        opt = AWP(model.parameters(), SGD, gamma=0.1, lr=0.1, foreach=foreach)
        for tokens in torch.tensor([[1, 2, 2], [8, 0, 1]]):
            model(tokens).pow(2).sum().backward()
            opt.first_step(zero_grad=True)
            model(tokens).pow(2).sum().backward()
            opt.second_step(zero_grad=True)
    torch.testing.assert_close(sparse.weight, dense.weight)


@pytest.mark.parametrize("foreach", [True, False])
def test_scalars_empty_and_complex_parameters(foreach):
    params = [
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)),
    ]
    start = snapshot(params)
    opt = AWP(params, SGD, gamma=0.5, min_ndim=0, lr=0.1, foreach=foreach)
    sum(p.abs().pow(2).sum() for p in params).backward()
    opt.first_step()
    assert params[0].item() == pytest.approx(3.0)
    torch.testing.assert_close(params[2].detach(), 1.5 * start[2])  # g is parallel to w
    opt.restore()
    assert_restored(opt, start)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_tied_parameter_is_perturbed_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    opt = AWP([*first.parameters(), *second.parameters()], SGD, gamma=0.1, lr=0.1)
    start = first.weight.detach().clone()
    model(torch.randn(3, 4)).sum().backward()
    opt.first_step()
    torch.testing.assert_close((first.weight - start).norm(), 0.1 * start.norm())
    opt.restore()
    assert torch.equal(first.weight, start)


def test_parameters_that_share_memory_are_restored_bit_for_bit():
    flat = torch.randn(4, 4)
    params = [nn.Parameter(flat), nn.Parameter(flat.t()), nn.Parameter(flat[:2])]
    start = flat.clone()
    opt = AWP([{"params": [p]} for p in params], SGD, gamma=0.1, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.first_step()
    opt.first_step()
    opt.restore()
    assert torch.equal(flat, start)


class Labeled(Tensor):
    """A subclass as libraries make them."""


@pytest.mark.parametrize("foreach", [True, False, None])
def test_tensor_subclasses_are_perturbed_like_tensors(foreach):
    plain = nn.Parameter(torch.randn(3, 3))
    labeled = nn.Parameter(plain.detach().clone().as_subclass(Labeled))
    grad = torch.randn(3, 3)
    for p in (plain, labeled):
        p.grad = grad.clone()
        opt = AWP([p], SGD, gamma=0.1, lr=0.1, foreach=foreach)
        opt.first_step()
    torch.testing.assert_close(labeled.as_subclass(Tensor), plain.detach())
    opt.second_step()


@pytest.mark.parametrize("foreach", [True, False])
def test_dtypes_and_memory_formats_mix_in_one_optimizer(foreach):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(6, 4).t()),
        nn.Parameter(torch.randn(5, 5, dtype=torch.float64)),
        nn.Parameter(torch.randn(5, 5, dtype=torch.bfloat16)),
    ]
    start = snapshot(params)
    opt = AWP(params, SGD, gamma=0.2, lr=0.1, foreach=foreach)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)
    opt.first_step()
    for p, w in zip(params, start, strict=True):
        size = (p.detach() - w).float().norm()
        torch.testing.assert_close(size, 0.2 * w.float().norm(), rtol=5e-3, atol=0)
    opt.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, start, strict=True))

"""BatchNorm in eval mode during an attack: torch's gradients, by another formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from awp_optim.attacks import FGSM, PGD
from awp_optim.attacks.losses import loss_function
from awp_optim.attacks.oracle import ModelOracle

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
SHAPE = (8, 2, 4, 4)


def network(*layers, shape=SHAPE):
    """Layers and a linear one after them, in eval mode and float64, unlike newly initialized."""
    torch.manual_seed(0)
    body = nn.Sequential(*copy.deepcopy(layers), nn.Flatten()).eval()
    model = nn.Sequential(*body, nn.Linear(body(torch.rand(shape)).shape[1], 3)).double().eval()
    for p in model.parameters():
        nn.init.uniform_(p, -1.0, 1.0)
    for name, b in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(b, 0.2, 3.0)
    return model


def convolutional():
    return network(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2))


def data(shape=SHAPE, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, shape[:1], generator=generator)
    return x.to(device, dtype), y.to(device)


def gradient(model, x, y):
    return ModelOracle(model, x, y).gradient(x, loss_function("ce"), y)


def true_gradient(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.BatchNorm1d(4),), (8, 4)),
        ((nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh()), (8, 2, 6)),
        ((nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.5), nn.Tanh()), SHAPE),
        ((nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh()), SHAPE),
        ((nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Tanh()), (8, 2, 4, 4, 4)),
        ((nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)), SHAPE),
        ((nn.SyncBatchNorm(2),), SHAPE),
        ((nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), SHAPE),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [True, False])
def test_equals_autograd(layers, shape, frozen):
    model = network(*layers, shape=shape).requires_grad_(not frozen)
    x, y = data(shape)
    classes = [type(m) for m in model.modules()]
    truth = true_gradient(copy.deepcopy(model), x, y)
    torch.testing.assert_close(gradient(model, x, y), truth, rtol=1e-12, atol=1e-14)
    assert [type(m) for m in model.modules()] == classes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_gradient_keeps_the_memory_format(device, dtype, tolerance):
    layout, seen = {"memory_format": torch.channels_last}, []
    model, (x, y) = convolutional().to(device), data(device=device)
    truth = true_gradient(model, x, y)
    model, x = model.float().to(**layout), x.float().contiguous(**layout)
    model[1].register_full_backward_hook(
        lambda module, into, out: seen.append(into[0].is_contiguous(**layout))
    )
    with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        ours = gradient(model, x, y)
    assert seen == [True]
    assert (ours - truth).norm() <= tolerance * truth.norm()


def test_a_subclass_keeps_its_own_forward():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model, (x, y) = network(Doubling(2)), data()
    truth = true_gradient(model, x, y)
    torch.testing.assert_close(gradient(model, x, y), truth, rtol=1e-12, atol=0)


def test_in_train_mode_it_normalizes_by_the_batch():
    model, (x, y) = convolutional(), data()
    twin = copy.deepcopy(model).train()
    attack = FGSM(0.1, model_mode="train")
    expected = (x + 0.1 * true_gradient(twin, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, y), expected, rtol=0, atol=0)
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)


def test_gradients_of_its_weights_where_they_are_asked_for():
    model, (x, y) = convolutional(), data()
    weights = list(model[1].parameters())
    start = PGD(0.1, 0.05, steps=1, random_start=False)(model, x, y)
    expected = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), weights)
    attack = PGD(0.1, 0.05, steps=2, random_start=False)
    _, gradients = attack.with_weight_gradients(model, x, y, weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=0)


def test_layers_are_restored_after_an_error():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("no")

    model = nn.Sequential(nn.BatchNorm2d(2), Failing())
    with pytest.raises(KeyError, match="no"):
        PGD(0.1, 0.05, steps=2)(model, *data(dtype=torch.float32))
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("device", ["cpu", CUDA])  # a GPU's backward pass has its own thread
def test_with_activation_checkpointing(device):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, (x, y) = convolutional().to(device), data(device=device)
    ours = gradient(Checkpointed(*model), x, y)
    torch.testing.assert_close(ours, true_gradient(model, x, y), rtol=1e-12, atol=1e-14)

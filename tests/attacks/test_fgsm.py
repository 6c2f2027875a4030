"""FGSM against Eq. (13) and against worst cases known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from awp_optim.attacks import FGSM, PGD


def gradient(model, x, y):
    """One example at a time, by backward()."""
    rows = []
    for xi, yi in zip(x, y, strict=True):
        xi = xi[None].clone().requires_grad_()
        cross_entropy(model(xi), yi[None]).backward()
        rows.append(xi.grad)
    return torch.cat(rows)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_is_equation_13(norm, cnn64, batch64):
    x, y = batch64
    g = gradient(cnn64, x, y)
    step = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1)[:, None, None, None]
    x_adv = FGSM(0.4, norm)(cnn64, x, y)
    torch.testing.assert_close(x_adv, (x + 0.4 * step).clamp(0, 1), atol=1e-14, rtol=0)


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_is_one_step_of_pgd_of_full_length(norm, loss, cnn64, batch64):
    fgsm = FGSM(eps=0.1, norm=norm, loss=loss)
    pgd = PGD(eps=0.1, step_size=0.1, steps=1, norm=norm, loss=loss, random_start=False)
    assert torch.equal(fgsm(cnn64, *batch64), pgd(cnn64, *batch64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_a_linear_model_and_mixed_labels_it_is_known_in_closed_form(norm):
    # The gradient of sum_k q_k (-log p_k) at x is A^T (p - q).
    a = torch.randn(4, 9, dtype=torch.float64)
    x, q = torch.rand(5, 9, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    g = ((x @ a.T).softmax(1) - q) @ a
    step = g.sign() if norm == "linf" else g / g.norm(dim=1, keepdim=True)
    x_adv = FGSM(eps=0.1, norm=norm)(lambda x: x @ a.T, x, q)
    torch.testing.assert_close(x_adv, (x + 0.1 * step).clamp(0, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", ["kl", "score"])
def test_losses_with_a_minimum_at_the_clean_example_are_refused(loss):
    with pytest.raises(ValueError, match=f"gradient of loss='{loss}' is zero; use PGD"):
        FGSM(loss=loss)

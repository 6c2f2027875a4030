"""N-FGSM against its two lines in float64, and what sets it apart: it leaves the ball."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from awp_optim.attacks import FGSM, NFGSM, Captured

from .conftest import images, radius, seeded, small_cnn


def reference(model, x, y, eps, step_size, k, clip):
    """From the noise in the order in which the attack draws it; by backward()."""
    noise = torch.empty_like(x).uniform_(-1, 1) * k * eps
    noisy = (x + noise).clamp(*clip).requires_grad_()
    cross_entropy(model(noisy), y, reduction="sum").backward()
    return (noisy.detach() + step_size * noisy.grad.sign()).clamp(*clip)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("eps", "step_size", "noise", "clip"),
    [(0.1, None, 2.0, (0, 1)), (0.1, 0.05, 0.5, (0, 1)), (0.2, None, 3.0, (-1, 2))],
)
def test_is_its_two_lines(eps, step_size, noise, clip, mode, batch64):
    x, y = batch64
    model, other = (small_cnn(torch.float64) for _ in range(2))
    attack = NFGSM(eps, step_size, noise, clip=clip, model_mode=mode)
    for m in (model, other):
        m[6].p = 0.0
        m.train(mode == "train")
    expected = seeded(1, reference, other, x, y, eps, step_size or eps, noise, clip)
    x_adv = seeded(1, attack, model, x, y)
    torch.testing.assert_close(x_adv, expected, atol=1e-14, rtol=0)


def test_leaves_the_ball_but_not_the_box():
    x, y = torch.full((200, 4), 0.5), torch.zeros(200, dtype=torch.long)
    x_adv = NFGSM(eps=0.1)(lambda x: x, x, y)
    r = radius(x, x_adv, "linf")
    assert 0.25 < r.max() <= 0.3 + 1e-6
    # The noise is uniform in [-2 eps, 2 eps]; the step away from the label's logit adds -eps.
    moved = x_adv[:, 0] - 0.5
    assert moved.min() < -0.29
    assert moved.max() > 0.09
    assert moved.mean().item() == pytest.approx(-0.1, abs=0.03)
    x_adv = NFGSM(eps=0.4)(lambda x: x, x, y)
    assert x_adv.min() == 0
    assert x_adv.max() == 1
    x_adv = NFGSM(eps=0.4, clip=None)(lambda x: x, x, y)
    assert x_adv.min() < -0.2
    assert x_adv.max() > 1.2


def test_without_noise_it_is_fgsm(cnn64, batch64):
    assert torch.equal(NFGSM(0.1, noise=0)(cnn64, *batch64), FGSM(0.1)(cnn64, *batch64))
    assert torch.equal(NFGSM(0)(cnn64, *batch64), batch64[0])


def test_kl_is_the_divergence_from_the_clean_logits(cnn64, batch64):
    x, _ = batch64
    p = cnn64(x).softmax(1).detach()

    def divergence(z, target):
        return kl_div(z.log_softmax(1), p, reduction="none").sum(1)

    expected = seeded(1, NFGSM(0.1, loss=divergence), cnn64, x, x)
    assert torch.equal(seeded(1, NFGSM(0.1, loss="kl"), cnn64, x, None), expected)


def test_gradients_by_the_weights_are_those_at_the_noisy_point(cnn64, batch64):
    x, y = batch64
    weights = list(cnn64.parameters())
    _, gradients = seeded(2, NFGSM(0.1).with_weight_gradients, cnn64, x, y, weights)
    noisy = (x + seeded(2, lambda: torch.empty_like(x).uniform_(-1, 1)) * 0.2).clamp(0, 1)
    truth = torch.autograd.grad(cross_entropy(cnn64(noisy), y, reduction="sum"), weights)
    torch.testing.assert_close(gradients, truth)


def test_captured(cpu_graphs, cnn):
    attack = NFGSM(0.1)
    captured = Captured(attack)
    torch.manual_seed(3)
    expected = [attack(cnn, *images(seed=i)) for i in range(5)]
    torch.manual_seed(3)
    for i, x_adv in enumerate(expected):
        torch.testing.assert_close(captured(cnn, *images(seed=i)), x_adv)
    assert cpu_graphs.replays == 3


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"noise": -1}, ValueError, "noise must not be negative"),
        ({"noise": "2"}, TypeError, "noise must be a number"),
        ({"step_size": 0}, ValueError, "step_size must be above 0"),
        ({"eps": 8}, ValueError, "width of the box"),
        ({"noise": 0, "loss": "kl"}, ValueError, "zero gradient"),
        ({"noise": 0, "loss": "score"}, ValueError, "zero gradient"),
        ({"norm": "l2"}, TypeError, "norm"),
    ],
)
def test_bad_settings(kwargs, error, match):
    with pytest.raises(error, match=match):
        NFGSM(**kwargs)

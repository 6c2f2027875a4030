"""Directions in weight space against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.attacks import FGSM, PGD
from awp_optim.landscape import (
    awp_direction,
    filter_normalized_direction,
    loss_curve,
    rwp_direction,
)
from tests.landscape.toolbox import ATTACK, assert_restored, gaussian, images, network, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
MATRICES = {"0.weight", "4.weight", "7.weight"}


class TestFilterNormalized:
    def test_a_filter_is_as_long_as_the_models(self):
        model = network()
        d = gaussian(model)
        assert set(d) == {name for name, _ in model.named_parameters()}
        for name in MATRICES:
            for filter_, own in zip(d[name], model.get_parameter(name)):
                assert torch.allclose(filter_.norm(), own.norm(), rtol=1e-6)
        # and as wide: not the sign or the constant of something
        assert 0.7 < d["4.weight"].std() / model[4].weight.std() < 1.4

    def test_zero_for_biases_and_norm_layers(self):
        model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm((4, 4)), nn.GroupNorm(2, 4),
            nn.RMSNorm((2, 4)), nn.InstanceNorm1d(4, affine=True),
        )  # fmt: skip
        d = gaussian(model)
        assert {name for name, t in d.items() if t.any()} == {"0.weight"}
        assert set(d) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_filter_of_a_transposed_convolution_is_an_output_channels(self, groups):
        model = nn.ConvTranspose2d(4, 6, 3, groups=groups)
        d = gaussian(model)["weight"]
        for out in range(6):
            g, j = divmod(out, 6 // groups)
            rows = slice(g * 4 // groups, (g + 1) * 4 // groups)
            assert torch.allclose(d[rows, j].norm(), model.weight[rows, j].norm(), rtol=1e-5)

    def test_the_same_seed_the_same_direction(self):
        model = network()
        first, again, other = gaussian(model), gaussian(model), gaussian(model, 1)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert not torch.equal(first["0.weight"], other["0.weight"])
        with torch.random.fork_rng():
            torch.manual_seed(3)
            a = filter_normalized_direction(model)
            torch.manual_seed(3)
            b = filter_normalized_direction(model)
        assert torch.equal(a["4.weight"], b["4.weight"])

    def test_zero_filters_tied_weights_and_half_precision(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)).bfloat16()
        model[1].weight = model[0].weight
        with torch.no_grad():
            model[0].weight[0] = 0
        d = gaussian(model)
        assert list(d) == ["0.weight"]
        assert d["0.weight"].dtype == torch.float32
        assert not d["0.weight"][0].any()
        norms = model[0].weight.float().norm(dim=1)
        assert torch.allclose(d["0.weight"].norm(dim=1), norms, rtol=1e-6)

    def test_a_model_without_weights_is_an_error(self):
        with pytest.raises(ValueError, match="zero"):
            gaussian(nn.BatchNorm1d(3))
        with pytest.raises(ValueError, match="lazy"):
            gaussian(nn.LazyLinear(3))


class TestPerturbationsOfTraining:
    def test_awp_is_eq_10(self):
        model, (x, y) = network().double(), images()
        x, attack = x.double(), FGSM(eps=0.1)
        d = awp_direction(model, (x, y), attack, batch_size=16)
        F.cross_entropy(model(attack(model, x, y)), y).backward()
        assert set(d) == MATRICES
        for name, v in d.items():
            p = model.get_parameter(name)
            torch.testing.assert_close(v, p.norm() * p.grad / p.grad.norm(), rtol=1e-9, atol=0)

    def test_awp_of_a_random_model_is_seeded_and_leaves_the_generator(self):
        model = network()
        model[6].register_forward_hook(lambda m, inputs, z: z + torch.randn_like(z))
        state = torch.get_rng_state()
        d = awp_direction(model, images(), ATTACK)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(7)
        again, other = (awp_direction(model, images(), ATTACK, seed=seed) for seed in (0, 1))
        assert all(torch.equal(d[name], again[name]) for name in d)
        assert not any(torch.equal(d[name], other[name]) for name in d)

    def test_awp_of_tensors_made_in_inference_mode(self):
        model = network()
        expected = awp_direction(model, images(), ATTACK)
        with torch.inference_mode():
            d = awp_direction(model, tuple(t.clone() for t in images()), ATTACK)
        assert all(torch.equal(d[name], expected[name]) for name in expected)

    def test_rwp_is_as_long_as_the_weights(self):
        model = network()
        d, again = (rwp_direction(model, torch.Generator().manual_seed(0)) for _ in range(2))
        assert set(d) == MATRICES
        for name, v in d.items():
            assert torch.allclose(v.norm(), model.get_parameter(name).norm(), rtol=1e-5)
            assert torch.equal(v, again[name])

    def test_they_restore_the_model(self):
        model = network().train()
        model[4].eval()
        before = snapshot(model)
        awp_direction(model, images(), PGD(steps=1, model_mode="train"))
        rwp_direction(model)
        assert_restored(model, before)
        assert model.training
        assert not model[4].training
        assert all(p.grad is None for p in model.parameters())

    def test_awp_raises_the_loss_more_than_random_directions(self):
        model, data = network(), images()
        adversarial = loss_curve(model, data, ATTACK, [0.05], awp_direction(model, data, ATTACK))
        directions = [rwp_direction(model, torch.Generator().manual_seed(i)) for i in range(5)]
        random = loss_curve(model, data, ATTACK, [0.05], directions)
        assert adversarial.sharpness(0.05).mean > 2 * random.sharpness(0.05).worst > 0

    def test_the_optimizers_own_perturbation_is_a_direction(self):
        model, (x, y) = network(), images()
        opt = AWP(model.parameters(), torch.optim.SGD, gamma=0.05, lr=0.1)
        F.cross_entropy(model(x), y).backward()
        with opt.perturbed():
            v = opt.perturbation()
            with torch.no_grad():
                there = F.cross_entropy(model(x), y).item()
        c = loss_curve(model, (x, y), FGSM(eps=0.0), [1.0], v)
        assert c.nat_loss[0] == pytest.approx(there, rel=1e-6)
        assert c.adv_loss[0] == c.nat_loss[0]

    def test_frozen_weights_do_not_move(self):
        model = network()
        model[4].weight.requires_grad_(False)
        assert set(awp_direction(model, images(), ATTACK)) == {"0.weight", "7.weight"}
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="require gradients"):
            awp_direction(model, images(), ATTACK)

    def test_bad_input(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
        nn.init.zeros_(model[1].weight)
        with pytest.raises(ValueError, match="no adversarial direction"):
            awp_direction(model, images(), FGSM(eps=0.0))
        with pytest.raises(ValueError, match="no data"):
            awp_direction(model, [], FGSM())
        with pytest.raises(TypeError, match="instance"):
            awp_direction(model, images(), FGSM)

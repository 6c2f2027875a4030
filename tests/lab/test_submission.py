"""What RobustBench asks for, from an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from awp_optim.attacks import PGD, AutoAttack
from awp_optim.evaluation import Evaluation, Finding
from awp_optim.lab.submission import (
    BLANK,
    check_test_set,
    leaderboard_attack,
    model_info,
    submission_form,
)

# The keys of its own files, such as model_info/cifar10/Linf/Wang2023Better_WRN-28-10.json.
KEYS = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
    "architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
}  # fmt: skip
RUN = {"dataset": "cifar10", "unlabeled_images": 0, "init": None}


def evaluation(warnings=()):
    nothing = np.zeros(0)
    robust = {"pgd20": 0.6, "aa": 0.56171}
    return Evaluation(
        10_000, 0.8536, robust, 0.56171, nothing, nothing, nothing, {}, tuple(warnings), False
    )


def info(**changes):
    settings = {"dataset": "cifar10", "eps": 8 / 255, "arch": "wide_resnet34_10", "run": RUN}
    return model_info(evaluation(), "aa", **{**settings, **changes})


def test_it_is_the_entry_of_this_paper():
    """But for what an evaluation cannot know: model_info/cifar10/Linf/Wu2020Adversarial.json."""
    ours = info()
    assert ours.keys() == KEYS
    known = {k: v for k, v in ours.items() if not str(v).startswith(BLANK)}
    assert known == {
        "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10",
        "architecture": "WideResNet-34-10", "eps": "8/255", "clean_acc": "85.36",
        "reported": "56.17", "autoattack_acc": "56.17", "unreliable": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "spelled"),
    [
        ("preact_resnet18", "PreActResNet-18"),
        ("preact_resnet10_32", "PreActResNet-10-32"),
        ("dm_wide_resnet70_16", "WideResNet-70-16"),
        ("torchvision/resnet50", "resnet50"),
        ("WideResNet-34-20", "WideResNet-34-20"),
    ],
)
def test_architectures(arch, spelled):
    assert info(arch=arch)["architecture"] == spelled


def test_what_is_not_known_is_left_to_fill_in():
    unknown = info(arch=None, run={})
    for key in ("architecture", "number_forward_passes", "additional_data"):
        assert unknown[key].startswith(BLANK)
    assert info(eps=0.5)["eps"] == "0.5"


@pytest.mark.parametrize(
    "other", [{"unlabeled_images": 1000}, {"init": "0a1b2c"}, {"dataset": "cifar100"}]
)
def test_other_images_are_not_denied(other):
    assert info(run=RUN | other)["additional_data"].startswith(BLANK)


def test_doubts_are_passed_on():
    r = evaluation([Finding("vanishing", "gradients are zero")])
    entry = model_info(r, "aa", dataset="cifar10", eps=0.5, arch=None, run={})
    assert entry["unreliable"] is True
    pytest.importorskip("pyautoattack")
    text = submission_form(entry, r, norm="l2", method="awp evaluate", checkpoint="")
    assert "vanishing: gradients are zero" in text


def test_the_form():
    pytest.importorskip("pyautoattack")
    text = submission_form(
        info(), evaluation(), norm="linf", method="awp evaluate", checkpoint="best.pt"
    )
    for line in (
        "- **Architecture**: WideResNet-34-10", "- **Threat Model**: Linf", "- **eps**: 8/255",
        "- **Clean accuracy**: 85.36%", "- **Robust accuracy**: 56.17%",
        "- **Additional data**: false",
    ):  # fmt: skip
        assert line in text.splitlines()
    for heading in ("Paper Title", "Paper URL", "Paper authors", "Checkpoint and code"):
        (line,) = (line for line in text.splitlines() if f"**{heading}**" in line)
        assert BLANK in line


class TestRefused:
    @pytest.mark.parametrize(
        ("dataset", "norm", "eps", "listed"),
        [
            ("cifar10", "linf", 8 / 255, True),
            ("cifar10", "l2", 0.5, True),
            ("cifar100", "linf", 8 / 255, True),
            ("cifar10", "l2", 128 / 255, False),  # this paper's radius
            ("cifar10", "linf", 4 / 255, False),
            ("cifar10", "l1", 12, False),
            ("cifar100", "l2", 0.5, False),
            ("svhn", "linf", 8 / 255, False),
        ],
    )
    def test_threats(self, dataset, norm, eps, listed):
        attacks = {"pgd": PGD(0.1), "mine": AutoAttack(eps, norm)}
        if listed:
            assert leaderboard_attack(dataset, norm, eps, attacks) == "mine"
            return
        with pytest.raises(ValueError, match=r"no leaderboard for .*cifar10, l2, eps 0\.5"):
            leaderboard_attack(dataset, norm, eps, attacks)

    @pytest.mark.parametrize(
        "attack",
        [PGD(8 / 255), AutoAttack(version="plus"), AutoAttack(version="rand"),
         AutoAttack(backend="native"), AutoAttack(version="custom", attacks=("square",))],
    )  # fmt: skip
    def test_attacks(self, attack):
        with pytest.raises(ValueError, match="--attacks autoattack"):
            leaderboard_attack("cifar10", "linf", 8 / 255, {"autoattack": attack})

    def test_a_part_of_the_test_set(self):
        check_test_set(10_000)
        with pytest.raises(ValueError, match="all 10000 test images, not on 1000"):
            check_test_set(1000)

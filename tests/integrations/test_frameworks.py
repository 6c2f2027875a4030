"""The code of docs/frameworks.md runs as it stands."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP, frozen_batch_norm
from awp_optim.attacks import PGD

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "frameworks.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", body, re.S)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
}


def space() -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.rand(64, 6), torch.randint(3, (64,))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return {
        **{"torch": torch, "nn": nn, "F": F, "AWP": AWP, "partial": partial, "model": model},
        **{"frozen_batch_norm": frozen_batch_norm, "nullcontext": nullcontext},
        "loader": DataLoader(TensorDataset(x, y), 16),
        "loss_fn": F.cross_entropy,
        "attack": PGD(eps=0.1, step_size=0.05, steps=2),
    }


def test_every_section_with_code_is_run():
    with_code = [title for title, blocks in SECTIONS.items() if blocks]
    assert [len(SECTIONS[title]) for title in with_code] == [1, 2, 1, 1, 1]


def test_which_weights_and_from_when_on():
    names = space()
    model = nn.ModuleDict({"embeddings": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
    model.forward = lambda x: model["head"](model["embeddings"](x))
    (code,) = SECTIONS["Which weights, and from when on"]
    names = space() | {"model": model}
    exec(code, names)
    opt = names["opt"]
    assert [g["gamma"] for g in opt.param_groups] == [5e-3, 0.0]  # it has started
    assert not opt.is_perturbed


@pytest.mark.parametrize("index", [0, 1])
def test_lightning(index):
    L = pytest.importorskip("lightning")
    names = space() | {"L": L}
    exec(SECTIONS["Lightning"][index], names)
    module = names[("Robust", "Accumulating")[index]]()
    module.net = names["model"]
    before = copy.deepcopy(module.state_dict())
    module.configure_optimizers = lambda: AWP(module.parameters(), torch.optim.SGD, lr=0.1)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
    trainer.fit(module, names["loader"])
    assert trainer.global_step == 4
    assert all(not torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    names = space() | {"Accelerator": partial(accelerate.Accelerator, cpu=True)}
    (code,) = SECTIONS["Accelerate"]
    before = copy.deepcopy(names["model"].state_dict())
    exec(code, names)
    assert not names["opt"].optimizer.is_perturbed
    assert all(not torch.equal(t, before[n]) for n, t in names["model"].state_dict().items())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    names = {
        "Trainer": transformers.Trainer,
        "bert": transformers.BertForSequenceClassification(config),
        "dataset": [{"input_ids": torch.arange(4), "labels": torch.tensor(1)}] * 4,
        "training_args": transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
    }  # fmt: skip
    (code,) = SECTIONS["Transformers"]
    exec(code, names)
    groups = names["trainer"].awp.param_groups
    assert sorted({g["gamma"] for g in groups}) == [0.0, 5e-3]


def test_timm_and_skorch():
    optim = pytest.importorskip("timm.optim")
    scheduler = pytest.importorskip("timm.scheduler")
    skorch = pytest.importorskip("skorch")
    (code,) = SECTIONS["timm, skorch and others"]
    names = space() | {"create_optimizer_v2": optim.create_optimizer_v2}
    names["create_scheduler_v2"] = scheduler.create_scheduler_v2
    names |= {"NeuralNetClassifier": skorch.NeuralNetClassifier, "Net": partial(nn.Linear, 6, 3)}
    generator = np.random.default_rng(0)
    names["table"] = generator.normal(size=(30, 6)).astype(np.float32)
    names["labels"] = generator.integers(3, size=30)
    exec(code, names)
    assert isinstance(names["net"].optimizer_, AWP)
    assert names["scheduler"].optimizer is names["opt"]

"""Hugging Face's Trainer with AWP equals loops by hand over the same batches."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awp_optim import AWP
from awp_optim.integrations import perturb_only
from awp_optim.integrations.transformers import AWPArguments, AWPTrainerMixin
from tests.integrations.toolbox import GAMMA, assert_same_bits, step_by_hand
from tests.integrations.toolbox import assert_equal as assert_close

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
Trainer = transformers.Trainer

SIZE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class AWPTrainer(AWPTrainerMixin, Trainer):
    pass


class Watch(transformers.TrainerCallback):
    """Records what Trainer logs; checks that a callback never sees perturbed weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gammas: list[float] = []
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.gammas.append(max(g["gamma"] for g in self.trainer.awp.param_groups))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []
        assert self.trainer.awp is None or not self.trainer.awp.is_perturbed


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3, **SIZE,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def texts(labels: str, n: int = 22) -> list[dict[str, Tensor]]:
    """Token sequences; as a language model's labels, of different numbers of tokens that count."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for i in range(n):
        ids = torch.randint(1, 30, (6,), generator=generator)
        if labels == "class":
            data.append({"input_ids": ids, "labels": ids[0] % 3})
        else:
            # The first token is nobody's target: versions of Trainer differ in counting it.
            counts = (torch.arange(6) > 0) & (torch.arange(6) < 2 + i % 5)
            kept = torch.where(counts, ids, -100)
            data.append({"input_ids": ids, "labels": kept})
    return data


class InOrder(AWPTrainer):
    # BERT's loss takes no number of items, though its forward does: Trainer would add the losses of
    # accumulated batches where it should average them.
    @property
    def loss_is_scaled_for_ga(self) -> bool:
        return isinstance(self.model, transformers.GPT2LMHeadModel)

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    folder: Path,
    awp: AWPArguments | None,
    cls: type = InOrder,
    **settings: Any,
) -> tuple[Any, Watch]:
    watch = Watch()
    optimizers = settings.pop("optimizers", (None, None))
    args = transformers.TrainingArguments(
        output_dir=str(folder), **{
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2,
            "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
            "report_to": [], "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
            **settings,
        },
    )  # fmt: skip
    trainer = cls(
        model, args, train_dataset=data, eval_dataset=data[:4], awp=awp, callbacks=[watch],
        optimizers=optimizers,
    )  # fmt: skip
    watch.trainer = trainer
    return trainer, watch


def hand(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    accumulate: int,
    perturbs: Any = lambda p: p.ndim >= 2,
    clip: float = 1.0,
    start: int = 0,
    epochs: int = 2,
    ascent_steps: int = 1,
    autocast: bool = False,
) -> list[float]:
    """Each update on one big batch, without Trainer's arithmetic of accumulation."""
    decayed = [p for n, p in model.named_parameters() if decays(n)]
    rest = [p for n, p in model.named_parameters() if not decays(n)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=1e-2)
    size = 4 * accumulate
    total = epochs * math.ceil(len(data) / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda k: max(0.0, (total - k) / total))
    model.train()
    losses = []

    def passes(batch: dict[str, Tensor]) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"]).logits
        labels = batch["labels"]
        if labels.ndim == 2:  # a language model's loss is taken in float32
            logits, labels = logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(logits, labels)
        else:  # batches that are accumulated count alike, whatever their sizes
            pairs = zip(logits.split(4), labels.split(4))
            loss = torch.stack([nn.functional.cross_entropy(a, b) for a, b in pairs]).mean()
        loss.backward()
        return loss

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        base.step()

    done = 0
    for _ in range(epochs):
        for i in range(0, len(data), size):
            rows = data[i : i + size]
            batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
            gamma = GAMMA if done >= start else 0.0
            if gamma:
                loss = step_by_hand(
                    model.parameters(),
                    partial(passes, batch),
                    update,
                    gamma,
                    ascent_steps,
                    perturbs,
                )
            else:
                loss = passes(batch)
                update()
            losses.append(loss.item())
            schedule.step()
            done += 1
    return losses


def decays(name: str) -> bool:
    return not (name.endswith("bias") or "LayerNorm" in name or ".ln_" in name)


def assert_equal(model: nn.Module, expected: nn.Module, atol: float = 1e-8) -> None:
    assert_close(model, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["classes", "language"])
def test_the_trainer_equals_the_loop_by_hand(tmp_path, kind, accumulate):
    """22 sequences in batches of 4: the last of an epoch has 2, and with 2 accumulated no partner
    of its size."""
    make, data = (bert, texts("class")) if kind == "classes" else (gpt2, texts("tokens"))
    model, expected = make(), make()
    trainer, watch = trainer_of(
        model,
        data,
        tmp_path,
        AWPArguments(gamma=GAMMA),
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.5,
    )
    trainer.train()
    losses = hand(expected, data, accumulate, clip=0.5)
    assert_equal(model, expected, atol=1e-8 if kind == "classes" else 1e-6)
    assert watch.losses == pytest.approx(losses, rel=1e-4)  # at w; Trainer keeps them in float32
    assert not trainer.awp.is_perturbed


def test_chosen_names_a_start_and_two_ascents(tmp_path):
    model, expected, data = bert(), bert(), texts("class")
    settings = AWPArguments(
        gamma=GAMMA, perturb=["word_embeddings", "classifier"], start_epoch=1, ascent_steps=2
    )
    trainer, watch = trainer_of(model, data, tmp_path, settings, gradient_accumulation_steps=2)
    trainer.train()
    chosen = {
        id(p)
        for n, p in expected.named_parameters()
        if n in ("bert.embeddings.word_embeddings.weight", "classifier.weight")
    }
    hand(expected, data, 2, lambda p: id(p) in chosen, start=3, ascent_steps=2)
    assert_equal(model, expected)
    assert watch.gammas == [0.0] * 3 + [GAMMA] * 3


def test_a_start_below_a_loss(tmp_path):
    trainer, watch = trainer_of(
        bert(), texts("class"), tmp_path, AWPArguments(gamma=GAMMA, start_loss_below=1.05)
    )
    trainer.train()
    first = next(i for i, loss in enumerate(watch.losses) if loss < 1.05)
    assert 0 < first < len(watch.losses) - 1
    n = len(watch.losses)
    assert watch.gammas == [0.0] * (first + 1) + [GAMMA] * (n - first - 1)


@pytest.mark.parametrize("start", [None, 4])
def test_a_run_resumed_equals_one_that_was_not_stopped(tmp_path, start):
    """Dropout, shuffling and all: bit for bit."""
    data = texts("class")
    settings = AWPArguments(gamma=GAMMA, perturb=["embeddings"], start_step=start)
    models = []
    for part in ("whole", "resumed"):
        model = bert()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.1
        trainer, _ = trainer_of(
            model,
            data,
            tmp_path / "whole",
            settings,
            cls=AWPTrainer,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
        )
        checkpoint = tmp_path / "whole" / "checkpoint-2"
        trainer.train(resume_from_checkpoint=str(checkpoint) if part == "resumed" else None)
        assert trainer.state.global_step == 6
        models.append(model)
    assert_same_bits(models[1], models[0].state_dict())


def test_bfloat16(tmp_path):
    model, expected, data = bert().float(), bert().float(), texts("class")
    before = copy.deepcopy(expected.state_dict())
    trainer, watch = trainer_of(
        model, data, tmp_path, AWPArguments(gamma=GAMMA), bf16=True, num_train_epochs=1
    )
    trainer.train()
    losses = hand(expected, data, 1, epochs=1, autocast=True)
    assert watch.losses == pytest.approx(losses, rel=1e-2)
    # Adam amplifies the rounding to 8 bits: all updates are compared as one vector.
    names = [n for n in before if "key.bias" not in n]  # its gradient is rounding alone
    flat = [
        torch.cat([m[n].flatten() for n in names])
        for m in (model.state_dict(), expected.state_dict(), before)
    ]
    assert (flat[0] - flat[1]).norm() < 0.15 * (flat[1] - flat[2]).norm()


def test_evaluation_and_checkpoints_see_unperturbed_weights(tmp_path):
    """Evaluated in the middle of training and again from the file: the same loss."""
    seen = []

    class Seen(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    trainer, _ = trainer_of(
        bert(), texts("class"), tmp_path, AWPArguments(gamma=0.5), eval_strategy="epoch",
        save_strategy="epoch", num_train_epochs=1,
    )  # fmt: skip
    trainer.add_callback(Seen())
    trainer.train()
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    again, _ = trainer_of(saved.double(), texts("class"), tmp_path, AWPArguments())
    assert again.evaluate()["eval_loss"] == pytest.approx(seen[0], rel=1e-6)


def test_an_epoch_that_ends_within_an_update_restores_the_weights(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            assert trainer.awp.is_perturbed
            control.should_training_stop = True

        def on_evaluate(self, args, state, control, **kwargs):
            assert not trainer.awp.is_perturbed

    model = bert()
    before = copy.deepcopy(model.state_dict())
    trainer, _ = trainer_of(
        model, texts("class"), tmp_path, AWPArguments(gamma=GAMMA), eval_strategy="epoch",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.add_callback(Stop())
    trainer.train()
    assert_same_bits(model, before)


def test_an_exception_restores_the_weights(tmp_path):
    class Fails(InOrder):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                assert self.awp.is_perturbed
                raise RuntimeError("here")
            return super().compute_loss(*args, **kwargs)

    model = bert()
    before = copy.deepcopy(model.state_dict())
    trainer, _ = trainer_of(model, texts("class"), tmp_path, AWPArguments(), cls=Fails)
    with pytest.raises(RuntimeError, match="here"):
        trainer.train()
    assert_same_bits(model, before)


def test_an_awp_of_ones_own(tmp_path):
    model, expected, data = gpt2(), gpt2(), texts("tokens", 8)
    own = AWP(perturb_only(model, "wte", gamma=GAMMA), torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(own, 1.0)
    trainer, _ = trainer_of(
        model, data, tmp_path, None, optimizers=(own, schedule), max_grad_norm=0.0
    )
    trainer.train()
    base = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.0)
    wte = expected.transformer.wte.weight
    for _ in range(2):
        for i in (0, 4):
            batch = {k: torch.stack([row[k] for row in data[i : i + 4]]) for k in data[0]}

            def passes(batch: dict[str, Tensor] = batch) -> Tensor:
                expected.zero_grad()
                loss = expected(**batch).loss
                loss.backward()
                return loss

            step_by_hand(expected.parameters(), passes, base.step, GAMMA, 1, lambda p: p is wte)
    assert_equal(model, expected, atol=1e-6)

    both, _ = trainer_of(model, data, tmp_path, AWPArguments(), optimizers=(own, schedule))
    with pytest.raises(ValueError, match="AWP already"):
        both.train()


def test_schedulefree_is_switched_between_its_modes(tmp_path):
    pytest.importorskip("schedulefree")
    trainer, _ = trainer_of(
        bert(), texts("class"), tmp_path, AWPArguments(gamma=GAMMA), optim="schedule_free_adamw",
        lr_scheduler_type="constant", eval_strategy="epoch",
    )  # fmt: skip
    modes = []

    class Mode(transformers.TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            modes.append(trainer.awp.param_groups[0]["train_mode"])

        on_step_end = on_evaluate

    trainer.add_callback(Mode())
    trainer.train()
    assert modes == ([True] * 6 + [False]) * 2


def test_what_cannot_work_is_refused(tmp_path):
    data = texts("class")
    trainer, _ = trainer_of(bert(), data, tmp_path, AWPArguments(perturb=["embeding"]))
    with pytest.raises(ValueError, match="'embeding'"):
        trainer.train()
    model = bert()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd)
    trainer, _ = trainer_of(
        model, data, tmp_path, AWPArguments(perturb=["embed"]), optimizers=(sgd, schedule)
    )
    with pytest.raises(ValueError, match="perturb splits the parameter groups"):
        trainer.train()
    assert len(sgd.param_groups) == 1
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        trainer.train()


def test_arguments_are_read_from_a_command_line():
    parser = transformers.HfArgumentParser(AWPArguments)
    line = ["--gamma", "0.01", "--perturb", "embeddings", "^head", "--start_loss_below", "0.7"]
    assert parser.parse_args_into_dataclasses(line) == (
        AWPArguments(gamma=0.01, perturb=["embeddings", "^head"], start_loss_below=0.7),
    )


def test_training_again_continues_with_the_same_awp(tmp_path):
    model = bert()
    trainer, _ = trainer_of(
        model, texts("class", 8), tmp_path, AWPArguments(gamma=GAMMA), num_train_epochs=1
    )
    trainer.train()
    first = trainer.awp
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert trainer.awp is first
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])

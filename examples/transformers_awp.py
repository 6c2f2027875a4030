"""AWP in Hugging Face's Trainer: on all weights, on some names only, and from a later epoch on.

    python examples/transformers_awp.py

A small, untrained GPT-2 learns the text of Python's own help(), letter by letter (no download).
Needs `pip install -e ".[frameworks]"`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pydoc_data.topics import topics

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from awp_optim.integrations.transformers import AWPArguments, AWPTrainerMixin

LENGTH = 32
LETTERS = 128


class AWPTrainer(AWPTrainerMixin, Trainer):
    """Hugging Face's Trainer with AWP."""

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Record the log instead of printing it."""
        self.state.log_history.append(logs)


def lines(start: int, n: int) -> list[dict[str, Tensor]]:
    """n pieces of the text, beginning with one of its topics; fewer at its end."""
    text = "".join(topics[name] for name in sorted(topics)[start:])
    letters = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)
    pieces = letters[: len(letters) // LENGTH * LENGTH].view(-1, LENGTH).long()
    return [{"input_ids": piece, "labels": piece} for piece in pieces[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pieces", type=int, default=1200, help="for training (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--gamma", type=float, default=5e-3, help="(%(default)s)")
    args = parser.parse_args()
    if args.pieces < 1 or args.epochs < 1 or not 0 <= args.gamma < float("inf"):
        parser.error("--pieces and --epochs must be at least 1, --gamma at least 0 and finite")
    logging.set_verbosity_error()
    train, test = lines(0, args.pieces), lines(50, 500)
    half = args.epochs // 2
    runs = {
        "AdamW": AWPArguments(gamma=0.0),
        "AWP": AWPArguments(gamma=args.gamma),
        "AWP, embeddings only": AWPArguments(gamma=args.gamma, perturb=["wte", "wpe"]),
        f"AWP after {half} epochs": AWPArguments(gamma=args.gamma, start_epoch=half),
    }
    print(
        f"{len(train)} pieces of {LENGTH} letters, {args.epochs} epochs, gamma {args.gamma:g}; "
        "loss in nats a letter\n"
    )
    print("                         loss, test   training, at w")
    for label, awp in runs.items():
        set_seed(0)
        config = GPT2Config(
            vocab_size=LETTERS,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=100,
                gradient_accumulation_steps=2,  # one update, one v
                num_train_epochs=args.epochs,
                learning_rate=1e-2,
                weight_decay=0.01,
                warmup_steps=10,
                save_strategy="no",
                logging_strategy="epoch",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            trainer = AWPTrainer(
                GPT2LMHeadModel(config),
                settings,
                train_dataset=train,
                eval_dataset=test,
                awp=awp,
            )
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
        at_w = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
        print(f"{label:24} {loss:10.3f} {at_w:16.3f}")
    print("\nOne small task shows that it runs; for measurements see docs/results.md.")


if __name__ == "__main__":
    main()

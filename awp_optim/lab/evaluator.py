"""Natural and robust accuracy of a model, as measured after the epochs of a run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_optim._utils.model_state import in_mode
from awp_optim.attacks import Captured
from awp_optim.lab.config import PRECISIONS, Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.run_folder import Row
from awp_optim.lab.training_set import as_inputs

__all__ = ["Evaluator", "bytes_per_image", "largest_batch", "measure"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Images = tuple[Tensor, Tensor]


LARGEST_BATCH = 1000
"""Images at a time, if the memory allows it."""


class Evaluator:
    """Measures a run's model on training, test and held-out images.

    On a GPU the size of the batches follows from the network and the card's memory, and is halved
    if they do not fit all the same. It decides which random numbers an image's attack starts from,
    as another seed would; nothing else depends on it, except for rounding.

    Args:
        config: the run's settings.
        data: the images it trains on, and the test set.
        held_out: the images to pick the best epoch on, if it has some of its own.
        ranks: the processes that share every batch.
    """

    def __init__(
        self, config: Config, data: ImageData, held_out: Images | None, ranks: TrainingRanks
    ) -> None:
        n_test = len(data.x_test)
        data = data.limit(
            min(config.train_eval, len(data.x_train)),
            config.test_eval if 0 < config.test_eval < n_test else None,
        )
        self._train = data.x_train, data.y_train
        self._tested = {"test_": (data.x_test, data.y_test)}
        if held_out:
            self._tested["val_"] = held_out
        attack = ranks.shared_attack(config.test_attack)
        # What an attack on several ranks does depends on their shares, which a graph cannot see.
        self._attack = Captured(attack, "auto" if ranks.world == 1 else False)
        self._batch_size = 0 if data.x_train.device.type == "cuda" else 128
        self._autocast = PRECISIONS[config.precision]
        self._ranks = ranks

    def __call__(
        self, model: nn.Module, average: nn.Module | None, stop: Callable[[], bool]
    ) -> Row | None:
        """The metrics of the model and of its average; None if it was stopped.

        Args:
            model: in [0, 1] to logits.
            average: its moving average, if there is one; its metrics are named ``ema_*``.
            stop: called before each batch; True ends the evaluation.
        """
        start = time.perf_counter()

        def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            if stop():
                raise _Stopped
            return self._attack(net, x, y)

        parts = [("train_", model, self._train)]
        parts += [(name, model, images) for name, images in self._tested.items()]
        if average:
            parts += [(f"ema_{name}", average, images) for name, _, images in parts]
        row: Row = {}
        try:
            for name, net, images in parts:
                row |= self._measure(net, images, attack, name)
        except _Stopped:
            return None
        return {**row, "eval_seconds": time.perf_counter() - start}

    def _measure(self, model: nn.Module, images: Images, attack: Attack, name: str) -> Row:
        x, y = images
        self._batch_size = self._batch_size or self._ranks.first(
            lambda: largest_batch(
                bytes_per_image(model, x[:2], self._autocast), torch.cuda.mem_get_info(x.device)[1]
            )
        )
        while True:
            try:
                return measure(
                    model,
                    x,
                    y,
                    attack,
                    name,
                    batch_size=self._batch_size,
                    autocast=self._autocast,
                    ranks=self._ranks,
                )
            except torch.OutOfMemoryError:
                # The other ranks are in the middle of a batch, and would wait for this one.
                if self._batch_size == 1 or self._ranks.world > 1:
                    raise
            self._batch_size //= 2
            torch.cuda.empty_cache()


def largest_batch(per_image: int, memory: int) -> int:
    """The images that are evaluated at a time: 1000, halved until they take a quarter of a GPU.

    An attack that is captured as a graph takes their memory twice, and training has taken some.

    Args:
        per_image: bytes that an image takes.
        memory: bytes of the GPU, in use or not: so a run is the same beside another one.
    """
    size = LARGEST_BATCH
    while size > 1 and size * per_image > memory / 4:
        size //= 2
    return size


def bytes_per_image(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> int:
    """What a forward pass in eval mode keeps of an image for the backward pass: its activations.

    Args:
        model: maps images in [0, 1] to logits; it is not called through ``torch.compile``.
        x: uint8 images, shape (N, C, H, W).
        autocast: dtype to run the forward pass in; None for the model's own.
    """
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.ndim and len(t) == len(x):  # no weights
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    precision = torch.autocast(x.device.type, autocast, enabled=autocast is not None)
    with in_mode(model, "eval"), torch.enable_grad(), precision, saved:
        logits = model.forward(as_inputs(x).requires_grad_())
    del logits  # until now, no two tensors were at the same address
    return sum(kept.values()) // len(x)


class _Stopped(Exception):
    """An evaluation was asked to stop."""


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    prefix: str = "",
    *,
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
    ranks: TrainingRanks | None = None,
) -> Row:
    """Natural and robust loss and accuracy of ``model`` in eval mode.

    Args:
        model: maps images in [0, 1] to logits; its modules keep the modes they are in.
        x: uint8 images, shape (N, C, H, W).
        y: labels, shape (N,).
        attack: makes the adversarial examples for the robust metrics.
        prefix: put before the names.
        batch_size: images at a time.
        autocast: dtype to run the forward passes in; None for the model's own.
        ranks: processes that share every batch; None for those of the default group.

    Returns:
        ``natural_loss``, ``natural_acc``, ``robust_loss``, ``robust_acc``; accuracies in [0, 1].
    """
    ranks = ranks or TrainingRanks()
    sums = torch.zeros(4, device=x.device, dtype=torch.float64)
    # Autocast's cache of cast weights is off, since a captured attack would keep reading from it.
    precision = torch.autocast(
        x.device.type, autocast, enabled=autocast is not None, cache_enabled=False
    )
    with in_mode(model, "eval"), precision:
        for batch in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
            images, labels = ranks.shard(*batch)
            inputs = as_inputs(images)
            adversarial = attack(model, inputs, labels)
            if ranks.own:
                sums += torch.cat([_totals(model, z, labels) for z in (inputs, adversarial)])
    names = ("natural_loss", "natural_acc", "robust_loss", "robust_acc")
    means = (ranks.sum(sums) / len(x)).tolist()
    return {prefix + name: value for name, value in zip(names, means, strict=True)}


@torch.no_grad()
def _totals(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The summed cross-entropy, and how many are classified correctly; float64, shape (2,)."""
    logits = model(x)
    loss = F.cross_entropy(logits, y, reduction="sum")
    return torch.stack([loss.double(), (logits.argmax(1) == y).sum().double()])

"""The networks of the paper, and the ways to run a training step on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.question import Options
from benchmarks.steps import REFERENCE_AT, REFERENCE_AWP, images, network, training_step
from benchmarks.timing import WARMUP_CALLS


@dataclass(frozen=True)
class Network:
    """A network, the work of one training step, and the targets.

    Attributes:
        arch: its name for ``build_model``.
        batch: images a step.
        attack_steps: PGD iterations a step.
        rounds, calls: timed rounds, and calls that are timed together in each.
        speedup: the reference's time over that of a captured exact step, at least.
        share: the share of the device's bf16 matrix rate, at least.
    """

    arch: str
    batch: int
    attack_steps: int
    rounds: int
    calls: int
    speedup: float
    share: float

    def build(self, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
        return network(self.arch, device, memory_format)


RESNET18 = Network("preact_resnet18", 128, 10, rounds=10, calls=5, speedup=6, share=0.3)
WRN34_10 = Network("wide_resnet34_10", 128, 10, rounds=6, calls=3, speedup=4, share=0.5)
SMALL = Network("wide_resnet10_1", 4, 2, rounds=2, calls=2, speedup=4, share=0.5)


def networks(options: Options) -> list[Network]:
    """PreAct ResNet-18 and WideResNet-34-10; in quick mode a small one."""
    return [SMALL] if options.quick else [RESNET18, WRN34_10]


@dataclass(frozen=True)
class Setting:
    """How a step is run."""

    name: str
    bf16: bool
    captured: bool
    compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.bf16 else torch.contiguous_format


CAPTURED = Setting("captured bf16 channels_last", bf16=True, captured=True)
COMPILED = Setting("captured compiled bf16 channels_last", bf16=True, captured=True, compiled=True)
EAGER_BF16 = Setting("eager bf16 channels_last", bf16=True, captured=False)
EAGER_FP32 = Setting("eager float32", bf16=False, captured=False)


def build_step(net: Network, method: str, setting: Setting, options: Options) -> Callable[[], Any]:
    """A training step with a network and a batch of its own.

    The reference always runs as it is usually run: eager, in float32, contiguous.
    """
    if method in (REFERENCE_AT, REFERENCE_AWP):
        setting = EAGER_FP32
    model = net.build(options.device, setting.memory_format)
    if setting.compiled:
        # Quick mode checks that the step can be traced, without the C compiler.
        model = torch.compile(model, backend="aot_eager" if options.quick else "inductor")  # type: ignore[assignment]
    step = training_step(
        method,
        model,
        attack_steps=net.attack_steps,
        autocast=torch.bfloat16 if setting.bf16 else None,
        cuda_graph=setting.captured and options.on_gpu,  # True: a failed capture is an error
    )
    return partial(step, *images(net.batch, options.device, setting.memory_format))


def warmup(options: Options) -> int:
    """Calls before the timed ones."""
    return 1 if options.quick else WARMUP_CALLS

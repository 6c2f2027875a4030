"""How long does a training step take, with AWP and without, against the plain implementation?

    python -m benchmarks.gpu.step
    python -m benchmarks.gpu.step --case wide_resnet34_10

Every method with one network in one setting is a case; within it the methods are timed in turn.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.networks import (
    CAPTURED,
    EAGER_BF16,
    EAGER_FP32,
    Network,
    Setting,
    build_step,
    networks,
    warmup,
)
from benchmarks.gpu.question import Details, Options, Record, answer, milliseconds
from benchmarks.steps import AT, ATTACK, EXACT, REFERENCE_AWP
from benchmarks.timing import interleaved, median_ratio


def cases(options: Options) -> dict[str, partial[Details]]:
    return {
        f"{net.arch}, {setting.name}": partial(compare, net, setting, options)
        for setting in (CAPTURED, EAGER_BF16, EAGER_FP32)  # what matters most comes first
        for net in networks(options)
    }


def compare(
    net: Network,
    setting: Setting,
    options: Options,
    record: Record,
    methods: tuple[str, ...] = (AT, EXACT, ATTACK, REFERENCE_AWP),
) -> Details:
    """Time the methods in turn; the reference is the last of them."""
    steps = {method: build_step(net, method, setting, options) for method in methods}
    seconds = interleaved(
        steps, rounds=net.rounds, warmup=warmup(options), calls=net.calls, device=options.device
    )
    *ours, reference = methods
    over_at = {m: median_ratio(seconds, m, AT) for m in ours if m != AT}
    speedup = {m: median_ratio(seconds, reference, m) for m in ours}
    figures = milliseconds(seconds)
    record.figures("ms", figures["median_ms"])
    judged = setting.captured
    record.figure("reference / exact", speedup[EXACT], at_least=net.speedup if judged else None)
    record.figure("exact / AT", over_at[EXACT], at_most=1.14 if judged else None)
    if ATTACK in over_at:
        record.figure("attack / AT", over_at[ATTACK], at_most=1.05 if judged else None)
    return {
        **figures,
        "over_at": over_at,
        "reference_over": speedup,
        "batch": net.batch,
        "attack_steps": net.attack_steps,
        "calls_timed_together": net.calls,
    }


def main(argv: list[str] | None = None) -> int:
    return answer("step", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())

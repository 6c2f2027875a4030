"""How long does a training step take if the network goes through ``torch.compile``?

    python -m benchmarks.gpu.compiled --case preact_resnet18
    python -m benchmarks.gpu.compiled --case wide_resnet34_10

Compiling takes a minute and more for each method: run one case at a time.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks.gpu.networks import COMPILED, Network, networks
from benchmarks.gpu.question import Details, Options, Record, answer
from benchmarks.gpu.step import compare
from benchmarks.steps import AT, EXACT, REFERENCE_AWP


def cases(options: Options) -> dict[str, partial[Details]]:
    return {
        f"{net.arch}, {COMPILED.name}": partial(compare_compiled, net, options)
        for net in networks(options)
    }


def compare_compiled(net: Network, options: Options, record: Record) -> Details:
    with many_compilations():
        return compare(net, COMPILED, options, record, methods=(AT, EXACT, REFERENCE_AWP))


def many_compilations() -> Any:
    """Allow several networks of one class, each in several modes; more of them are an error."""
    import torch._dynamo.config as config

    wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    return config.patch({k: v for k, v in wanted.items() if hasattr(config, k)})


def main(argv: list[str] | None = None) -> int:
    return answer("compiled", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The questions that only a GPU answers, asked in one go: ``python -m benchmarks.accelerator``.

    python -m benchmarks.accelerator correct step mfu memory weights attacks
    python -m benchmarks.accelerator compiled  # networks through torch.compile; takes its time
    python -m benchmarks.accelerator reproduce --data-dir data --run-dir runs/at-awp --minutes 9
    python -m benchmarks.accelerator step --device cpu --quick   # does it run? The figures are void

Each item has a JSON file of its own, written anew after every figure, so that a run cut short keeps
what it had. Times are medians of device events after a warm-up, and what is compared is measured in
turn. A figure that fails is recorded with its traceback, the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from awp_optim import AWP, AdversarialStep
from awp_optim._core.perturbation import ascend_, layer_norms
from awp_optim.attacks import PGD, Captured
from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData, load_cifar10, load_digits
from awp_optim.lab.models import PreActResNet, WideResNet, build_model
from awp_optim.lab.run_folder import Row, best
from awp_optim.lab.trainer import fit
from benchmarks.harness import (
    RESULTS,
    ROOT,
    Seconds,
    device_slug,
    environment,
    interleaved,
    median_ratio,
    write_json,
)
from benchmarks.reference import ReferenceStep

EPS, STEP_SIZE, GAMMA = 8 / 255, 2 / 255, 1e-2
Figures = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: torch.device
    quick: bool = False
    out: Path = RESULTS
    data_dir: Path = Path("data")
    run_dir: Path = Path("runs/at-awp")
    minutes: float = math.inf
    gamma: float = GAMMA
    limit: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Record:
    """One item's JSON file, and its lines in the table that is printed last."""

    def __init__(self, item: str, options: Options) -> None:
        now = datetime.now(timezone.utc)
        self.item = item
        self.path = options.out / f"{item}-{now:%Y%m%d-%H%M%S}.json"
        self.content: Figures = {
            "item": item,
            "status": "running",
            "quick": options.quick,
            "environment": {
                **environment(options.device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            },
            "figures": [],
            "parts": {},
            "notes": [],
        }
        self._failed = False
        self._judged = not options.quick
        self.write()

    def part(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """Measure a part and write it down; an exception is recorded in its place.

        Args:
            name: of the part.
            measure: returns its figures.

        Returns:
            The figures; none after an exception.
        """
        print(f"{self.item}: {name}", flush=True)
        start = time.perf_counter()
        try:
            figures = measure()
        except Exception:
            error = traceback.format_exc()
            print(error, flush=True)
            self._failed = True
            self.update(name, {**self.content["parts"].get(name, {}), "error": error})
            self.figure(name, "failed")
            return {}
        self.update(name, {**figures, "took_seconds": time.perf_counter() - start})
        return figures

    def update(self, name: str, figures: Figures) -> None:
        """What is known of a part so far."""
        self.content["parts"][name] = figures
        self.write()

    def figure(
        self,
        name: str,
        value: float | str | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A figure for the table, with its target if it has one. A quick run is not judged."""
        met: bool | None = None
        if isinstance(value, (int, float)) and self._judged:
            if at_least is not None:
                met = value >= at_least
            elif at_most is not None:
                met = value <= at_most
        target = None
        if at_least is not None or at_most is not None:
            target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        shown = f"{value:.4g}" if isinstance(value, (int, float)) else value
        print(f"  {name}: {shown}{f', target {target}' if target else ''}", flush=True)
        self.content["figures"].append({"name": name, "value": value, "target": target, "met": met})
        self.write()

    def note(self, text: str) -> None:
        """Something the reader of the figures must know."""
        print(f"{self.item}: {text}", flush=True)
        self.content["notes"].append(text)
        self.write()

    def close(self, error: str | None = None) -> bool:
        """Finish, after an error with its traceback; returns whether all went well."""
        if error is not None:
            print(error, flush=True)
            self.content["error"] = error
            self.figure(self.item, "failed")
        ok = error is None and not self._failed
        self.content["status"] = "complete" if ok else "failed"
        self.write()
        return ok

    def write(self) -> None:
        write_json(self.path, self.content)


# ------------------------------------------------------------------------- what is measured on


@dataclass(frozen=True)
class Case:
    """A network and the work of one training step."""

    name: str
    build: Callable[[], nn.Module]
    at_least: float
    """How many times as fast as the reference a captured exact step shall be."""
    mfu: float
    """The share of the matrix rate that it shall reach."""
    rounds: int
    batch: int = 128
    steps: int = 10


def cases(options: Options) -> list[Case]:
    resnet = Case("preact_resnet18", partial(_build, "preact_resnet18"), 6, 0.3, rounds=20)
    wide = Case("wide_resnet34_10", partial(_build, "wide_resnet34_10"), 4, 0.5, rounds=10)
    if options.quick:
        tiny: dict[str, Any] = {"rounds": 2, "batch": 8, "steps": 2}
        resnet = replace(resnet, build=partial(PreActResNet, (1, 1), 4), **tiny)
        wide = replace(wide, build=partial(WideResNet, 10, 1), **tiny)
    return [resnet, wide]


def _build(name: str) -> nn.Module:
    return build_model(name, num_classes=10, in_channels=3)


@dataclass(frozen=True)
class Setting:
    """How a step is run."""

    name: str
    bf16: bool
    captured: bool
    compiled: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.bf16 else torch.contiguous_format


CAPTURED = Setting("captured bf16 channels_last", bf16=True, captured=True)
COMPILED = Setting("captured compiled bf16 channels_last", bf16=True, captured=True, compiled=True)
EAGER_BF16 = Setting("eager bf16 channels_last", bf16=True, captured=False)
EAGER_FP32 = Setting("eager float32", bf16=False, captured=False)

METHODS = ("at", "exact", "attack", "momentum")
# A step takes the same time at any learning rate. At a low one a network that sees one batch over
# and over stays what it was.
SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}


def training_step(case: Case, method: str, setting: Setting, options: Options) -> Step:
    """A step of its own network, on its own batch of random images."""
    torch.manual_seed(0)
    model = case.build().to(options.device)
    model.to(memory_format=setting.layout)
    if setting.compiled:
        # The quick way finds out whether the step can be traced, and leaves out the C compiler.
        model = torch.compile(model, backend="aot_eager" if options.quick else "inductor")  # type: ignore[assignment]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), **SGD)
        if method == "at"
        else AWP(model.parameters(), torch.optim.SGD, gamma=GAMMA, **SGD)
    )
    step = AdversarialStep(
        model,
        optimizer,
        PGD(EPS, STEP_SIZE, case.steps),
        ascent="exact" if method == "at" else method,
        autocast=torch.bfloat16 if setting.bf16 else None,
        # True, where it can be: then a step that cannot be captured is an error.
        cuda_graph=setting.captured and options.on_gpu,
    )
    return partial(step, *images(case.batch, options.device, setting.layout))


def reference_step(case: Case, options: Options) -> Step:
    """The usual implementation, the usual way: eager, float32."""
    torch.manual_seed(0)
    model = case.build().to(options.device)
    step = ReferenceStep(
        model,
        torch.optim.SGD(model.parameters(), **SGD),
        gamma=GAMMA,
        eps=EPS,
        step_size=STEP_SIZE,
        steps=case.steps,
    )
    return partial(step, *images(case.batch, options.device, torch.contiguous_format))


def images(n: int, device: torch.device, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Random images of CIFAR's shape, (n, 3, 32, 32) in [0, 1], and random labels."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, 3, 32, 32, generator=g), torch.randint(10, (n,), generator=g)
    return x.to(device).contiguous(memory_format=layout), y.to(device)


def warmup(options: Options) -> int:
    """Calls before the timed ones: the first few run eagerly, the next is captured."""
    return 1 if options.quick else 6


def free(options: Options) -> None:
    """Give the memory of what is gone back, and forget what was compiled for it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if options.on_gpu:
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()


def times(seconds: Seconds) -> Figures:
    """Medians, and every repeat."""
    return {
        "median_ms": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "ms": {name: [1e3 * t for t in s] for name, s in seconds.items()},
    }


def listed(values: dict[str, float]) -> str:
    """Several figures in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


# ------------------------------------------------------------------------- the items


def correct(options: Options, record: Record) -> None:
    """The tests marked gpu, in a process of their own."""
    counts = record.part("pytest -m gpu", partial(run_gpu_tests, ROOT / "tests"))
    if not counts:
        return
    record.figure("tests, passed", counts["passed"])
    record.figure("tests, failed", counts["failed"], at_most=0)
    if counts["failed"]:
        raise RuntimeError("\n\n".join(counts["failures"].values()))
    if options.on_gpu and not counts["passed"]:
        raise RuntimeError(f"none of the tests ran: {counts['summary']}")


def run_gpu_tests(tests: Path, time_limit: float = 420) -> Figures:
    """Run the tests marked gpu in a folder.

    Returns:
        How many ``passed``, ``failed`` and were ``skipped``, and the text of each of ``failures``.

    Raises:
        RuntimeError: pytest itself failed, or took longer than ``time_limit`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=--import-mode=importlib", "-m", "gpu"]
        command += ["--continue-on-collection-errors", f"--junitxml={xml}", str(tests)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = Path(folder) / "log"
        code: int | str
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": path},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=time_limit,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"no result in {time_limit:g} s"
        said = log.read_text()
        if code not in (0, 1, 5):  # passed, failed, none found
            raise RuntimeError(f"pytest ended with {code}:\n{said[-6000:]}")
        results = list(ET.parse(xml).getroot().iter("testcase"))
    failures = {}
    for case in results:
        for problem in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures[name] = f"{name}\n{(problem.text or problem.get('message') or '')[-4000:]}"
    skipped = sum(case.find("skipped") is not None for case in results)
    return {
        "passed": len(results) - skipped - len(failures),
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "summary": said.strip().splitlines()[-1].strip("= "),
    }


def step(options: Options, record: Record) -> None:
    """Milliseconds a step, ours in every setting against the usual implementation."""
    resnet, wide = cases(options)
    order = [(resnet, CAPTURED), (wide, CAPTURED)]  # what matters most first
    order += [(resnet, EAGER_BF16), (resnet, EAGER_FP32)]
    order += [(wide, EAGER_BF16), (wide, EAGER_FP32)]
    step_times(order, options, record)


def compiled(options: Options, record: Record) -> None:
    """The same, and the share of the matrix rate, of networks through torch.compile."""
    for case in cases(options):
        step_times([(case, COMPILED)], options, record)
        matrix_shares([(case, COMPILED)], options, record)


def step_times(order: list[tuple[Case, Setting]], options: Options, record: Record) -> None:
    for case, setting in order:
        name = f"{case.name}, {setting.name}"
        figures = record.part(name, partial(compare_steps, case, setting, options))
        free(options)
        if not figures:
            continue
        record.figure(f"{name}, ms", listed(figures["median_ms"]))
        speedup, price = figures["reference_over"], figures["over_at"]
        if setting is CAPTURED:
            record.figure(f"{name}: reference / exact", speedup["exact"], at_least=case.at_least)
            record.figure(f"{name}: exact / at", price["exact"], at_most=1.14)
            record.figure(f"{name}: attack / at", price["attack"], at_most=1.05)
            record.figure(f"{name}: momentum / at", price["momentum"])
        else:
            record.figure(f"{name}: reference / ...", listed(speedup))


def compare_steps(case: Case, setting: Setting, options: Options) -> Figures:
    # Compiling takes a minute and more for each method: two of them answer the question.
    methods = ("at", "exact") if setting.compiled else METHODS
    with many_compilations() if setting.compiled else nullcontext():
        contestants = {m: training_step(case, m, setting, options) for m in methods}
        contestants["reference"] = reference_step(case, options)
        seconds = interleaved(
            contestants, rounds=case.rounds, warmup=warmup(options), device=options.device
        )
    return {
        **times(seconds),
        "over_at": {m: median_ratio(seconds, m, "at") for m in methods if m != "at"},
        "reference_over": {m: median_ratio(seconds, "reference", m) for m in methods},
        "batch": case.batch,
        "attack_steps": case.steps,
    }


def many_compilations() -> Any:
    """Room for several networks of one class, each in several modes; more are an error."""
    import torch._dynamo.config as config

    wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    return config.patch({k: v for k, v in wanted.items() if hasattr(config, k)})


def mfu(options: Options, record: Record) -> None:
    """The share of the card's bf16 matrix rate that a step reaches."""
    matrix_shares([(case, CAPTURED) for case in cases(options)], options, record)


def matrix_shares(order: list[tuple[Case, Setting]], options: Options, record: Record) -> None:
    for case, setting in order:
        name = f"{case.name}, {setting.name}, share"
        figures = record.part(name, partial(measure_mfu, case, setting, options))
        free(options)
        if not figures:
            continue
        rates = {**figures["tflops"], "matrices": figures["matmul_tflops"]}
        record.figure(f"{name}, TFLOP/s", listed(rates))
        record.figure(f"{name}: exact / matrices", figures["share"]["exact"], at_least=case.mfu)


def measure_mfu(case: Case, setting: Setting, options: Options) -> Figures:
    flops = {}
    for method in ("at", "exact"):
        one = training_step(case, method, EAGER_BF16, options)
        one()
        with FlopCounterMode(display=False) as counter:
            one()
        flops[method] = counter.get_total_flops()
        del one
    n = 256 if options.quick else 8192
    a, b = (torch.randn(n, n, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    with many_compilations() if setting.compiled else nullcontext():
        contestants = {m: training_step(case, m, setting, options) for m in flops}
        contestants["matmul"] = partial(torch.mm, a, b, out=out)
        rounds = 2 if options.quick else 20
        seconds = interleaved(
            contestants, rounds=rounds, warmup=warmup(options), device=options.device
        )
    rate = 2 * n**3 / statistics.median(seconds["matmul"])
    return {
        **times(seconds),
        "matmul_size": n,
        "matmul_tflops": rate / 1e12,
        "flops": flops,
        "tflops": {m: f / statistics.median(seconds[m]) / 1e12 for m, f in flops.items()},
        "share": {m: f / statistics.median(seconds[m]) / rate for m, f in flops.items()},
    }


def memory(options: Options, record: Record) -> None:
    """Peak memory of training with AWP over training without."""
    if not options.on_gpu:
        record.note("no allocator statistics on a CPU: the peaks are unknown")
    for case in cases(options):
        for setting in (EAGER_BF16, CAPTURED):
            name = f"{case.name}, {setting.name}"
            figures = record.part(name, partial(measure_memory, case, setting, options))
            for method, ratio in figures.get("over_at_in_parameters", {}).items():
                record.figure(f"{name}: ({method} - at) / parameters", ratio, at_most=1.05)


def measure_memory(case: Case, setting: Setting, options: Options) -> Figures:
    size = sum(p.numel() * p.element_size() for p in case.build().parameters() if p.ndim > 1)
    benchmark = torch.backends.cudnn.benchmark
    # Trying out algorithms takes workspaces that training does not, and by chance not the same.
    torch.backends.cudnn.benchmark = False
    try:
        peak_bytes(case, "at", setting, options)  # what libraries keep once they are loaded
        peaks = {m: peak_bytes(case, m, setting, options) for m in METHODS}
    finally:
        torch.backends.cudnn.benchmark = benchmark
    allocated = {m: p[0] for m, p in peaks.items() if p is not None}
    over = {m: (b - allocated["at"]) / size for m, b in allocated.items() if m != "at"}
    return {
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": {m: p[1] for m, p in peaks.items() if p is not None},
        "perturbed_parameters_bytes": size,
        "over_at_in_parameters": over,
    }


def peak_bytes(
    case: Case, method: str, setting: Setting, options: Options
) -> tuple[int, int] | None:
    """Most bytes allocated, and reserved, over those before; None where nobody counts them."""
    free(options)
    if options.on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    one = training_step(case, method, setting, options)
    for _ in range(warmup(options)):  # as far as the first replay
        one()
    if not options.on_gpu:
        return None
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return allocated - before[0], reserved - before[1]


def weights(options: Options, record: Record) -> None:
    """The weight arithmetic alone, against a copy of the same bytes."""
    # Shaped like a transformer's: projections and the two layers of an MLP.
    lists = {
        "100 M parameters": [(2048, 2048), (2048, 2048), (8192, 2048), (2048, 8192)] * 2
        + [(4096, 4096)],
        "1 B parameters": [(4096, 4096)] * 60,
    }
    if options.quick:
        lists = {"9 K parameters": [(64, 32), (32, 64), (73, 70)]}
    for name, shapes in lists.items():
        figures = record.part(name, partial(measure_weights, shapes, options))
        free(options)
        if not figures:
            continue
        for how in ("eager", "captured"):
            share = figures["share_of_copy_bandwidth"].get(how)
            if share is not None:
                record.figure(f"{name}: {how}, share of a copy's bandwidth", share, at_least=0.8)
        record.figure(f"{name}: copy, TB/s", figures["terabytes_a_second"]["copy"])


PASSES = {
    "eager": 9,
    "captured": 9,
    "copy": 2,
    "backup": 2,
    "norms": 2,
    "ascent": 3,
    "restore": 2,
    "plain norm": 1,
    "plain add": 3,
    "plain addcmul": 3,
}
"""Reads and writes of all the weights' bytes, at the least."""


def measure_weights(shapes: list[tuple[int, int]], options: Options) -> Figures:
    torch.manual_seed(0)
    device = options.device
    params = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    awp = AWP(params, torch.optim.SGD, gamma=5e-3, lr=0.1)

    def there_and_back() -> None:
        awp.first_step()
        awp.restore()

    there_and_back()  # allocates the backup
    contestants: dict[str, Callable[[], Any]] = {"eager": there_and_back}
    if options.on_gpu:
        contestants["captured"] = captured_graph(there_and_back).replay

    count = sum(p.numel() for p in params)
    a, b, out = (torch.randn(count, device=device) for _ in range(3))
    contestants["copy"] = partial(out.copy_, a)

    # The same work, operation by operation, on tensors of its own.
    moved = [p.detach().clone() for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    centres = [torch.empty_like(p) for p in moved]
    w_norms, g_norms = layer_norms(moved), layer_norms(grads)
    scale = torch.tensor(1e-3, device=device)
    contestants |= {
        "backup": partial(torch._foreach_copy_, centres, moved),
        "norms": lambda: (layer_norms(moved), layer_norms(grads)),
        "ascent": partial(
            ascend_, moved, grads, centres, w_norms, g_norms, gamma=5e-3, steps=1, at_centre=True
        ),
        "restore": partial(torch._foreach_copy_, moved, centres),
        "plain norm": partial(torch.linalg.vector_norm, a),
        "plain add": partial(torch.add, a, b, out=out),
        "plain addcmul": partial(torch.addcmul, a, b, scale, out=out),
    }
    rounds = 2 if options.quick else 30
    seconds = interleaved(contestants, rounds=rounds, warmup=3, device=device)
    size = 4 * count
    speed = {k: PASSES[k] * size / statistics.median(s) / 1e12 for k, s in seconds.items()}
    return {
        **times(seconds),
        "parameters": count,
        "shapes": [list(s) for s in shapes],
        "passes": PASSES,
        "terabytes_a_second": speed,
        "share_of_copy_bandwidth": {k: v / speed["copy"] for k, v in speed.items()},
    }


def captured_graph(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The function's kernels as a graph, after two calls on the side as torch asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def attacks(options: Options, record: Record) -> None:
    """PGD-20 of ours against torchattacks'."""
    for batch in [8] if options.quick else [128, 1000]:
        name = f"PGD-20, batch {batch}"
        figures = record.part(name, partial(measure_attacks, batch, options))
        free(options)
        if not figures:
            continue
        record.figure(f"{name}, ms", listed(figures["median_ms"]))
        for contestant, ratio in figures.get("torchattacks_over", {}).items():
            if contestant.startswith("captured"):
                record.figure(f"{name}: torchattacks / {contestant}", ratio, at_least=3)
        if "torchattacks_over" not in figures:
            record.note("torchattacks is not installed: left out")


def measure_attacks(batch: int, options: Options) -> Figures:
    case = cases(options)[0]
    steps = 2 if options.quick else 20
    pgd = PGD(EPS, STEP_SIZE, steps)

    def oracle(layout: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model = case.build().to(options.device).eval()
        model.to(memory_format=layout)
        return model, *images(batch, options.device, layout)

    usual, last = oracle(torch.contiguous_format), oracle(torch.channels_last)
    captured, captured_bf16 = Captured(pgd), Captured(pgd)

    def in_bf16() -> Tensor:
        with torch.autocast(options.device.type, torch.bfloat16, cache_enabled=False):
            return captured_bf16(*last)

    contestants: dict[str, Callable[[], Any]] = {
        "eager float32": partial(pgd, *usual),
        "captured float32": partial(captured, *usual),
        "captured bf16 channels_last": in_bf16,
    }
    peer = optional_module("torchattacks")
    if peer is not None:
        model, x, y = usual
        theirs = peer.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=True)
        contestants["torchattacks"] = partial(theirs, x, y)
    rounds = 2 if options.quick else 20
    seconds = interleaved(contestants, rounds=rounds, warmup=warmup(options), device=options.device)
    figures = times(seconds)
    if peer is not None:
        ours = (name for name in seconds if name != "torchattacks")
        figures["torchattacks_over"] = {n: median_ratio(seconds, "torchattacks", n) for n in ours}
    return figures


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# Wu, Xia & Wang (2020): CIFAR-10, PreAct ResNet-18, L_inf 8/255, in %. Best and last robust
# accuracy (PGD-20) with the natural accuracy of the same checkpoints: Table 3 there, means of five
# runs. By epochs done, robust and natural: the training logs published with their code, one run.
PAPER = {
    "at-awp": {"best": 55.39, "last": 54.73, "natural_best": 82.00, "natural_last": 81.11},
    "at": {"best": 52.79, "last": 44.44},
}
PUBLISHED_CURVES: dict[str, dict[int, tuple[float, float]]] = {
    "at-awp": {
        1: (20.02, 23.03),
        2: (25.61, 33.62),
        5: (31.00, 42.39),
        10: (37.80, 56.53),
        20: (44.69, 66.26),
        30: (46.53, 69.24),
        40: (46.01, 68.86),
        50: (47.09, 70.23),
        60: (48.21, 70.31),
        70: (47.61, 73.65),
        80: (47.10, 70.56),
        90: (49.33, 72.97),
        100: (47.35, 72.14),
        110: (53.47, 78.80),
        120: (53.86, 79.14),
        130: (53.58, 79.44),
        140: (54.23, 79.79),
        150: (54.17, 78.63),
        160: (55.39, 81.18),
        170: (54.93, 80.87),
        180: (55.05, 80.80),
        190: (55.10, 82.00),
        200: (54.30, 81.65),
    },
    "at": {
        1: (25.95, 36.96),
        2: (30.61, 43.52),
        5: (35.49, 53.25),
        10: (40.51, 65.62),
        20: (43.16, 69.72),
        30: (45.66, 73.03),
        40: (44.66, 72.30),
        50: (45.23, 72.35),
        60: (46.50, 73.23),
        70: (44.88, 73.83),
        80: (45.53, 75.36),
        90: (47.11, 75.13),
        100: (45.83, 73.73),
        110: (51.31, 83.39),
        120: (49.18, 82.71),
        130: (48.88, 82.75),
        140: (48.68, 83.36),
        150: (48.57, 82.73),
        160: (47.39, 84.99),
        170: (46.24, 84.70),
        180: (45.63, 84.98),
        190: (45.07, 85.34),
        200: (43.75, 84.60),
    },
}


def reproduce(options: Options, record: Record) -> None:
    """Train as in Section 4.4 of the paper, as far as the minutes go; a later run goes on."""
    deadline = time.monotonic() + 60 * options.minutes
    data = load_data(options)
    tiny: dict[str, Any] = {
        "arch": "preact_resnet_small",
        "epochs": 2,
        "train_steps": 2,
        "test_steps": 2,
        "augment": False,
        "train_eval": 20,
    }
    config = Config(gamma=options.gamma, precision="bfloat16", **(tiny if options.quick else {}))
    name = "at-awp" if options.gamma else "at"
    rows: list[Row] = []
    if (last := options.run_dir / "last.pt").exists():
        rows = torch.load(last, map_location="cpu", weights_only=True)["rows"]

    def on_epoch(row: Row) -> None:
        rows.append(row)
        record.update(name, run_figures(rows, config, name))
        print(
            f"epoch {len(rows)}/{config.epochs}: {row['train_seconds']:.1f} s + "
            f"{row.get('eval_seconds', 0):.1f} s, robust {row.get('test_robust_acc', 0):.2%}",
            flush=True,
        )

    def train() -> Figures:
        if len(rows) < config.epochs:
            fit(
                config,
                data,
                options.run_dir,
                resume=True,
                on_epoch=on_epoch,
                stop=lambda: time.monotonic() >= deadline,
            )
        return run_figures(rows, config, name)

    figures = record.part(name, train)
    if not figures:
        return
    record.figure("epochs done", figures["epochs_done"])
    if figures["epochs_done"]:
        record.figure("seconds an epoch, training", figures["median_train_seconds"])
        record.figure("seconds an epoch, testing", figures["median_eval_seconds"])
    if figures["epochs_done"] == config.epochs:
        paper = PAPER[name] if config.gamma in (0, GAMMA) else {}
        record.figure("best robust accuracy, %", figures["best"], at_least=paper.get("best"))
        record.figure("last robust accuracy, %", figures["last"], at_least=paper.get("last"))
        record.figure("whole run, minutes", figures["total_seconds"] / 60, at_most=20)


def run_figures(rows: list[Row], config: Config, name: str) -> Figures:
    """What a run has come to so far. Nothing is extrapolated."""
    published = PUBLISHED_CURVES[name]
    curve = [
        {
            "epochs_done": int(row["epoch"]) + 1,
            "robust": 100 * row["test_robust_acc"],
            "published_robust": published[int(row["epoch"]) + 1][0],
            "natural": 100 * row["test_natural_acc"],
            "published_natural": published[int(row["epoch"]) + 1][1],
        }
        for row in rows
        if int(row["epoch"]) + 1 in published and "test_robust_acc" in row
    ]
    training = [row["train_seconds"] for row in rows]
    testing = [row["eval_seconds"] for row in rows if "eval_seconds" in row]
    evaluated = [row for row in rows if "test_robust_acc" in row]
    return {
        "config": vars(config),
        "epochs_done": len(rows),
        "median_train_seconds": statistics.median(training) if training else None,
        "median_eval_seconds": statistics.median(testing) if testing else None,
        "total_seconds": sum(training) + sum(testing),
        "best": 100 * best(rows)["test_robust_acc"] if evaluated else None,
        "last": 100 * evaluated[-1]["test_robust_acc"] if evaluated else None,
        "paper": PAPER[name],
        "against_the_published_curve": curve,
        "rows": rows,
    }


def load_data(options: Options) -> ImageData:
    if options.quick:
        return load_digits().limit(48, 24).to(options.device)
    return load_cifar10(options.data_dir, download=False).to(options.device)


def autoattack(options: Options, record: Record) -> None:
    """The reference AutoAttack, standard, on the run's best checkpoint.

    All four attacks on some images, then on the next: what is measured when it is cut short is the
    true figure of the images so far.
    """
    peer = optional_module("pyautoattack")
    if peer is None:
        record.note("pyautoattack is not installed: left out")
        return
    deadline = time.monotonic() + 60 * options.minutes
    figures = record.part("standard", partial(run_autoattack, peer, options, record, deadline))
    if figures:
        record.figure("images", figures["images"])
        record.figure("natural accuracy, %", 100 * figures["natural"])
        record.figure("AutoAttack, %; published: about 50", 100 * figures["robust"])


def run_autoattack(peer: Any, options: Options, record: Record, deadline: float) -> Figures:
    data = load_data(options)
    saved = torch.load(options.run_dir / "best.pt", map_location=options.device, weights_only=True)
    about = saved["config"]
    model = build_model(
        about["arch"], num_classes=data.num_classes, in_channels=data.in_channels
    ).to(options.device)
    model.load_state_dict(saved["model"])
    model.to(memory_format=torch.channels_last).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    norm = {"linf": "Linf", "l2": "L2"}[about["norm"]]
    judge = partial(peer.AutoAttack, model, norm=norm, eps=about["eps"], device=options.device)
    quick = {"version": "custom", "attacks": ["apgd-ce"]}
    adversary = judge(seed=0, **(quick if options.quick else {"version": "standard"}))
    chunk = 8 if options.quick else 500
    limit = min(options.limit or len(data.x_test), len(data.x_test))
    correct = robust = done = 0
    figures: Figures = {"row": saved["row"], "precision": "float32 (TF32)", "chunks": []}
    for start in range(0, limit, chunk):
        began = time.monotonic()
        x = data.x_test[start : min(start + chunk, limit)].float() / 255
        y = data.y_test[start : min(start + chunk, limit)]
        with torch.no_grad():
            correct += int((model(x).argmax(1) == y).sum())
        _, said = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        robust += int((said == y).sum())
        done += len(y)
        figures["chunks"].append({"images": len(y), "seconds": time.monotonic() - began})
        figures |= {"images": done, "natural": correct / done, "robust": robust / done}
        record.update("standard", figures)
        print(f"autoattack: {done} images, robust {robust / done:.2%}", flush=True)
        if 2 * time.monotonic() - began > deadline:
            break
    return figures


ITEMS: dict[str, Callable[[Options, Record], None]] = {
    f.__name__: f
    for f in (correct, step, mfu, memory, weights, attacks, compiled, reproduce, autoattack)
}


# ------------------------------------------------------------------------- the command


def run(items: list[str], options: Options) -> int:
    """Answer the items one after another; returns the exit code."""
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    records, ok = [], True
    for item in items:
        record = Record(item, options)
        records.append(record)
        error = None
        try:
            ITEMS[item](options, record)
        except Exception:
            error = traceback.format_exc()
        ok = record.close(error) and ok
        free(options)
    show(records, options)
    return 0 if ok else 1


def show(records: list[Record], options: Options) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{records[0].content['environment']['device']}, torch {torch.__version__}"
    table = Table(
        title=f"{title}; a quick run, its figures are void" if options.quick else title,
        box=box.SIMPLE,
    )
    for heading in ("item", "figure", "value", "target", "met"):
        table.add_column(heading)
    for record in records:
        for figure in record.content["figures"]:
            value = figure["value"]
            table.add_row(
                record.item,
                figure["name"],
                f"{value:.4g}" if isinstance(value, (int, float)) else str(value),
                figure["target"] or "",
                {None: "", True: "yes", False: "no"}[figure["met"]],
            )
        for note in record.content["notes"]:
            table.add_row(record.item, note)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(f"Written to {records[0].path.parent}", soft_wrap=True, highlight=False)


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        epilog="items:\n" + "\n".join(f"  {k:12}{_first_line(f)}" for k, f in ITEMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("items", nargs="+", choices=ITEMS, metavar="ITEM", help="see below")
    add("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    add("--quick", action="store_true", help="tiny networks: does it run? The figures are void")
    add("--out", type=Path, help="folder of the JSON files (default: benchmarks/results/DEVICE)")
    add("--data-dir", type=Path, default=Path("data"), help="CIFAR-10 (default: %(default)s)")
    add("--run-dir", type=Path, default=Path("runs/at-awp"), help="of reproduce, autoattack")
    add("--minutes", type=float, default=math.inf, help="for reproduce and autoattack, each")
    add("--gamma", type=float, default=GAMMA, help="of reproduce; 0 is plain AT (%(default)s)")
    add("--limit", type=int, help="test images for autoattack (default: all)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu --quick")
    out = args.out
    if out is None:
        quick = Path(tempfile.gettempdir()) / "awp-accelerator-quick"
        out = quick if args.quick else RESULTS / device_slug(device)
    return run(
        args.items,
        Options(
            device=device,
            quick=args.quick,
            out=out,
            data_dir=args.data_dir,
            run_dir=args.run_dir,
            minutes=args.minutes,
            gamma=args.gamma,
            limit=args.limit,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())

"""How fast images of a file larger than memory become batches, and what that takes of memory.

    python -m benchmarks.generated_data --folder data --images 5000000

Writes an uncompressed file of random images of CIFAR-10's shape into the folder (3.1 GB a million)
and removes it at the end. On one core, with the file in the page cache and without it: batches as
training reads them, and the same by indexing a memory map. Then two trainings of a few steps, each
in a process of its own, with the file and without it. Writes generated_data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.data.arrays import ArrayFile
from awp_optim.lab.prefetch import prefetched
from awp_optim.lab.pseudo import PseudoLabeled, load_pseudo_labeled
from awp_optim.lab.trainer import fit
from awp_optim.lab.training_set import epoch_order
from benchmarks.environment import RESULTS, environment, write_json

SHAPE = (32, 32, 3)
TARGET = 25_000
"""Images a second that a GPU of the H100's class is expected to train PreAct ResNet-18 on."""


def write_file(path: Path, n: int, chunk: int = 50_000) -> None:
    """What ``np.savez(path, image=..., label=...)`` writes: random images, again and again."""
    images = np.random.default_rng(0).bytes(chunk * int(np.prod(SHAPE)))
    label = np.arange(n) * 10 // n  # sorted, as in published files
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("image.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, *SHAPE)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, n, chunk):
                file.write(images[: min(chunk, n - start) * int(np.prod(SHAPE))])
        with archive.open("label.npy", "w") as file:
            np.lib.format.write_array(file, label)


def drop_from_cache(path: Path) -> None:
    """Remove a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(source: PseudoLabeled, batches: Tensor) -> Iterator[Tensor]:
    """Batches as training reads them."""
    jobs = (partial(source.read, index, source.empty(len(index))) for index in batches)
    with closing(prefetched(jobs)) as images:
        yield from images


def mapped(path: Path, batches: Tensor) -> Iterator[Tensor]:
    """Batches by indexing a memory map, in order of the file."""
    where = ArrayFile(path).stored("image")
    images = np.memmap(path, where.dtype, "r", where.offset, where.shape)
    for index in batches:
        ordered, back = index.sort()
        yield torch.from_numpy(images[ordered.numpy()])[back.argsort()]


def throughput(batches: Tensor, images: Iterator[Tensor]) -> dict[str, float]:
    """Images a second by the clock, and by the processor time they took."""
    clock, processor = time.perf_counter(), time.process_time()
    for _ in images:
        pass
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    n = batches.numel()
    return {"images_per_second": n / clock, "images_per_processor_second": n / processor}


def throughputs(path: Path, n: int, in_cache: int, batch: int) -> dict[str, dict[str, float]]:
    """By how images are read, and whether they are in the page cache; on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    source = load_pseudo_labeled(path)
    readers: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
        "read": partial(read, source),
        "memory map": partial(mapped, path),
    }
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, reader in readers.items():
        drop_from_cache(path)
        batches = torch.randint(n, (40, batch), generator=generator)
        found[f"{name}, from the disk"] = throughput(batches, reader(batches))
    for _ in read(source, torch.arange(in_cache).view(-1, batch)):
        pass
    for name, reader in readers.items():
        batches = torch.randint(in_cache, (400, batch), generator=generator)
        found[f"{name}, from the page cache"] = throughput(batches, reader(batches))
    return found


def memory() -> dict[str, float]:
    """What Linux counts as this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {k: int(kilobytes[k]) / 1024 for k in ("RssAnon", "RssFile", "VmHWM")}


def train(file: str) -> None:
    """A training of a few steps in this process; prints its peaks of memory, in MB, as JSON."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2000, 3, 32, 32), dtype=torch.uint8, generator=rng)
    y = torch.randint(10, (2000,), generator=rng)
    data = ImageData(x, y, x[:100], y[:100], tuple("abcdefghij"), "random")
    config = Config(
        arch="preact_resnet_small",
        epochs=1,
        epoch_images=2_560,
        batch_size=256,
        unlabeled_share=0.8,
        train_steps=1,
        test_steps=1,
        train_eval=100,
    )
    peaks: dict[str, float] = {}

    def on_step(done: int, steps: int) -> None:
        for name, size in memory().items():
            peaks[name] = max(size, peaks.get(name, 0.0))

    more = load_pseudo_labeled(file) if file else None
    start = time.perf_counter()
    fit(config, data, unlabeled=more, on_step=on_step)
    peaks |= {"VmHWM": memory()["VmHWM"], "seconds": time.perf_counter() - start}
    print(json.dumps(peaks))


def peak_memory(path: Path | None) -> dict[str, float]:
    """The peaks that :func:`train` prints, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generated_data", "--train", str(path or "")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def order_seconds(n: int, images: int = 50_000) -> float:
    """How long the order of an epoch with n images to choose from takes to draw."""
    start = time.perf_counter()
    epoch_order(50_000, images, 512, torch.Generator().manual_seed(0), unlabeled=n, share=0.8)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("data"))
    parser.add_argument("--images", type=int, default=5_000_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "generated_data.json")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        return train(args.train)
    content: dict[str, Any] = {**environment(), "images": args.images, "batch": args.batch}
    content |= {"cores": 1, "target_images_per_second": TARGET}
    content["order_seconds"] = {str(n): order_seconds(n) for n in (1_000_000, 50_000_000)}
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "generated_data_benchmark.npz"
    try:
        write_file(path, args.images)
        content["gigabytes"] = path.stat().st_size / 1e9
        content["peak_memory_megabytes"] = {
            "without the file": peak_memory(None),
            "with the file": peak_memory(path),
        }
        in_cache = min(args.images, 1_000_000) // args.batch * args.batch
        content["throughput"] = throughputs(path, args.images, in_cache, args.batch)
    finally:
        path.unlink(missing_ok=True)
    write_json(args.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

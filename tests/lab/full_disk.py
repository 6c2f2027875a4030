"""A run on a disk that fills up, as a program of its own: its limits are those of its process.

    python full_disk.py FOLDER [BYTES]

Trains an epoch in FOLDER, fills the disk (or, with BYTES, forbids itself files of more than so
many) and resumes; prints the error; makes room and resumes to the end.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.trainer import fit

CONFIG = Config(
    arch="preact_resnet_small",
    eps=0.2,
    step_size=0.1,
    train_steps=1,
    test_steps=1,
    epochs=3,
    batch_size=32,
    train_eval=8,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    data = load_digits().limit(33, 16)
    rows = []
    fit(CONFIG, data, folder, on_epoch=rows.append, stop=lambda: len(rows) == 1)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    filler = folder.parent / "filler"
    if len(sys.argv) > 2:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limit[1]))
    else:
        try:
            with open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    try:
        fit(CONFIG, data, folder, resume=True)
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    print("as it was" if before == after else "changed")
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    else:
        filler.unlink()
    _, rows = fit(CONFIG, data, folder, resume=True)
    print(f"{len(rows)} epochs in the end")

"""Convert the published pickle of 500,000 pseudo-labeled TinyImages to ``.npz``, once.

    python -m awp_optim.lab.tinyimages ti_500K_pseudo_labeled.pickle ti_500K.npz

Carmon et al., "Unlabeled data improves adversarial robustness", 2019
(https://arxiv.org/abs/1905.13736) published it; ``--unlabeled ti_500K.npz`` trains on it. A pickle
can run code when it is read; here it cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from awp_optim.lab.data.arrays import images_of, labels_of
from awp_optim.lab.data.sources import one_line
from awp_optim.lab.pseudo import PseudoLabeled, save_pseudo_labeled

__all__ = ["convert_tinyimages"]


def convert_tinyimages(
    pickle_path: str | os.PathLike[str],
    npz_path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
) -> PseudoLabeled:
    """Write the images and labels of the pickle to an ``.npz`` file.

    The pickle holds a dict with ``data``, uint8 (N, H, W, C), and ``extrapolated_targets``,
    integers (N,). It is read without any class or function of its own choice: numbers, texts,
    plain containers and arrays of numbers are read, and anything else is refused.

    Args:
        pickle_path: The published file, ``ti_500K_pseudo_labeled.pickle``.
        npz_path: The file to write, for :func:`~awp_optim.lab.pseudo.load_pseudo_labeled`.
        sha256: The expected SHA-256 of the pickle, in hexadecimal, if it is known.

    Returns:
        The images and labels that were written.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: The pickle has another digest, is damaged or refused, or has other content.
    """
    path = Path(pickle_path).expanduser()
    with open(path, "rb") as stream:
        if sha256 is not None:
            digest = hashlib.sha256()
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
            if digest.hexdigest() != sha256.lower():
                raise ValueError(f"{path} has the SHA-256 {digest.hexdigest()}, not {sha256}")
            stream.seek(0)
        try:
            content = _ArrayUnpickler(stream).load()
            x, y = (content[name].value for name in ("data", "extrapolated_targets"))
        except Exception as error:  # whatever the damage leads to
            raise ValueError(
                f"{path} is damaged, or not the published pickle ({one_line(error)})"
            ) from error
    labeled = PseudoLabeled(
        images_of(f"{path}: data", x), labels_of(f"{path}: extrapolated_targets", y)
    )
    save_pseudo_labeled(labeled, npz_path)
    return labeled


# --- Reading arrays out of a pickle -----------------------------------------------------------
# numpy's own classes would trust what they are given: an array of objects whose flags are forged
# to say "numbers" takes the bytes of the file for addresses. These classes stand in for them. Each
# has a __setstate__, without which a pickle could set any attribute.


class _DType:
    """Stands in for ``numpy.dtype``: numbers only, little-endian."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}; only numbers are read")
        self.value = np.dtype("<" + code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"an array of byte order {state[1]!r}")


class _Array:
    """Stands in for ``numpy.ndarray``, which ``_reconstruct`` makes empty."""

    value: np.ndarray[Any, Any]

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


_STAND_INS = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # since numpy 2
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, texts, plain containers and arrays of numbers."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def main() -> None:
    """The command ``python -m awp_optim.lab.tinyimages``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pickle", type=Path, help="ti_500K_pseudo_labeled.pickle")
    parser.add_argument("npz", type=Path, help="the file to write")
    parser.add_argument("--sha256", help="the expected digest of the pickle")
    args = parser.parse_args()
    try:
        labeled = convert_tinyimages(args.pickle, args.npz, sha256=args.sha256)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.npz}: {len(labeled)} images, labels {labeled.y.bincount().tolist()}")


if __name__ == "__main__":
    main()

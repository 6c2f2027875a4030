"""Networks that ship with the package, by name.

``networks/`` holds ``NAME.safetensors`` and a card, ``NAME.md``, for each of :data:`DIGESTS`. To
add one: write its weights with :func:`~awp_optim.lab.weights_file.write_weights`, put their digest
(``sha256sum``) here, and say in the card how they were trained, what they achieve and what not.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["DIGESTS", "locate"]

FOLDER = Path(__file__).parent / "networks"
DIGESTS = {
    "cifar10-linf-preact10-32": "4d9c53956346ad0f99202aeb6785732cead9d4ebf96fa581c912dc5c2e994c1a",
}
"""The SHA-256 digest of each network's weights, by name."""


def locate(file: str | os.PathLike[str]) -> Path:
    """The file of weights that a path, or the name of a network that ships, stands for.

    Raises:
        FileNotFoundError: There is neither; the message lists the names.
        ValueError: The file of a network that ships was changed.
    """
    name, path = str(file), Path(file).expanduser()
    if name not in DIGESTS:
        if not path.exists():
            raise FileNotFoundError(
                f"there is no file {path}, and no network of this name; there are: "
                f"{', '.join(DIGESTS) or 'none'}"
            )
        return path
    path = FOLDER / f"{name}.safetensors"
    if hashlib.sha256(path.read_bytes()).hexdigest() != DIGESTS[name]:
        raise ValueError(f"{path} was changed: install awp_optim again")
    return path

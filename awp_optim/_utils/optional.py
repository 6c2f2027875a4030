"""Packages that only parts of awp_optim need."""

from __future__ import annotations

__all__ = ["require_numpy"]


def require_numpy(what: str) -> None:
    """Raise an ImportError that says how to install numpy, where it is missing."""
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs numpy: pip install 'awp_optim[eval]', or numpy") from error

"""Optional dependencies."""

from __future__ import annotations

__all__ = ["require_numpy"]


def require_numpy(what: str) -> None:
    """Raise an ImportError with advice if numpy is missing."""
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs numpy: pip install 'awp_optim[eval]', or numpy") from error

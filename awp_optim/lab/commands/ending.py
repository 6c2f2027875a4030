"""How a program ends: its exit status, and a sentence for an error."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from awp_optim.lab.job import Job, job

__all__ = ["run", "sentences"]

ERRORS = (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError)
"""What bad input, a full disk or a lost process raise. Anything else is a bug: a traceback."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of these, the user can make room and resume."""
LAB = (
    "jinja2",
    "matplotlib",
    "numpy",
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torchvision",
    "tyro",
)


def run(command: Callable[[Job], None], resume: str = "") -> None:
    """Run a program. It ends with status 0, or with a sentence on stderr and another status.

    The status is 2 after an error and 130 after Ctrl-C. Of several processes that torchrun started,
    one writes the sentence.

    Args:
        command: the program; gets the processes that it runs on.
        resume: after Ctrl-C or on a full disk, how to resume it.

    Raises:
        SystemExit: it has failed, or was stopped.
    """
    try:
        with job() as ranks, sentences(resume):
            command(ranks)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(end.code, file=sys.stderr)
        sys.exit(2)


@contextmanager
def sentences(resume: str = "") -> Iterator[None]:
    """Turn an error into a SystemExit with a sentence, which ``job`` reports once."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped{'; ' * bool(resume)}{resume}", file=sys.stderr)
        sys.exit(130)
    except ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and error.name in LAB:
            text += ": pip install 'awp_optim[lab]'"
        elif isinstance(error, OSError) and error.errno in FULL and resume:
            text += f"; {resume}"
        sys.exit(f"error: {text}")

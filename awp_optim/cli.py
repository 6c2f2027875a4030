"""The command line: ``awp COMMAND``, and ``python -m awp_optim COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import awp_optim

__all__ = ["main"]

COMMANDS = {
    "train": "train a classifier adversarially, with or without AWP",
    "evaluate": "measure its robust accuracy, from FGSM to AutoAttack",
    "landscape": "draw weight loss landscapes of training runs",
    "compare": "repeat the paper's comparisons: many settings, several seeds",
    "recipes": "list the named runs, with the accuracies reported for them",
    "pseudo-label": "label images with a classifier, for robust self-training",
}
SHARED = ("train", "landscape")
"""The commands that several processes of torchrun can share."""
RESUME = {
    "train": "the same command with --resume continues",
    "evaluate": "the same command with --resume continues",
    "landscape": "the same command continues",
    "compare": "the same command continues",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: its name and options; None for those of the process.

    Raises:
        SystemExit: the command failed or was stopped.
    """
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"awp_optim {awp_optim.__version__}")
    elif name in COMMANDS:
        _run(name, options)
    else:
        print(f"error: no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def _run(name: str, options: Sequence[str]) -> None:
    # Imported here because it takes seconds.
    from awp_optim.lab.commands.ending import run
    from awp_optim.lab.job import Job

    def command(ranks: Job) -> None:
        if ranks.world > 1 and name not in SHARED:
            raise ValueError(f"awp {name} runs in a single process: start it without torchrun")
        module = import_module(f"awp_optim.lab.commands.{name.replace('-', '_')}")
        module.main(options, ranks)

    run(command, RESUME.get(name, ""))


def _help() -> str:
    commands = "\n".join(f"  {name:14}{text}" for name, text in COMMANDS.items())
    return (
        "usage: awp COMMAND [OPTIONS]\n\nAdversarial weight perturbation.\n\n"
        f"{commands}\n\nawp COMMAND --help lists the options of a command."
    )

"""The core imports torch alone, and dependencies point downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import awp_optim

ROOT = Path(awp_optim.__file__).parent
# What each part of the package may import of the others, from the bottom up.
MAY_IMPORT = {
    "_utils": set(),
    "_core": {"_utils"},
    "batchnorm": set(),
    "objectives": {"_utils"},
    "optimizer": {"_core", "_utils"},
    "_cuda_graphs": {"_core", "_utils", "optimizer"},
    "attacks": {"_cuda_graphs", "_utils"},
    "step": {"_core", "_cuda_graphs", "_utils", "attacks", "batchnorm", "objectives", "optimizer"},
    "evaluation": {"_cuda_graphs", "_utils", "attacks"},
    "landscape": {"_core", "_cuda_graphs", "_utils", "attacks", "optimizer"},
    "__init__": {"batchnorm", "optimizer", "step"},
}
FRAMEWORKS = {"integrations"}
ABOVE = {"cli", "lab", "__main__"}


def _is_own(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is of this package."""
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").startswith("awp_optim")
    return any(alias.name.startswith("awp_optim") for alias in node.names)


def imports(file: Path) -> set[str]:
    """The modules a file imports, with relative ones made absolute.

    Those of other packages inside a function, or for type checkers only, do not count.
    """
    package = ["awp_optim", *file.relative_to(ROOT).parts[:-1]]
    found = set()
    tree = ast.parse(file.read_text())
    optional = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.If))
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]
    for node in ast.walk(tree):
        if node in optional and not _is_own(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from awp_optim import step" names a module below.
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= set(names) if module == "awp_optim" else {module}
    return found


def files_of(part: str) -> list[Path]:
    return (
        [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else [*(ROOT / part).rglob("*.py")]
    )


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_the_core_imports_downward_and_torch_alone(part):
    files = files_of(part)
    assert files
    for module in set().union(*map(imports, files)):
        top, *rest = module.split(".")
        if top == "awp_optim":
            assert rest[0] in MAY_IMPORT[part] | {part}, f"{part} imports {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{part} imports {module}"


@pytest.mark.parametrize("part", FRAMEWORKS)
def test_nothing_but_the_command_line_imports_the_lab(part):
    for module in set().union(*map(imports, files_of(part))):
        assert module.split(".")[:2] not in [["awp_optim", above] for above in ABOVE]


def test_names_of_the_package_are_found_when_they_are_used():
    code = """
import awp_optim
assert {*awp_optim.__all__, "attacks", "landscape", "__version__"} <= {*dir(awp_optim)}
assert callable(awp_optim.attacks.PGD) and callable(awp_optim.landscape.loss_curve)
from awp_optim import *
from awp_optim.optimizer import AWP as defined
assert AWP is defined is awp_optim.AWP and AdversarialStep and frozen_batch_norm
assert not hasattr(awp_optim, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_of_the_package_is_covered():
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - FRAMEWORKS - ABOVE == set(MAY_IMPORT)

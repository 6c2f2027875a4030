"""The core imports torch alone, and dependencies point downward only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import awp_optim

ROOT = Path(awp_optim.__file__).parent
# What each part of the core may import of the package.
BELOW = {
    "perturbation": set(),
    "sharding": {"perturbation"},
    "batchnorm": set(),
    "objectives": set(),
    "files": set(),
    "graphs": set(),
    "attacks": {"attacks", "graphs"},
    "optimizer": {"perturbation", "sharding"},
    "capturable": {"graphs", "optimizer"},
    "bars": set(),
    "ranks": set(),
    "batches": {"attacks"},
    "ledger": {"files"},
    "sanity": {"attacks"},
    "evaluation": {"attacks", "bars", "batches", "graphs", "ledger", "sanity"},
    "landscape": {
        "attacks",
        "bars",
        "batches",
        "graphs",
        "ledger",
        "optimizer",
        "perturbation",
        "ranks",
    },
    "step": {"attacks", "batchnorm", "capturable", "graphs", "objectives", "optimizer"},
    "__init__": {"batchnorm", "optimizer", "step"},
}


def _own(node: ast.Import | ast.ImportFrom) -> bool:
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
        if node in optional and not _own(node):
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


@pytest.mark.parametrize("part", BELOW)
def test_the_core_looks_down_only(part):
    files = [ROOT / f"{part}.py"] if part != "attacks" else list((ROOT / "attacks").glob("*.py"))
    assert files
    for module in set().union(*map(imports, files)):
        top, *rest = module.split(".")
        if top == "awp_optim":
            assert rest[0] in BELOW[part], f"{part} imports {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{part} imports {module}"


def test_every_part_of_the_core_is_covered():
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"lab", "integrations"} == set(BELOW)

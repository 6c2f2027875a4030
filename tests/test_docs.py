"""The code in README.md and docs/ runs, and what the pages name exists."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import awp_optim
from awp_optim import AWP
from awp_optim.attacks import PGD

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
OF_THE_PAPER = sorted((ROOT / "docs" / "paper").glob("*.md"))
FILES = {
    **{file.stem: file for file in [*OF_THE_ROOT, *GUIDES]},
    **{f"paper/{file.stem}": file for file in OF_THE_PAPER},
}
PAGES = {page: file.read_text(encoding="utf-8") for page, file in FILES.items()}


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, each after those imports of the blocks above that it uses.

    In docs/migration.md, a block of another package's code, which is left out, comes before each of
    ours.
    """
    imports: list[str] = []
    found = []
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        if not code.startswith("# before"):
            found.append("".join(line for line in imports if is_used(line, code)) + code)
            imports += re.findall(r"^(?:import|from) .*\n", code, re.M)
    return found


def is_used(line: str, code: str) -> bool:
    """Whether a block of code has one of the names that an import makes."""
    names = [part.split()[-1] for part in line.split("import ")[-1].split(",")]
    return any(re.search(rf"\b{name}\b", code) for name in names)


BLOCKS = {
    f"{page}-{i}": code for page, text in PAGES.items() for i, code in enumerate(blocks(text))
}
FRAMEWORKS = ("lightning", "accelerate", "transformers", "timm", "skorch")


class Net(nn.Module):
    """A classifier of images whose parameters have the names that the pages use."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(12, 8)
        self.layer = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer[0](self.embeddings(x.flatten(1)).relu()).relu())


def names_of_the_reader() -> dict[str, Any]:
    """What a page says is the reader's; everything else must be imported on the page."""
    torch.manual_seed(0)
    model = Net()
    x, y = torch.rand(64, 3, 2, 2), torch.randint(4, (64,))
    opt = AWP(model.parameters(), torch.optim.SGD, lr=0.1)
    return {
        "model": model,
        "other": Net(),
        "loader": DataLoader(TensorDataset(x, y), 16),
        "x": x[:8],
        "y": y[:8],
        "loss_fn": F.cross_entropy,
        "attack": PGD(eps=0.1, step_size=0.05, steps=2),
        "opt": opt,
        "scheduler": SimpleNamespace(step=lambda: None),
        "epochs": 2,
        "awp_warmup": 1,
    }


def names_of_the_frameworks(code: str, folder: Path, monkeypatch: Any) -> dict[str, Any]:
    """The reader's names in a block on a framework; skips the test where it is not installed."""
    needed = [name for name in FRAMEWORKS if re.search(rf"^(?:import|from) {name}\b", code, re.M)]
    modules = {name: pytest.importorskip(name) for name in needed}
    names: dict[str, Any] = {}
    if "accelerate" in modules:
        on_cpu = partial(modules["accelerate"].Accelerator, cpu=True)
        monkeypatch.setattr(modules["accelerate"], "Accelerator", on_cpu)
    if "skorch" in modules:
        names |= {"Net": partial(nn.Linear, 6, 3), "table": torch.rand(30, 6).numpy()}
        names["labels"] = (torch.arange(30) % 3).numpy()
    if "transformers" in modules:
        names |= names_of_transformers(modules["transformers"], folder)
    return names


def names_of_transformers(transformers: Any, folder: Path) -> dict[str, Any]:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    return {
        "bert": transformers.BertForSequenceClassification(config),
        "dataset": [{"input_ids": torch.arange(4), "labels": torch.tensor(1)}] * 4,
        "training_args": transformers.TrainingArguments(
            str(folder), num_train_epochs=2, use_cpu=True, report_to=[], save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
    }  # fmt: skip


def train_with_lightning(L: Any, kind: Any, names: dict[str, Any]) -> None:
    """Train a LightningModule of a page; the second one has the constructor of the first."""
    if kind.__init__ is L.LightningModule.__init__:
        module = kind()
        module.net = names["model"]
        module.configure_optimizers = lambda: AWP(module.parameters(), torch.optim.SGD, lr=0.1)
    else:
        module = kind(names["model"])
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
    trainer.fit(module, names["loader"])
    assert trainer.global_step == 4


@pytest.fixture(autouse=True)
def _fresh_accelerate(one_thread):
    yield
    state = importlib.util.find_spec("accelerate") and importlib.import_module("accelerate.state")
    if state:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_code_of_a_page_runs(code, tmp_path, monkeypatch):
    names = names_of_the_reader() | names_of_the_frameworks(code, tmp_path, monkeypatch)
    before = copy.deepcopy(names["model"].state_dict())
    exec(code, names)
    for name in ("Robust", "Accumulating"):
        if name in names:
            train_with_lightning(names["L"], names[name], names)
    opt = getattr(names["opt"], "optimizer", names["opt"])
    assert not opt.is_perturbed
    trains = any(word in code for word in (".backward(", "step(x, y)", "def training_step"))
    for name, p in names["model"].state_dict().items():
        assert torch.equal(p, before[name]) != trains, name


def test_every_page_with_code_is_tested():
    pages = {name.rsplit("-", 1)[0] for name in BLOCKS}
    assert pages >= {"README", "index", "training", "own-loop", "precision", "which-weights"}
    assert pages >= {"frameworks", "migration", "evaluation", "landscapes"}
    kinds = re.findall(r"```python\n# (\w+)", PAGES["migration"])
    assert kinds == ["before", "after"] * 4


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = FILES[page].parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else None
        assert file is None or file.exists(), target
        if anchor:
            text = file.read_text(encoding="utf-8") if file else PAGES[page]
            titles = re.findall(r"^#+ (.*)$", text, re.M)
            slugs = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
            assert anchor in slugs, target


def test_commands_exist():
    text = "\n".join(PAGES.values())
    for script in set(re.findall(r"(examples/\w+\.py|benchmarks/\w+\.py)", text)):
        assert (ROOT / script).exists(), script
    for module in set(re.findall(r"-m ((?:benchmarks|awp_optim)[\w.]+)", text)):
        assert importlib.util.find_spec(module), module
    commands = pytest.importorskip("awp_optim.cli").COMMANDS
    for command in set(re.findall(r"^    awp ([\w-]+)", text, re.M)):
        assert command in commands, command


def commands(page: str) -> list[list[str]]:
    """The ``awp`` commands of a page, as words; those without options are left out."""
    joined = PAGES[page].replace("\\\n", " ")
    lines = re.findall(r"^    awp (\w.*)$", joined, re.M)
    return [words for line in lines if len(words := shlex.split(line, comments=True)) > 1]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_options_of_commands_exist(page, monkeypatch):
    cli = pytest.importorskip("awp_optim.cli")
    shared = pytest.importorskip("awp_optim.lab.commands.options")

    class Read(Exception):
        """The command line has been read."""

    def parse_and_stop(*arguments, **more):
        shared.parse(*arguments, **more)
        raise Read

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # so that there is a "cuda"
    for name, *options in commands(page):
        module = importlib.import_module(f"awp_optim.lab.commands.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "parse", parse_and_stop)
        assert name in cli.COMMANDS
        with pytest.raises(Read):
            module.main(options, None)


TABLES = ("table-1", "table-2", "table-3", "tables-4-5")
CELL = r"(\d+\.\d\d)(?: ± \d\.\d\d)?"


def rows(page: str) -> dict[str, list[float]]:
    """The paper's values in a table by recipe, without their deviations."""
    found = re.findall(r"^\| `(\w[\w/-]*)` \| (.*) \|$", PAGES[f"paper/{page}"], re.M)
    return {name: [float(value) for value in re.findall(CELL, row)] for name, row in found}


def test_the_values_of_the_paper_are_those_of_the_recipes():
    recipes = pytest.importorskip("awp_optim.lab.recipes").PAPER
    tables = {"Table 4": "tables-4-5", "Table 5": "tables-4-5"}
    for name, recipe in recipes.items():
        page = tables.get(recipe.source, recipe.source.lower().replace(" ", "-"))
        assert rows(page)[name] == [*recipe.reported.values()], name
    for page in TABLES:  # what a page repeats of another
        for name, values in rows(page).items():
            reported = [*recipes[name].reported.values()]
            assert values[: len(reported)] == reported, (page, name)
    assert [len(rows(page)) for page in TABLES] == [12, 10, 12, 12]
    for name in rows("table-3").keys() & rows("tables-4-5"):
        assert rows("table-3")[name] == rows("tables-4-5")[name], name


def test_every_public_name_is_documented():
    text = "\n".join(PAGES.values())
    undocumented = {"Attack", "Evaluation", "Finding", "Objective", "Record"}
    for part in ("", ".attacks", ".evaluation", ".integrations", ".landscape", ".objectives"):
        module = importlib.import_module(f"awp_optim{part}")
        for name in set(module.__all__) - undocumented:
            assert name in text, f"{module.__name__}.{name}"


def test_version_changelog_and_citation_agree():
    heading = re.search(r"^## (.*)$", PAGES["CHANGELOG"], re.M)[1]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r"^version: (.*)$", citation, re.M)[1]
    assert version == awp_optim.__version__
    assert heading == "Unreleased" or heading.split()[0] == version

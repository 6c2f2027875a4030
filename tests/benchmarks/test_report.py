"""The report, on results made by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import BEGIN, END, draw, main, markdown, read, write_readme

INFO = {
    "command": "pytest benchmarks --benchmark-only",
    "commit": "abc1234",
    "date": "2020-02-03T04:05:06+00:00",
    "torch": "2.9.0",
    "python": "3.12.1",
    "device": "Some CPU, 2 cores",
    "threads": 2,
}
PHASES = {
    "AT": {"attack": 0.8, "ascent": 0.0, "descent": 0.19, "update": 0.01},
    "AT-AWP exact": {"attack": 0.8, "ascent": 0.12, "descent": 0.19, "update": 0.015},
    "reference AT-AWP": {"attack": 1.2, "ascent": 0.15, "descent": 0.19, "update": 0.02},
}


def timed(suite: str, title: str, contestant: str, median: float, base: str, ratio: float, **more):
    return {
        "suite": suite,
        "comparison": title,
        "contestant": contestant,
        "seconds": [median] * 3,
        "median": median,
        "base": base,
        "ratio": ratio,
        "ratio_quartiles": [ratio - 0.01, ratio + 0.02],
        **more,
    }


STEP = [
    timed("step", "a step", name, sum(p.values()), "AT", sum(p.values()), phases=p)
    for name, p in PHASES.items()
]
WEIGHTS = [
    timed(
        "weights",
        f"weights: {n}",
        name,
        median,
        "base.step()",
        ratio,
        parameters=n,
        tensors=10,
        optimizer="SGD",
        bandwidth_fraction=0.876,
    )
    for n in (2000, 100)  # the table puts them in order
    for name, median, ratio in (
        ("copy", 4e-6, 0.5),
        ("base.step()", 8e-6, 1.0),
        ("first_step + restore", 2e-5, 2.5),
    )
]
MEMORY = {
    "suite": "memory",
    "comparison": "peak memory",
    "contestant": "AT-AWP exact",
    "base": "AT",
    "peak_bytes": 300e6,
    "parameter_bytes": 40e6,
    "over_base_bytes": 42e6,
    "over_base_in_parameters": 1.05,
}
ATTACKS = [
    timed("attacks", "PGD", "awp_optim", 0.5, "awp_optim", 1.0, robust_accuracy=0.4375),
    timed("attacks", "PGD", "ART", 0.75, "awp_optim", 1.5, robust_accuracy=0.4375),
]
ALL = [*STEP, *WEIGHTS, MEMORY, *ATTACKS]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    entries = [{"name": row["contestant"], "extra_info": row} for row in ALL]
    path.write_text(json.dumps({"machine_info": INFO, "benchmarks": entries}))
    return path


@pytest.fixture
def accelerator(tmp_path):
    """What an item of the accelerator run writes."""
    figures = [
        {"name": "exact / at", "value": 1.12345, "target": "<= 1.14", "met": True},
        {"name": "reference / exact", "value": 5.5, "target": ">= 6", "met": False},
        {"name": "ms", "value": "at 20.1, exact 22.6", "target": None, "met": None},
    ]
    content = {"item": "step", "status": "complete", "quick": False, "environment": INFO}
    path = tmp_path / "step-20200203-040506.json"
    path.write_text(json.dumps({**content, "figures": figures, "parts": {}, "notes": []}))
    return path


def cells(text: str, first: str) -> list[str]:
    """The cells of the one line of a table that starts with this one."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    (line,) = [line for line in lines if line[0] == first]
    return line


def test_steps_have_medians_ratios_and_phases():
    text = markdown(STEP)
    head, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert [c.strip() for c in head.strip("|").split("|")] == [
        "",
        "median",
        "ratio to AT",
        "attack",
        "ascent",
        "descent",
        "update",
    ]
    assert cells(text, "AT") == ["AT", "1.00 s", "1", "800 ms", "-", "190 ms", "10.0 ms"]
    exact = ["1.12 s", "1.125 (1.11 to 1.15)", "800 ms", "120 ms", "190 ms", "15.0 ms"]
    assert cells(text, "AT-AWP exact")[1:] == exact
    assert "AT-AWP exact is 1.39 times as fast as reference AT-AWP." in text  # 1.56 / 1.125


def test_weights_have_one_line_for_each_size_in_order():
    text = markdown(WEIGHTS)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert lines[2].startswith("| 100 ")
    times = ["4.00 µs", "8.00 µs", "20.0 µs (x 2.50)"]
    assert cells(text, "2,000") == ["2,000", "10", "SGD", *times, "88%"]


def test_memory_and_attacks():
    text = markdown([MEMORY, *ATTACKS])
    assert cells(text, "AT-AWP exact") == ["AT-AWP exact", "300.0 MB", "42.0 MB", "1.050"]
    assert cells(text, "ART") == ["ART", "750 ms", "1.500 (1.49 to 1.52)", "43.8%"]


def test_the_command_line(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    out = tmp_path / "out"
    assert main([str(results), "--out", str(out), "--readme", str(readme)]) == 0
    assert (out / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "AT-AWP exact" in capsys.readouterr().out
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert markdown(ALL) in text
    assert (
        "Some CPU, 2 cores, 2 threads, torch 2.9.0, Python 3.12.1; commit abc1234, 2020-02-03; "
        "`pytest benchmarks --benchmark-only`"
    ) in text
    assert main([str(results), "--out", str(out), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == text  # writing it again changes nothing


def test_the_accelerator_run(accelerator, results, tmp_path):
    rows, info = read(accelerator)
    assert info == INFO
    text = markdown(rows)
    assert text.startswith("**accelerator: step**\n")
    assert cells(text, "exact / at")[1:] == ["1.123", "<= 1.14", "yes"]
    assert cells(text, "reference / exact")[1:] == ["5.5", ">= 6", "no"]
    assert cells(text, "ms")[1:] == ["at 20.1, exact 22.6", "", ""]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    arguments = [str(results), str(accelerator), "--out", str(tmp_path), "--readme", str(readme)]
    assert main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert markdown([*ALL, *rows]) in text
    assert text.count("Some CPU") == 1  # both were measured with the same


def test_a_run_cut_short_says_so_and_a_quick_one_is_refused(accelerator):
    content = json.loads(accelerator.read_text())
    accelerator.write_text(json.dumps({**content, "status": "running"}))
    assert "accelerator: step (running)" in markdown(read(accelerator)[0])
    accelerator.write_text(json.dumps({**content, "quick": True}))
    with pytest.raises(ValueError, match="void"):
        read(accelerator)


@pytest.mark.parametrize("content", ["nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_without_markers_the_readme_stays_as_it_is(content, results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(content)
    assert main([str(results), "--out", str(tmp_path), "--readme", str(readme)]) == 1
    assert readme.read_text() == content
    error = capsys.readouterr().err
    assert BEGIN in error
    assert END in error
    with pytest.raises(ValueError, match=r"README\.md"):
        write_readme(readme, "text")


@pytest.mark.parametrize("content", ["", "{}", '{"machine_info": {}, "benchmarks": []}'])
def test_other_files_are_refused(content, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json"):
        read(path)
    assert main([str(path), "--out", str(tmp_path)]) == 1
    assert "other.json" in capsys.readouterr().err


def test_bars_are_as_long_as_the_phases(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    draw(ALL, tmp_path / "step.png")
    (ax,) = drawn[0].axes  # a panel for the one comparison with phases
    assert [label.get_text() for label in ax.get_yticklabels()] == list(PHASES)
    ends = [0.0] * 3
    for bars, phase in zip(ax.containers, ("attack", "ascent", "descent", "update"), strict=True):
        for i, (bar, phases) in enumerate(zip(bars, PHASES.values(), strict=True)):
            assert bar.get_width() == pytest.approx(phases[phase])
            assert bar.get_x() == pytest.approx(ends[i])
            ends[i] += phases[phase]
    assert [t.get_text().split("x ")[1] for t in ax.texts] == ["1.00", "1.12", "1.56"]

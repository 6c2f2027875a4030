"""Do the tests marked ``gpu`` pass?

    python -m benchmarks.gpu.correct
    python -m benchmarks.gpu.correct --case cuda_graphs   # one folder or module of tests/

Needs pytest. Test modules whose imports need another package are left out and named.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu.question import Details, Options, Record, answer

TIME_LIMIT = 450.0
PASSED_FAILED_OR_NONE = (0, 1, 5)  # pytest's exit codes for these
MISSING_PACKAGE = re.compile(r"ModuleNotFoundError: No module named '(?!awp_optim|benchmarks)")


def cases(options: Options) -> dict[str, partial[Details]]:
    tests = ROOT / "tests"
    paths = [p for p in sorted(tests.iterdir()) if p.is_dir() or p.match("test_*.py")]
    if options.quick:
        paths = [tests / "test_batchnorm.py"]
    elif not options.case:
        return {"all tests": partial(check, options, tests)}
    return {path.name: partial(check, options, path) for path in paths}


def check(options: Options, path: Path, record: Record) -> Details:
    counts = run_gpu_tests(path)
    record.figure("passed", counts["passed"])
    record.figure("failed", counts["failed"], at_most=0)
    if counts["left_out"]:
        record.note(f"left out, for lack of a package: {', '.join(counts['left_out'])}")
    if counts["failed"]:
        record.update(**counts)
        raise RuntimeError("\n\n".join(counts["failures"]))
    if options.on_gpu and not counts["passed"]:
        raise RuntimeError(f"none of the tests ran: {counts['summary']}")
    return counts


def run_gpu_tests(path: Path, time_limit: float = TIME_LIMIT) -> Details:
    """Run the tests marked gpu in a file or folder.

    Returns:
        How many ``passed``, ``failed`` and were ``skipped``, the texts of the ``failures``, and the
        modules ``left_out`` because a package is not installed.

    Raises:
        RuntimeError: pytest itself failed, or took longer than ``time_limit`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        xml, log = Path(folder) / "results.xml", Path(folder) / "log"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"),
            *("-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors"),
            *(f"--junitxml={xml}", str(path)),
        ]
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": search}
        code: int | str = f"no result in {time_limit:g} s"
        with log.open("w") as output, suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=time_limit,
            ).returncode
        text = log.read_text()
        if code not in PASSED_FAILED_OR_NONE or not xml.exists():
            raise RuntimeError(f"pytest ended with {code}:\n{text[-6000:]}")
        return _counts(ET.parse(xml).getroot(), text.strip().splitlines()[-1].strip("= "))


def _counts(results: ET.Element, summary: str) -> Details:
    tests = list(results.iter("testcase"))
    failures, left_out = [], []
    for test in tests:
        name = "::".join(filter(None, [test.get("classname"), test.get("name")]))
        for problem in (*test.findall("failure"), *test.findall("error")):
            text = problem.text or problem.get("message") or ""
            if MISSING_PACKAGE.search(text):
                left_out.append(name)
            else:
                failures.append(f"{name}\n{text[-4000:]}")
    skipped = sum(test.find("skipped") is not None for test in tests)
    return {
        "passed": len(tests) - skipped - len(failures) - len(left_out),
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "left_out": left_out,
        "summary": summary,
    }


def main(argv: list[str] | None = None) -> int:
    return answer("correct", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())

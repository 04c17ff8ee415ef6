"""Puts known faults into a copy of the library and checks that the tests notice each of them.

    python tests/mutations.py [--list] [-k NAME] [--jobs 2] [--table FILE]

Every fault is a small patch with the tests that must catch it; the tables are in
``tests/faults/``. For each the script patches a copy of the tree in a temporary folder, runs the
named tests there on the copy's code and expects them to fail. The checkout is never modified. The
script fails if a mutated run passes, if the old text is not in its file exactly once, if the run
ends in anything but failed tests, or if the same tests fail without the fault.

Runs are forks of this process, which has imported PyTorch and pytest but nothing of fasttta: most
take about a second, and five would be spent on imports.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from mutated_copy import Copy, caching_compiler, compiler  # noqa: E402

TABLES = ROOT / "tests" / "faults"
_SECONDS = 240  # of one run, after which it is stopped
_BUILD_SECONDS = 600  # more, where C++ is compiled


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique among all tables.
        file: of the checkout, from its root.
        old: text that occurs exactly once in the file.
        new: what the fault makes of it.
        tests: node ids below ``tests/`` that must catch it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def patched(self, root: Path) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the old text is not there exactly once, or the new one is no Python: an
                import that fails is no sign that a test looks at what changed.
        """
        text = (root / self.file).read_text()
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: the old text is {count} times in {self.file}, needed 1")
        changed = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            try:
                ast.parse(changed)
            except SyntaxError as error:
                raise ValueError(f"{self.name}: is broken, the new text is no Python") from error
        return changed

    def missing(self) -> str:
        """What this machine lacks to run it; empty: nothing."""
        if self.file.startswith("kernels/") and not importlib.util.find_spec("triton"):
            return "triton is not installed"
        if self.file.startswith("csrc/") and not compiler():
            return "there is no C++ compiler"
        return ""


def read_table(path: Path) -> list[Fault]:
    """The faults of one file: ``FAULTS``, rows (name, file, old, new, *tests)."""
    spec = importlib.util.spec_from_file_location(f"faults_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Fault(*row[:4], tuple(row[4:])) for row in module.FAULTS]


def read_tables() -> list[Fault]:
    """All faults."""
    return [fault for path in sorted(TABLES.glob("*.py")) for fault in read_table(path)]


@dataclass
class Run:
    """Tests that are to run on a copy, with a fault or without."""

    tests: Sequence[str]
    fault: Fault | None = None
    code: int | None = None  # pytest's exit code; None: stopped
    output: str = ""
    seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    @property
    def verdict(self) -> str:
        """What is wrong with this run; empty: nothing."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.fault is None:
            return "" if self.code == 0 else "fails without any fault"
        if self.code == 0:
            return "SURVIVED: its tests pass"
        return "" if self.code == 1 else f"is broken: pytest ended with code {self.code}"


def _child(copy: Copy, run: Run, output: Path) -> int:
    """Runs the tests in this process, a fork; returns pytest's exit code."""
    import pytest

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy.tree)
    checkout = ROOT, ROOT / "tests", ROOT / "tests" / "support", copy.tree
    others = [path for path in sys.path if Path(path or ".").resolve() not in checkout]
    sys.path[:] = [str(copy.lib), *others]
    os.environ["PYTHONPATH"] = str(copy.lib)  # of what the tests start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = run.fault is not None
    if run.fault is not None:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        if run.fault.file.startswith("csrc/"):
            os.environ["FASTTTA_CACHE"] = str(output.with_suffix(".cache"))
            os.environ["CXX"] = str(caching_compiler(copy.objects))
            os.environ["FASTTTA_NATIVE"] = "require"
    import fasttta

    if not Path(fasttta.__file__).is_relative_to(copy.lib):
        print(f"the tests would run on {fasttta.__file__}")
        return 3
    options = ["-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    options += [] if run.fault is None else ["-x"]
    return int(pytest.main([*options, *(f"tests/{test}" for test in run.tests)]))


def _started(copy: Copy, run: Run, output: Path) -> int:
    """The process id of a fork that runs the tests."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()
        compiles = run.fault is not None and run.fault.file.startswith("csrc/")
        signal.alarm(_SECONDS + compiles * _BUILD_SECONDS)
        code = _child(copy, run, output)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _all(runs: Sequence[Run], jobs: int, folder: Path, say: Callable[[Run], None]) -> None:
    """Runs all, ``jobs`` at a time, each on a copy of its own."""
    copies = [Copy(ROOT, folder / f"copy{i}") for i in range(min(jobs, max(1, len(runs))))]
    waiting, active = list(runs), {}
    (folder / "output").mkdir()
    while waiting or active:
        while waiting and copies:
            run, copy, stack = waiting.pop(0), copies.pop(), contextlib.ExitStack()
            if run.fault:
                text = run.fault.patched(copy.tree)
                stack.enter_context(copy.with_text(run.fault.file, text))
            output = folder / "output" / f"{len(waiting)}.txt"
            run._start = time.perf_counter()
            active[_started(copy, run, output)] = run, copy, stack, output
        pid, status = os.wait()
        run, copy, stack, output = active.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the tests have left behind
        stack.close()
        copies.append(copy)
        run.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        run.seconds = time.perf_counter() - run._start
        run.output = output.read_text(errors="replace") if output.exists() else ""
        shutil.rmtree(output.with_suffix(".cache"), ignore_errors=True)
        say(run)


def _preload() -> None:
    """Imports what the tests import besides fasttta, once for all forks: three quarters of the time
    of a short test. Triton decides at import whether its functions are interpreted, which they are
    here: runs see no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in (
        "pytest", "safetensors.torch", "torch._dynamo", "torch._inductor.utils",
        "torch.distributed", "torch.testing", "triton", "triton.language", "PIL.Image",
        "hypothesis",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if before is None:
        del os.environ["TRITON_INTERPRET"]


def _baseline(faults: Sequence[Fault]) -> list[Run]:
    """The named tests without a fault, a run a file."""
    files: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for fault in faults for test in fault.tests):
        files.setdefault(test.split("::")[0], []).append(test)
    return [Run(tests) for tests in files.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("-k", metavar="NAME", default="", help="faults with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--table", type=Path, help="a file of faults in place of tests/faults/")
    parser.add_argument("-v", action="store_true", help="print the output of every run")
    options = parser.parse_args(arguments)
    faults = read_table(options.table) if options.table else read_tables()
    faults = [fault for fault in faults if options.k in fault.name]
    if options.list:
        for fault in faults:
            print(f"{fault.name:<44} {fault.file:<36} {' '.join(fault.tests)}")
        return 0
    problems = [problem for fault in faults if (problem := _not_there(fault))]
    runnable = [fault for fault in faults if not _not_there(fault) and not fault.missing()]
    for fault in faults:
        if reason := fault.missing():
            print(f"not run  {fault.name}: {reason}")
    _preload()
    runs = [*_baseline(runnable), *(Run(fault.tests, fault) for fault in runnable)]

    def say(run: Run) -> None:
        name = run.fault.name if run.fault else f"no fault: {run.tests[0].split('::')[0]}"
        good = "caught" if run.fault else "passes"
        print(f"{run.seconds:6.1f} s  {name}: {run.verdict or good}", flush=True)
        if run.verdict:
            problems.append(f"{name}: {run.verdict}")
        if options.v or (run.verdict and not (run.fault and run.code == 0)):
            print(run.output)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fasttta-mutations-") as folder:
        _all(runs, options.jobs, Path(folder), say)
    caught = sum(run.fault is not None and not run.verdict for run in runs)
    print(f"{caught} of {len(faults)} faults caught in {time.perf_counter() - start:.0f} s")
    for problem in problems:
        print(f"PROBLEM  {problem}")
    return 1 if problems or not faults else 0


def _not_there(fault: Fault) -> str:
    try:
        fault.patched(ROOT)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())

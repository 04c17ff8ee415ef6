"""`pytest benches`: every bench once on tiny shapes. `pytest benches --benchmark`: real ones."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# threads that spin while they wait take the cores from those that work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


def _module(name: str) -> ModuleType:
    """A module of this folder, which is not on sys.path."""
    spec = importlib.util.spec_from_file_location(f"fasttta_benches_{name}", HERE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


agreement, clock, ceiling, report = map(_module, ("agreement", "clock", "ceiling", "report"))
machine = _module("machine").machine

_SERIES = 3  # in which a result may reach the stored one

_ENTRIES = pytest.StashKey[list[dict[str, Any]]]()
_STORED = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fasttta benches")
    group.addoption("--benchmark", action="store_true", help="real shapes, timed")
    group.addoption(
        "--save-results",
        action="store_true",
        help=f"with --benchmark: update {HERE.name}/results/<device>.json",
    )
    group.addoption(
        "--check-results",
        action="store_true",
        help="with --benchmark: fail where a result is more than 10 % below this device's file",
    )
    group.addoption(
        "--compile",
        action="store_true",
        help="with --benchmark: also time torch.compile of the references (slow to compile)",
    )
    group.addoption(
        "--long",
        action="store_true",
        help="with --benchmark: also what takes minutes each on a CPU",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process, also where -n is set: benches on several would time each other."""
    if getattr(config.option, "numprocesses", None):
        config.option.numprocesses = 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: runs torch.compile; needs --benchmark --compile")
    config.addinivalue_line("markers", "long: takes minutes on a CPU, where it needs --long")
    # references that call convolutions, as models of others do: in the precision of the rest
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    config.stash[_ENTRIES] = []
    config.stash[_STORED] = {}
    if not config.option.benchmark:
        for needs in ("save_results", "check_results", "compile", "long"):
            if getattr(config.option, needs):
                raise pytest.UsageError(f"--{needs.replace('_', '-')} needs --benchmark")
    if config.option.check_results:
        path = report.RESULTS / f"{report.slug(machine())}.json"
        if config.option.save_results or not path.exists():
            why = "does not go with --save-results" if path.exists() else f"needs {path}"
            raise pytest.UsageError(f"--check-results {why}")
        config.stash[_STORED] = {entry["id"]: entry for entry in report.read(path)["benches"]}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set() if config.option.compile else {"compiled"}
    if config.option.benchmark and not config.option.long and not torch.cuda.is_available():
        left_out.add("long")
    deselected = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Each bench beside its reference, and which ones --check-results had nothing to compare with.

    A bench whose outputs disagree with its reference's has failed and is no row of the table.
    """
    entries = config.stash.get(_ENTRIES, [])
    if entries:
        terminalreporter.write_sep("-", "against the reference, whose outputs agree")
        terminalreporter.write_line(report.summary({"machine": machine(), "benches": entries}))
    measured = {entry["id"] for entry in entries}
    missing = sorted(measured - config.stash[_STORED].keys())
    if config.option.check_results and missing:
        terminalreporter.write_sep("-", "no stored result")
        terminalreporter.write_line(", ".join(missing))


def pytest_sessionfinish(session: pytest.Session) -> None:
    entries = session.config.stash.get(_ENTRIES, [])
    if entries and session.config.option.save_results:
        report.upsert(report.RESULTS, machine(), entries)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to take real shapes."""
    return request.config.option.benchmark


@pytest.fixture(scope="session")
def threads() -> int:
    """Threads of an operation on the CPU."""
    return min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(
    device: torch.device, full: bool, request: pytest.FixtureRequest
) -> Iterator[Callable[..., None]]:
    """Checks a bench's outputs against its reference, then times both, call by call in turn."""

    def measure(
        run: clock.Run,
        reference: clock.Run | None = None,
        *,
        parts: Sequence[tuple[float, clock.Run]] = (),
        check: tuple[clock.Run, clock.Run] | None = None,
        exact: tuple[Tensor, ...] | clock.Run | None = None,
        tolerance: float | None = None,
        rounding: float = agreement.ROUNDING,
        most: float | None = None,
        checks: int = 1,
        rounds: int | None = None,
        warmup: int = 1,
        queued: bool = True,
        memory: bool = False,
        samples: int | None = None,
        threads: int | None = None,
        **facts: Any,
    ) -> None:
        """
        Args:
            run, reference: what is timed and what it is compared with; both return tensors, and
                carry the same state, if any. Without a reference, ``run`` is the reference path.
            parts: in place of a reference that takes minutes: (how often it does something, that),
                timed once each in turn; its time is their sum and its peak memory the largest.
            check: then ``run`` and the whole reference on something smaller, to be compared.
            exact: outputs in a better precision, possibly of the first samples only; or what
                computes them, and then is called in turn with the two sides.
            tolerance: allowed difference, a share of the largest output; None: four times the
                reference's own error.
            rounding: without a tolerance the least difference that is allowed; most: the largest,
                however far the reference is off.
            checks: calls after each of which the outputs are compared.
            rounds: repeats of each side; None: as many as fit into some seconds, 5 to 200.
            queued: see ``clock.DeviceClock``.
            memory: also measure peak memory.
            samples: in one call, for a throughput.
            threads: of PyTorch on the CPU; None: its own choice.
            facts: what the results file says besides: ``shape``, ``headline`` (whether it
                stands for the others), ``official`` (the precision of a reference that is the
                official formulation), ...; with ``dtype`` and ``bytes`` (and ``flops``), what the
                operation must move and compute at least, also its share of the machine's ceiling.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        run = clock.WithGraphs(run, device)
        if reference is not None:
            reference = clock.WithGraphs(reference, device)
        checked, expected = check or (run, reference)
        errors = agreement.check(
            checked,
            expected,
            exact,
            tolerance=tolerance,
            rounding=rounding,
            most=most,
            times=checks,
        )
        if not full:
            return  # the checks were the smoke test
        for side in (run, reference):
            if side is not None:
                side.settle()
        sides = clock.Sides(run, reference, parts, clock.of(device, queued))
        resources = _resources(sides, device, memory)
        rounds = sides.plan(rounds, short_calls_warm=device.type == "cpu")
        for _ in range(warmup):
            sides.turn(keep=False)
        for _ in range(rounds):
            sides.turn()
        fallen = _fallen(request.config.stash[_STORED].get(request.node.name), sides, rounds)
        request.config.stash[_ENTRIES].append(
            {
                **_identity(request.node),
                **{key: report.plain(value) for key, value in facts.items()},
                **_share_of_ceiling(facts, sides.best, device),
                "clock": sides.watch.__name__,
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                **report.times(sides.seconds, sides.reference_seconds),
                **errors,
                **resources,
                "samples_per_s": None if samples is None else round(samples / sides.median, 3),
            }
        )
        assert fallen is None, fallen

    before = torch.get_num_threads()
    yield measure
    torch.set_num_threads(before)


def _resources(sides: clock.Sides, device: torch.device, memory: bool) -> dict[str, int | None]:
    """Peak memory, where it is asked for, and kernel launches, on a GPU, of both sides."""
    peak = reference_peak = launches = reference_launches = None
    if memory:
        peak = reference_peak = clock.peak_bytes(sides.run, device)
        if others := sides.others:
            reference_peak = max(clock.peak_bytes(other, device) for other in others)
    if device.type == "cuda":
        launches = reference_launches = clock.launches(sides.run)
        if sides.reference is not None:
            reference_launches = clock.launches(sides.reference)
    return {
        "peak_bytes": peak,
        "reference_peak_bytes": reference_peak,
        "launches": launches,
        "reference_launches": reference_launches,
    }


def _fallen(stored: dict[str, Any] | None, sides: clock.Sides, rounds: int) -> str | None:
    """What has fallen below the stored result in several series, of which one has been measured."""
    if stored is None:
        return None
    fallen = report.fallen(stored, min(sides.seconds), min(sides.reference_seconds))
    for _ in range(_SERIES - 1):
        if fallen is None:
            break
        for _ in range(rounds):
            sides.turn()
        fallen = report.fallen(stored, min(sides.seconds), min(sides.reference_seconds))
    return fallen


def _identity(node: pytest.Item) -> dict[str, Any]:
    """Which bench it is, and with which versions it ran."""
    case = getattr(node, "callspec", None)  # none without parameters
    params = {} if case is None else dict(case.params)
    return {
        "id": node.name,
        "name": node.originalname,
        "params": {key: report.plain(value) for key, value in params.items()},
        **{key: machine()[key] for key in ("torch", "triton", "commit")},
    }


def _share_of_ceiling(facts: dict[str, Any], best: float, device: torch.device) -> dict[str, float]:
    """Rates that the shortest call reached; nothing for a bench that does not say its work."""
    if "bytes" not in facts or "dtype" not in facts:
        return {}
    work = facts["bytes"], facts.get("flops", 0)
    bound = ceiling.bound_seconds(*work, device, facts["dtype"], torch.get_num_threads())
    return {
        "gb_per_s": round(work[0] / best / 1e9, 2),
        "tflop_per_s": round(work[1] / best / 1e12, 4),
        "bound_us": round(bound * 1e6, 2),
        "percent_of_bound": round(100 * bound / best, 1),
    }

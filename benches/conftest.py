"""`pytest benches`: every bench once on tiny shapes. `pytest benches --benchmark`: real ones."""

from __future__ import annotations

import importlib.util
import os
import statistics
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


clock, ceiling, report = map(_module, ("clock", "ceiling", "report"))
machine = _module("machine").machine

_SECONDS = 4.0  # of one bench, both sides together, where its rounds are not given
_SHORT = 0.5  # s, both sides together
_SERIES = 3  # in which a result may reach the stored one
ROUNDING = 16 * torch.finfo(torch.float32).eps  # differences that are never an error, in float32

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
        config.option.benchmark_disable = True
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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fasttta"] = machine()


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


def difference(returned: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Largest error of the leading samples that ``wanted`` has: absolute, and as a share of the
    largest value wanted."""
    assert returned.isfinite().all(), "the outputs are not finite"
    wanted = wanted.detach().double()
    returned = (
        returned.detach().double()[: len(wanted)] if wanted.ndim else returned.detach().double()
    )
    worst = (returned - wanted).abs().max().item()
    return worst, worst / max(wanted.abs().max().item(), torch.finfo(torch.float64).tiny)


def _agreement(
    outputs: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    exact: tuple[Tensor, ...] | None,
    tolerance: float | None,
    rounding: float = ROUNDING,
    noise: dict[int, float] | None = None,
) -> tuple[float, float]:
    """Errors of the outputs against ``exact``, else the reference; fails where they disagree.

    Without a tolerance the reference's own error in the same type is the measure: four times that,
    and at least ``rounding``, as a reference may come close to the exact value by chance. ``noise``
    keeps the largest such error of each output from one call to the next: a loss that drifts from
    the exact one through several steps also crosses it.
    """
    errors, noise = [], {} if noise is None else noise
    truth = expected if exact is None else exact
    for i, (returned, reference, wanted) in enumerate(zip(outputs, expected, truth, strict=True)):
        allowed = tolerance
        if allowed is None:
            noise[i] = max(noise.get(i, 0.0), difference(reference, wanted)[1])
            allowed = max(4 * noise[i], rounding)
        errors.append(difference(returned, wanted))
        apart = difference(returned, reference)[1]
        assert errors[-1][1] <= allowed, f"output {i} is {errors[-1][1]:.1e} off, not {allowed:.1e}"
        assert apart <= 2 * allowed, f"output {i} is {apart:.1e} from the reference's: no ratio"
    return max(e[0] for e in errors), max(e[1] for e in errors)


@pytest.fixture
def measure(
    benchmark, device: torch.device, full: bool, request: pytest.FixtureRequest
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
        rounding: float = ROUNDING,
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
            rounding: without a tolerance the least difference that is allowed.
            checks: calls after each of which the outputs are compared.
            rounds: repeats of each side; None: as many as fit into some seconds, 5 to 200.
            queued: see ``clock.DeviceClock``.
            memory: also measure peak memory.
            samples: in one call, for a throughput.
            threads: of PyTorch on the CPU; None: its own choice.
            facts: what the results file says besides: ``shape``, ``headline`` (whether it
                stands for the others), ...; with ``dtype`` and ``bytes`` (and ``flops``), what the
                operation must move and compute at least, also its share of the machine's ceiling.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        checked, whole = check or (run, reference)
        noise: dict[int, float] = {}
        for _ in range(checks):
            outputs = checked()
            expected = outputs if whole is None else whole()
            truth = exact() if callable(exact) else exact
            errors = _agreement(outputs, expected, truth, tolerance, rounding, noise)
        if not full:
            benchmark.pedantic(lambda: None)  # the checks were the smoke test
            return
        peak = clock.peak_bytes(run, device) if memory else None
        launches = reference_launches = None
        if device.type == "cuda":
            launches = clock.launches(run)
            reference_launches = clock.launches(reference) if reference else launches
        sides = [part for _, part in parts] or ([reference] if reference else [])
        reference_peak = peak
        if memory and sides:
            reference_peak = max(clock.peak_bytes(side, device) for side in sides)

        watch = clock.HostClock()
        target = run
        if device.type == "cuda":
            watch = clock.DeviceClock(device, queued)
            target = lambda: watch.time(run)  # noqa: E731
        benchmark._timer = watch
        warm = False
        if rounds is None:
            turn = watch.time(run) + sum(watch.time(side) for side in sides)
            rounds = int(min(200, max(5, _SECONDS / turn)))
            # short calls each follow an untimed one of their own side, so that what the other side
            # leaves of caches and of the allocator's heap is not measured
            warm = device.type == "cpu" and turn < _SHORT

        def other_side() -> None:
            if parts:
                turns.append(sum(count * watch.time(part) for count, part in parts))
            elif reference is not None:
                if warm:
                    reference()
                turns.append(watch.time(reference))
            if warm:
                run()

        turns: list[float] = []
        benchmark.pedantic(
            target,
            setup=other_side,
            rounds=rounds,
            warmup_rounds=warmup,
        )
        seconds = list(benchmark.stats.stats.data)
        turns = turns[warmup:]
        stored = request.config.stash[_STORED].get(request.node.name)
        fallen = None
        for series in range(_SERIES if stored else 0):
            for _ in range(rounds if series else 0):
                other_side()
                seconds.append(watch.time(run))
            fallen = report.fallen(stored, min(seconds), min(turns or seconds))
            if fallen is None:
                break
        turns = turns or seconds
        median, reference_median = statistics.median(seconds), statistics.median(turns)
        best = min(seconds)
        if "bytes" in facts and "dtype" in facts:
            work = facts["bytes"], facts.get("flops", 0), device, facts["dtype"]
            bound = ceiling.bound_seconds(*work, torch.get_num_threads())
            facts |= {
                "gb_per_s": round(facts["bytes"] / best / 1e9, 2),
                "tflop_per_s": round(facts.get("flops", 0) / best / 1e12, 4),
                "bound_us": round(bound * 1e6, 2),
                "percent_of_bound": round(100 * bound / best, 1),
            }
        fifths = seconds  # of a single round
        if len(seconds) > 1:
            fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        case = getattr(request.node, "callspec", None)  # none without parameters
        name, params = request.node.originalname, {} if case is None else dict(case.params)
        entry = {
            "id": request.node.name,
            "name": name,
            "params": {key: report.plain(value) for key, value in params.items()},
            **{key: machine()[key] for key in ("torch", "triton", "commit")},
            **{key: report.plain(value) for key, value in facts.items()},
            "clock": watch.__name__,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "median_us": round(median * 1e6, 2),
            "p20_us": round(fifths[0] * 1e6, 2),
            "p80_us": round(fifths[-1] * 1e6, 2),
            "p99_us": round(sorted(seconds)[int(0.99 * (len(seconds) - 1) + 0.5)] * 1e6, 2),
            "min_us": round(best * 1e6, 2),
            "reference_us": round(reference_median * 1e6, 2),
            "reference_min_us": round(min(turns) * 1e6, 2),
            "ratio": round(reference_median / median, 3),
            "min_ratio": round(min(turns) / best, 3),
            "max_abs_error": errors[0],
            "relative_error": errors[1],
            "against": "reference" if exact is None else str(truth[0].dtype)[6:],
            "peak_bytes": peak,
            "reference_peak_bytes": reference_peak,
            "launches": launches,
            "reference_launches": reference_launches,
            "samples_per_s": None if samples is None else round(samples / median, 3),
        }
        benchmark.extra_info.update(entry)
        request.config.stash[_ENTRIES].append(entry)
        assert fallen is None, fallen

    before = torch.get_num_threads()
    yield measure
    torch.set_num_threads(before)

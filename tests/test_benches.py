"""The benches' results files, their tables, and the benches' names."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from places import ROOT

BENCHES = ROOT / "benches"
MACHINE = {
    "gpu": "NVIDIA H200", "cpu": "Some(R) CPU @ 2.00GHz", "cores": 8, "python": "3.12.1",
    "torch": "2.12.0", "cuda": "13.0", "triton": "3.7.0", "commit": None,
}  # fmt: skip


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"tested_benches_{name}", BENCHES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return load("report")


def entry(name: str = "bench_attention[mean-8]", **changed):
    return {
        "id": name, "name": name.partition("[")[0], "params": {"heads": "mean", "batch": 8},
        "torch": "2.12.0", "triton": "3.7.0", "clock": "cuda_events", "threads": 4,
        "median_us": 41.0, "min_us": 40.0, "reference_us": 1230.0, "reference_min_us": 1200.0,
        "ratio": 29.0, "min_ratio": 30.0, "peak_bytes": 2**20, "reference_peak_bytes": 3 * 2**27,
        "samples_per_s": None, **changed,
    }  # fmt: skip


def test_summary_of_a_run(report):
    """One table, a row for each bench; nothing but what was measured is in it."""
    rendered = report.summary({"machine": MACHINE, "benches": [entry()]})
    assert rendered == (
        "**NVIDIA H200, torch 2.12.0, triton 3.7.0, CUDA 13.0**\n\n"
        "| bench | case | median (min) | reference | speed-up | extra memory |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| attention | mean, batch 8 | 41 µs (40 µs) | 1.23 ms (1.2 ms) | 30.00x | 1 / 384 MiB |"
    )


def test_tables_of_a_results_file(report, tmp_path, capsys):
    """A case's implementations share a row; every bench has a table."""
    operation = {"dtype": "torch.float32", "bytes": 12}
    fast = {"percent_of_bound": 51.4, "launches": 5, "reference_launches": 33}
    for implementation, changed in (("plain", {"min_us": 200.0}), ("default", fast)):
        params = {"heads": "mean", "implementation": implementation, "batch": 8}
        name = f"bench_attention[mean-{implementation}-8]"
        report.upsert(tmp_path, MACHINE, [entry(name, params=params, **operation, **changed)])
    step = entry("bench_step[tent]", params={"method": "tent"}, peak_bytes=None)
    report.upsert(tmp_path, MACHINE, [step])
    page = tmp_path / "page.md"
    page.write_text("<!-- benches --><!-- /benches -->")
    assert report.main(["--results", str(tmp_path), "--write", str(page)]) == 0
    assert page.read_text() == (
        "<!-- benches -->\n\n**NVIDIA H200, torch 2.12.0, triton 3.7.0, CUDA 13.0**\n\n"
        "### attention\n\n| case | reference | plain | ours | speed-up | of the ceiling |"
        " extra memory | launches |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| mean, batch 8 | 1.2 ms | 200 µs | 40 µs | 30.00x | 51 % | 1 / 384 MiB | 5 / 33 |\n\n"
        "### step\n\n| case | reference | ours | speed-up |\n| --- | --- | --- | --- |\n"
        "| tent | 1.2 ms | 40 µs | 30.00x |\n\n"
        "Times are minima, a speed-up is their ratio; both sides ran in turn, call by call."
        " Medians and quantiles are in the results files.\n\n"
        "Extra memory: peak beyond inputs and outputs, ours / the reference's.\n\n"
        "<!-- /benches -->"
    )
    assert report.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() in page.read_text()
    assert report.main(["--results", str(tmp_path), "--check", str(page)]) == 0
    report.upsert(tmp_path, MACHINE, [entry(name, params=params, **operation, **fast, min_us=39.0)])
    assert report.main(["--results", str(tmp_path), "--check", str(page)]) == 1
    assert "stale" in capsys.readouterr().err


def test_cpu_rows_name_threads_and_throughput(report, tmp_path):
    step = entry(
        "bench_step[tent]", params={"method": "tent"}, clock="perf_counter", threads=1,
        median_us=4.2e6, samples_per_s=0.952, peak_bytes=None,
    )  # fmt: skip
    machine = MACHINE | {"gpu": None}
    report.upsert(tmp_path, machine, [step])
    summary = report.summary({"machine": machine, "benches": [step]})
    assert "| step | tent, 1 thread | 4.2 s (40 µs) |" in summary
    for rendered in (report.render(tmp_path), summary):
        assert "**Some(R) CPU @ 2.00GHz, 8 cores, torch 2.12.0**" in rendered
        assert "tent, 1 thread" in rendered
        assert "| samples/s |" in rendered
        assert "| 0.952 |" in rendered
        assert "memory" not in rendered  # nothing to show


def test_picture_of_a_results_file(report, tmp_path, capsys):
    """It is written with the tables, and noticed where a ratio has changed since."""
    page = tmp_path / "page.md"
    page.write_text("<!-- benches --><!-- /benches -->")
    options = ["--results", str(tmp_path), "--check", str(page)]
    report.upsert(tmp_path, MACHINE, [entry("bench_brimpr[fp32]", params={}, min_ratio=1.25)])
    assert report.main([*options[:2], "--write", str(page)]) == 0
    assert "![Speed-ups of the main benches](results/nvidia-h200.svg)" in page.read_text()
    shown = load("chart").texts((tmp_path / "nvidia-h200.svg").read_bytes())
    assert {"NVIDIA H200", "BriMPR", "1.25x", "BriMPR, speed-up: 1.25"} <= set(shown)
    assert report.main(options) == 0
    text = (tmp_path / "nvidia-h200.svg").read_text()
    for stale in (text.replace("1.25x", "1.35x"), None):
        (tmp_path / "nvidia-h200.svg").unlink()
        if stale is not None:
            (tmp_path / "nvidia-h200.svg").write_text(stale)
        assert report.main(options) == 1
        assert "nvidia-h200.svg is stale" in capsys.readouterr().err


def test_the_picture_shows_benches_that_there_are():
    """A bench that bears another name from now on is not left out unseen."""
    benches = {
        entry["id"]
        for path in (BENCHES / "results").glob("cpu-*.json")
        for entry in json.loads(path.read_text())["benches"]
    }
    labels = [name for group in load("chart").LABELS.values() for name in group]
    assert len(labels) > 10
    assert set(labels) <= benches


@pytest.mark.parametrize(
    ("gpu", "cpu", "name"),
    [
        ("NVIDIA H200", "AMD EPYC 9B14", "nvidia-h200"),
        (None, "AMD EPYC 9B14", "cpu-amd-epyc-9b14"),
        (None, "Intel(R) Xeon(R) CPU @ 2.50GHz", "cpu-intel-xeon-2.50ghz"),
    ],
)
def test_files_are_named_after_the_device(report, gpu, cpu, name):
    assert report.slug({"gpu": gpu, "cpu": cpu}) == name


def test_an_entry_takes_the_place_of_the_one_with_its_id(report, tmp_path):
    report.upsert(tmp_path, MACHINE, [entry("bench_a[1]"), entry("bench_b[1]")])
    path = report.upsert(tmp_path, MACHINE, [entry("bench_a[1]", min_ratio=7.0)])
    assert path == tmp_path / "nvidia-h200.json"
    benches = json.loads(path.read_text())["benches"]
    assert [(e["id"], e["min_ratio"], e["device"]) for e in benches] == [
        ("bench_a[1]", 7.0, "nvidia-h200"),
        ("bench_b[1]", 30.0, "nvidia-h200"),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia-h200.json"]


@pytest.mark.parametrize(
    ("clock", "us", "reference_us", "falls"),
    [
        ("cuda_events", 44.0, 1.0, False),
        ("cuda_events", 45.0, 9e9, True),
        ("perf_counter", 400.0, 10900.0, False),
        ("perf_counter", 40.0, 1070.0, True),
    ],
)
def test_a_fall_of_a_tenth_is_noticed(report, clock, us, reference_us, falls):
    message = report.fallen(entry(clock=clock), us / 1e6, reference_us / 1e6)
    assert ("bench_attention[mean-8] has fallen to 89 %" in message) if falls else message is None


@pytest.mark.slow
def test_results_are_checked_on_request(report, tmp_path):
    """Against a file that claims the impossible of one bench, and nothing of another."""
    shutil.copytree(BENCHES, tmp_path / "benches", ignore=shutil.ignore_patterns("results"))
    machine = load("machine").machine()
    name = "bench_entropies[entropy-128-309-forward]"
    claim = {"id": name, "clock": "perf_counter", "min_ratio": 1e9, "min_us": 1e-9}
    report.upsert(tmp_path / "benches" / "results", machine, [claim])
    names = [f"benches/bench_entropies.py::{x}" for x in (name, name.replace("128-309", "64-1000"))]
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.",
               "-c", str(ROOT / "pyproject.toml"), "--benchmark", "--check-results"]  # fmt: skip
    alone = {key: x for key, x in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *names], cwd=tmp_path, env=alone, capture_output=True, text=True, check=False
    )
    assert f"{name} has fallen to 0 %" in done.stdout, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "no stored result" in done.stdout, done.stdout


def test_ids_are_unique_in_a_file(report, tmp_path):
    path = report.upsert(tmp_path, MACHINE, [entry("bench_a[1]")])
    results = json.loads(path.read_text())
    results["benches"] *= 2
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"several entries of bench_a\[1\]"):
        report.read(path)
    assert report.main(["--results", str(tmp_path)]) == 1


def test_stale_readme_is_noticed_and_mended(report, tmp_path, capsys):
    results = tmp_path / "results"
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benches -->\n<!-- /benches -->\nbelow\n")
    check = ["--results", str(results), "--check", str(readme)]
    write = ["--results", str(results), "--write", str(readme)]
    assert report.main(check) == 0  # no results, no table
    report.upsert(results, MACHINE, [entry()])
    assert report.main(check) == 1
    assert f"--write {readme}" in capsys.readouterr().err
    assert report.main(write) == 0
    assert report.main(check) == 0
    text = readme.read_text()
    assert text.startswith("above\n<!-- benches -->\n\n**NVIDIA H200")
    assert text.endswith("\n\n<!-- /benches -->\nbelow\n")
    report.upsert(results, MACHINE, [entry(min_us=39.0)])
    assert report.main(check) == 1


@pytest.mark.parametrize(
    "text", ["", "<!-- benches -->", "<!-- /benches --><!-- benches -->", "<!-- benches -->" * 2]
)
def test_readme_without_the_markers_is_an_error(report, tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main(["--results", str(tmp_path), "--check", str(readme)]) == 1
    assert "<!-- /benches -->" in capsys.readouterr().err
    assert readme.read_text() == text


def test_no_ratio_where_outputs_disagree():
    agreement = load("agreement").agreement
    exact = torch.linspace(-2, 1, 7, dtype=torch.float64)
    reference, ours = exact.float(), exact.float() * (1 + 1e-6)
    assert agreement((ours,), (reference,), (exact[:5],), None)[1] == pytest.approx(1e-6, rel=0.2)
    for tolerance, wrong in ((None, ours + 1e-4), (1e-6, ours + 1e-4), (0.1, ours * torch.nan)):
        with pytest.raises(AssertionError):
            agreement((wrong,), (reference,), (exact,), tolerance)


class CountedClock:
    """A clock on which every call takes a second for each letter of its name."""

    def __init__(self):
        self.calls: list[str] = []

    def time(self, run) -> float:
        self.calls.append("timed")
        run()
        return float(len(self.calls[-1]))


@pytest.mark.parametrize(
    ("kind", "warm", "calls", "seconds"),
    [
        ("reference", False, ["timed", "theirs", "timed", "our"], ([3.0], [6.0])),
        ("reference", True, ["theirs", "timed", "theirs", "our", "timed", "our"], ([3.0], [6.0])),
        ("parts", False, ["timed", "theirs", "timed", "part", "timed", "our"], ([3.0], [26.0])),
        ("alone", False, ["timed", "our"], ([3.0], [3.0])),
    ],
)
def test_sides_take_turns(kind, warm, calls, seconds):
    """The reference goes first; a short call follows an untimed one of its own side."""
    watch = CountedClock()
    our, theirs, part = (lambda name=name: watch.calls.append(name) for name in
                         ("our", "theirs", "part"))  # fmt: skip
    parts = [(3, theirs), (2, part)] if kind == "parts" else []
    sides = load("clock").Sides(our, theirs if kind == "reference" else None, parts, watch)
    sides.warm = warm
    sides.turn(keep=False)
    assert (sides.seconds, sides.reference_seconds) == ([], [])
    watch.calls.clear()
    sides.turn()
    assert watch.calls == calls
    assert (sides.seconds, sides.reference_seconds) == seconds
    assert (sides.best, sides.median) == (3.0, 3.0)


def test_rounds_fit_into_some_seconds():
    clock = load("clock")
    for call, rounds, warm in ((1e-4, 200, True), (0.1, 20, True), (1.0, 5, False)):
        watch = CountedClock()
        watch.time = lambda run, call=call: call
        sides = clock.Sides(lambda: None, lambda: None, [], watch)
        assert sides.plan(None, short_calls_warm=True) == rounds
        assert sides.warm == warm
        assert sides.plan(7, short_calls_warm=True) == 7


def test_peak_memory_is_beyond_what_is_returned():
    x = torch.zeros(256, 256)  # 256 KiB

    def run():
        y = (x + 1) + 2  # two of them at a time
        return (y.sum(dim=0),)

    peak = load("clock").peak_bytes(run, x.device)
    assert 2 * x.nbytes - 2048 <= peak <= 2 * x.nbytes + 2048


def test_the_page_shows_the_committed_results(report):
    assert report.main(["--check", str(BENCHES / "README.md")]) == 0


@pytest.mark.slow
def test_ceilings_are_plausible():
    """A copy and a product of this machine: more than a bicycle, less than a data centre."""
    ceiling, cpu = load("ceiling"), torch.device("cpu")
    assert 1e8 < ceiling.copy_bytes_per_s(cpu, 1) < 1e13
    assert 1e8 < ceiling.flops_per_s(cpu, torch.float32, 1) < 1e14
    # what limits is the slower of the two
    memory = ceiling.bound_seconds(10**9, 0, cpu, torch.float32, 1)
    assert memory == pytest.approx(1e9 / ceiling.copy_bytes_per_s(cpu, 1))
    assert ceiling.bound_seconds(10**9, 10**15, cpu, torch.float32, 1) > 10 * memory
    assert ceiling.bound_seconds(10**9, 1, cpu, torch.float32, 1) == memory


class Collected:
    """What a run of pytest has collected: ids of benches, those left out by the options too."""

    def __init__(self, *options: str) -> None:
        self.ids: list[str] = []
        self.deselected: list[str] = []
        command = ["benches", "--collect-only", "-qq", "-s", "--benchmark", "-m", "",
                   "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.delenv("PYTEST_XDIST_WORKER", raising=False)
            assert pytest.main([*command, *options], plugins=[self]) == pytest.ExitCode.OK

    def pytest_deselected(self, items) -> None:
        self.deselected += [item.name for item in items]

    def pytest_collection_finish(self, session) -> None:
        self.ids += [item.name for item in session.items]


@pytest.fixture(scope="module")
def collected():
    """In this process, as a new one takes seconds to import PyTorch and every bench."""
    setting = torch.backends.cudnn.conv.fp32_precision
    yield Collected("--compile")
    torch.backends.cudnn.conv.fp32_precision = setting


def test_ids_of_the_benches(collected):
    """Unique over all files, because a results file knows a bench by its id."""
    ids = Counter(collected.ids + collected.deselected)
    assert len(ids) > 10
    assert set(ids.values()) == {1}, ids.most_common(3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other settings")
def test_long_benches_are_left_out_on_a_cpu(collected):
    kept, left_out = (
        {name.partition("[")[0] for name in names}
        for names in (collected.ids, collected.deselected)
    )
    assert "bench_step" in kept
    assert "bench_brimpr" in left_out - kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other settings")
def test_committed_results_are_of_benches_that_there_are(collected):
    """On every processor: one without products in bf16 skips these benches but collects them."""
    ids, files = set(collected.ids + collected.deselected), 0
    assert {"bench_step[latency-bf16-eager]", "bench_step[latency-fp32-eager]"} <= ids
    for path in (BENCHES / "results").glob("cpu-*.json"):
        stored = {entry["id"] for entry in json.loads(path.read_text())["benches"]}
        assert stored <= ids, sorted(stored - ids)
        files += 1
    assert files


def test_noise_of_earlier_steps_counts():
    """A reference that crosses the exact value is not exact, and its earlier error is its noise."""
    agreement, noise = load("agreement").agreement, {}
    exact = torch.ones(1)
    agreement((exact * 1.01,), (exact * 1.01,), (exact,), None, 1e-3, noise)
    agreement((exact * 1.02,), (exact,), (exact,), None, 1e-3, noise)
    for wrong in (exact * 1.05, exact * 0.9):
        with pytest.raises(AssertionError, match="off"):
            agreement((wrong,), (exact,), (exact,), None, 1e-3, noise)
    with pytest.raises(AssertionError, match="off"):
        agreement((exact * 1.02,), (exact,), (exact,), None, 1e-3)

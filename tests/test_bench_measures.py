"""What benches measure and print: memory of graphs, agreement, official and predicted numbers."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT

BENCHES = ROOT / "benches"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"measured_benches_{name}", BENCHES / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name: str, params: dict[str, Any], **changed) -> dict[str, Any]:
    return {
        "id": name, "name": name.partition("[")[0], "params": params, "torch": "2.12.0",
        "triton": "3.7.0", "clock": "cuda_events", "threads": 4, "median_us": 41.0, "min_us": 40.0,
        "reference_us": 1230.0, "reference_min_us": 1200.0, "ratio": 29.0, "min_ratio": 30.0,
        "peak_bytes": None, "reference_peak_bytes": None, "samples_per_s": None, **changed,
    }  # fmt: skip


def test_peak_memory_of_a_replay_is_that_of_its_graphs(monkeypatch):
    """A replay allocates nothing: what counts are the pools that the first calls have made."""
    clock, gpu = load("clock"), torch.device("cuda")
    pools = [((0, 0), 999), ((0, 1), 50)]  # the usual one, and that of another graph
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 2:
            pools.extend([((0, 2), 100), ((0, 2), 20), ((0, 3), 7)])
        return ()

    def snapshot():
        return [{"segment_pool_id": pool, "total_size": size} for pool, size in pools]

    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(clock, "_beyond", lambda run, device: 3)
    side = clock.WithGraphs(run, gpu)
    side.settle()
    assert side.pools == {(0, 2), (0, 3)}
    assert clock.peak_bytes(side, gpu) == 127 + 3
    pools.append(((0, 4), 1000))
    side()  # looks no longer
    assert side.pools == {(0, 2), (0, 3)}
    assert clock.peak_bytes(run, gpu) == 3
    assert clock.WithGraphs(run, torch.device("cpu")).pool_bytes() == 0


def test_a_reference_that_is_far_off_excuses_nothing():
    agreement, exact = load("agreement").agreement, torch.ones(1)
    reference = exact * 1.09  # as the official bf16 step on one processor
    agreement((exact * 1.04,), (reference,), (exact,), None, 1e-3, most=0.05)
    with pytest.raises(AssertionError, match="off, not 5"):
        agreement((exact * 1.06,), (reference,), (exact,), None, 1e-3, most=0.05)
    agreement((exact * 1.06,), (reference,), (exact,), None, 1e-3)


def test_a_row_names_the_official_precision():
    machine = {"gpu": "NVIDIA H200", "cpu": "", "cores": 1, "cuda": "13.0"}
    row = entry("bench_step[a]", {}, official="bf16 autocast", kernel="flash_fwd_kernel")
    text = load("report").summary({"machine": machine, "benches": [row]})
    assert "| step | flash_fwd_kernel, official in bf16 autocast |" in text


def test_measured_beside_predicted(tmp_path, capsys):
    predicted = load("predicted")
    step = {"setting": "k50", "precision": "bf16", "engine": "graph"}
    results = {"device": "nvidia-h200", "benches": [
        entry("bench_step[k50-bf16-graph]", step, min_us=5500.0, launches=330,
              percent_of_bound=48.2),
        entry("bench_brimpr[bf16]", {"precision": "bf16"}, min_us=150e3, engine="eager"),
        entry("bench_clip_episode[a-tpt-37]", {"method": "a-tpt", "classes": 37}),
        entry("bench_entropies[1]", {}),
    ]}  # fmt: skip
    predictions = [
        {"case": "K50", "precision": "bf16", "engine": "graph", "predicted": 5e-3, "launches": 325},
        {"case": "K50", "precision": "bf16", "engine": "eager", "predicted": 1.0, "launches": 1},
        {"case": "BriMPR", "precision": "bf16", "engine": "eager", "predicted": 0.075,
         "launches": 2000},
    ]  # fmt: skip
    paths = [tmp_path / name for name in ("results.json", "predictions.json")]
    for path, content in zip(paths, (results, predictions), strict=True):
        path.write_text(json.dumps(content))
    assert predicted.main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "| BriMPR, bf16, eager | 75.00 ms | 150.00 ms | 2.00 | 2000 / ? |  | explain |",
        "| K50, bf16, graph | 5.00 ms | 5.50 ms | 1.10 | 325 / 330 | 48 % |  |",
    ]
    paths[1].write_text("[]")
    assert predicted.main([str(path) for path in paths]) == 1
    paths[1].write_text("{")
    assert predicted.main([str(path) for path in paths]) == 2


def test_cases_of_the_predictions():
    """The names are those of the steps that are counted."""
    predicted = load("predicted")
    counted = "".join(path.read_text() for path in (ROOT / "tests" / "cost").glob("*.py"))
    entries = [
        entry("bench_step[x]", {"setting": x, "precision": "bf16", "engine": "graph"})
        for x in predicted._STEPS
    ]
    entries += [
        entry("bench_clip_episode[x]", {"method": method, "classes": classes})
        for method, classes in (("a-tpt", 37), ("a-tpt", 1000), ("tpt", 37))
    ]
    entries.append(entry("bench_brimpr[x]", {"precision": "bf16"}))
    for case, _, _ in map(predicted.case_of, entries):
        assert f'"{case}": Case(' in counted, case
    assert predicted.case_of(entry("bench_views[x]", {})) is None


def test_names_of_the_largest_kernels():
    profiled = load("profiled_step")
    elementwise = "void at::native::vectorized_elementwise_kernel<4, at::F<float, 2> >(int, X<a>)"
    launches = [
        ("_tiles_kernel", 3.0), ("Memcpy HtoD (Pinned -> Device)", 90.0), (elementwise, 2.0),
        ("sm90_xmma_gemm_bf16_tn_n", 9.0), ("void cutlass::Kernel<f::g<1> >(f::P)", 1.0),
        (elementwise, 2.5),
    ]  # fmt: skip
    assert profiled.largest(launches, 3) == [
        "sm90_xmma_gemm_bf16_tn_n", "vectorized_elementwise_kernel", "_tiles_kernel",
    ]  # fmt: skip
    assert profiled.largest(launches)[-1] == "Kernel"

"""The stored results of the benches, one JSON file a device, their tables and their pictures.

python benches/report.py                              print the tables
python benches/report.py --check benches/README.md    fail if tables or pictures are stale
python benches/report.py --write benches/README.md    bring them up to date

A file has the tables between ``<!-- benches -->`` and ``<!-- /benches -->``. The picture of a
device lies beside its results (``chart.py``) and needs the extra ``report``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def _module(name: str) -> ModuleType:
    """A module of this folder, which need not be on sys.path."""
    spec = importlib.util.spec_from_file_location(f"fasttta_benches_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_chart = _module("chart")
RESULTS = HERE / "results"
BEGIN, END = "<!-- benches -->", "<!-- /benches -->"


def slug(machine: dict[str, Any]) -> str:
    """File name of a machine: "nvidia-h200", "cpu-amd-epyc-9b14"."""
    name = machine["gpu"] or "cpu " + re.sub(r"\((R|TM)\)|CPU", " ", machine["cpu"])
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: two of its entries bear one id.
    """
    results = json.loads(path.read_text())
    ids = [entry["id"] for entry in results["benches"]]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ValueError(f"{path.name} has several entries of {', '.join(twice)}; keep one of each")
    return results


def upsert(folder: Path, machine: dict[str, Any], entries: Iterable[dict[str, Any]]) -> Path:
    """Puts entries into the machine's file, in place of earlier ones with the same id."""
    device = slug(machine)
    path = folder / f"{device}.json"
    kept = {entry["id"]: entry for entry in read(path)["benches"]} if path.exists() else {}
    for entry in entries:
        kept[entry["id"]] = {"device": device, **entry}
    results = {"device": device, "machine": machine, "benches": [kept[i] for i in sorted(kept)]}
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
    return path


def times(seconds: Sequence[float], reference_seconds: Sequence[float]) -> dict[str, float]:
    """Quantiles of both sides' calls in microseconds, and their ratios."""
    fifths = seconds  # of a single call
    if len(seconds) > 1:
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    median, reference_median = statistics.median(seconds), statistics.median(reference_seconds)
    best, reference_best = min(seconds), min(reference_seconds)
    p99 = sorted(seconds)[int(0.99 * (len(seconds) - 1) + 0.5)]
    return {
        "median_us": round(median * 1e6, 2),
        "p20_us": round(fifths[0] * 1e6, 2),
        "p80_us": round(fifths[-1] * 1e6, 2),
        "p99_us": round(p99 * 1e6, 2),
        "min_us": round(best * 1e6, 2),
        "reference_us": round(reference_median * 1e6, 2),
        "reference_min_us": round(reference_best * 1e6, 2),
        "ratio": round(reference_median / median, 3),
        "min_ratio": round(reference_best / best, 3),
    }


def fallen(stored: dict[str, Any], seconds: float, reference_seconds: float) -> str | None:
    """Whether a measurement is more than 10 % worse than the stored one of the same bench.

    Device times are compared as they are; times on a host, where other work slows both sides,
    as ratios to the reference's.

    Args:
        seconds, reference_seconds: the least of each side.

    Returns:
        What has fallen; None if nothing.
    """
    if stored["clock"] == "cuda_events":
        share, before, now = stored["min_us"] / (1e6 * seconds), stored["min_us"], 1e6 * seconds
        what = f"{now:.4g} µs, {before:.4g} µs"
    else:
        before, now = stored["min_ratio"], reference_seconds / seconds
        share, what = now / before, f"{now:.3g}x the reference, {before:.3g}x"
    if share >= 0.9:
        return None
    return f"{stored['id']} has fallen to {100 * share:.0f} % of the stored result: {what} stored"


def _time(us: float) -> str:
    for limit, scale, unit in ((1e3, 1, "µs"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if us < limit:
            return f"{us / scale:.3g} {unit}"
    raise ValueError(f"{us} µs is no time")


def _memory(entry: dict[str, Any]) -> str:
    counts = [entry.get(key) for key in ("peak_bytes", "reference_peak_bytes")]
    if None in counts:
        return ""
    return " / ".join(f"{count / 2**20:.3g}" for count in counts) + " MiB"


def _case(entry: dict[str, Any]) -> str:
    params = {key: entry[key] for key in ("shape",) if key in entry} | entry["params"]
    cells = [v if isinstance(v, str) else f"{key} {v}" for key, v in params.items()]
    if entry.get("kernel"):
        cells.append(entry["kernel"][:60])
    if "official" in entry:
        cells.append(f"official in {entry['official']}")
    if "threads" in entry and entry["clock"] == "perf_counter":
        cells.append(f"{entry['threads']} thread{'s' * (entry['threads'] > 1)}")
    return ", ".join(cells)


def _head(results: dict[str, Any]) -> str:
    """What a results file was measured with."""
    machine, benches = results["machine"], results["benches"]
    versions = " and ".join(sorted({entry["torch"] for entry in benches}))
    facts = [machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores", f"torch {versions}"]
    if machine["gpu"]:
        triton = sorted({entry["triton"] or "none" for entry in benches})
        facts += [f"triton {' and '.join(triton)}", f"CUDA {machine['cuda']}"]
    return f"**{', '.join(facts)}**"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], always: int) -> str:
    """A table; of the columns from ``always`` on those in which a row has something."""
    rows = list(rows)
    used = [i for i in range(len(head)) if i < always or any(row[i] for row in rows)]
    lines = [[cells[i] for i in used] for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(x)} |" for x in lines)


def summary(results: dict[str, Any]) -> str:
    """Markdown of a run's benches in one table, a row each."""
    rows = [
        (
            entry["name"].removeprefix("bench_").replace("_", " "),
            _case(entry | {"params": _without(entry["params"])}),
            f"{_time(entry['median_us'])} ({_time(entry['min_us'])})",
            f"{_time(entry['reference_us'])} ({_time(entry['reference_min_us'])})",
            f"{entry['min_ratio']:.2f}x",
            _memory(entry),
            "" if entry.get("samples_per_s") is None else f"{entry['samples_per_s']:.3g}",
        )
        for entry in results["benches"]
    ]
    head = ("bench", "case", "median (min)", "reference", "speed-up", "extra memory", "samples/s")
    return f"{_head(results)}\n\n{_markdown(head, rows, 5)}"


_OTHERS = ("plain", "compiled reference", "compiled")


def _pivot(implementations: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The row of a case that several implementations have run."""
    ours = implementations["default"]
    others = [implementations.get(name) for name in _OTHERS]
    launches = [ours.get(key) for key in ("launches", "reference_launches")]
    return (
        _case(ours | {"params": _without(ours["params"])}),
        _time(ours["reference_min_us"]),
        *("" if entry is None else _time(entry["min_us"]) for entry in others),
        _time(ours["min_us"]),
        f"{ours['min_ratio']:.2f}x",
        f"{ours['percent_of_bound']:.0f} %" if "percent_of_bound" in ours else "",
        _memory(ours),
        "" if None in launches else " / ".join(map(str, launches)),
        "" if ours.get("samples_per_s") is None else f"{ours['samples_per_s']:.3g}",
    )


def _without(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != "implementation"}


def tables(results: dict[str, Any]) -> str:
    """Markdown of every bench, a table each; a row holds all implementations of a case."""
    benches: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in results["benches"]:
        case = json.dumps(_without(entry["params"]))
        cases = benches.setdefault(entry["name"], {}).setdefault(case, {})
        cases[entry["params"].get("implementation", "default")] = entry
    head = ("case", "reference", *_OTHERS, "ours", "speed-up", "of the ceiling",
            "extra memory", "launches", "samples/s")  # fmt: skip
    parts = [_head(results)]
    if _chart.chart(results) is not None:
        parts.append(f"![Speed-ups of the main benches](results/{slug(results['machine'])}.svg)")
    for name, cases in benches.items():
        rows = [_pivot(x) for x in cases.values() if "default" in x]
        title = name.removeprefix("bench_").replace("_", " ")
        parts.append(f"### {title}\n\n{_markdown(head, rows, 2)}")
    return "\n\n".join(parts)


def render(folder: Path) -> str:
    """Markdown of every results file in the folder."""
    parts = [tables(read(path)) for path in sorted(folder.glob("*.json"))]
    if parts:
        parts.append(
            "Times are minima, a speed-up is their ratio; both sides ran in turn, call by call. "
            "Medians and quantiles are in the results files."
        )
    if any("extra memory" in part for part in parts):
        parts.append("Extra memory: peak beyond inputs and outputs, ours / the reference's.")
    return "\n\n".join(parts)


def pictures(folder: Path) -> dict[Path, bytes]:
    """The picture of every results file in the folder, by the path that it belongs at."""
    charts = {path: _chart.chart(read(path)) for path in sorted(folder.glob("*.json"))}
    if not any(charts.values()):
        return {}
    from fasttta.evaluate.drawing import svg_file

    return {path.with_suffix(".svg"): svg_file(chart) for path, chart in charts.items() if chart}


def _stale(folder: Path) -> list[Path]:
    """Pictures that are missing or show other numbers than the results."""
    return [
        path
        for path, wanted in pictures(folder).items()
        if not path.exists() or _chart.texts(path.read_bytes()) != _chart.texts(wanted)
    ]


def inserted(text: str, rendered: str) -> str:
    """The text with the tables between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, opened, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not opened or not closed or BEGIN in after or END in after:
        raise ValueError(f"needed {BEGIN} and then {END}, once each")
    middle = f"\n\n{rendered}\n\n" if rendered else "\n"
    return f"{before}{BEGIN}{middle}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="tables and pictures of the stored bench results")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="README", help="fail if its tables are stale")
    action.add_argument("--write", type=Path, metavar="README", help="bring its tables up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    try:
        readme = options.check or options.write
        if readme is None:
            print(render(options.results))
            return 0
        text = readme.read_text()
        wanted = inserted(text, render(options.results))
    except ValueError as problem:
        print(f"report.py: {problem}", file=sys.stderr)
        return 1
    if options.write:
        readme.write_text(wanted)
        for path, content in pictures(options.results).items():
            path.write_bytes(content)
        return 0
    stale = [readme] if text != wanted else []
    for path in (*stale, *_stale(options.results)):
        print(f"{path} is stale; type: python benches/report.py --write {readme}", file=sys.stderr)
        stale = [path]
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

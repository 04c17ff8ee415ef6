"""The stored results of the benches, one JSON file a device, and the README's table of them.

python benches/report.py                      print the table
python benches/report.py --check README.md    fail if the README's table is stale
python benches/report.py --write README.md    bring it up to date
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
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


# --------------------------------------------------------------------------- the table


def _time(us: float) -> str:
    for limit, scale, unit in ((1e3, 1, "µs"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if us < limit:
            return f"{us / scale:.3g} {unit}"
    raise ValueError(f"{us} µs is no time")


def _memory(entry: dict[str, Any]) -> str:
    found = [entry.get(key) for key in ("peak_bytes", "reference_peak_bytes")]
    if None in found:
        return ""
    return " / ".join(f"{count / 2**20:.3g}" for count in found) + " MiB"


def _case(entry: dict[str, Any]) -> str:
    params = {key: entry[key] for key in ("shape",) if key in entry} | entry["params"]
    cells = [v if isinstance(v, str) else f"{key} {v}" for key, v in params.items()]
    if "threads" in entry and entry["clock"] == "perf_counter":
        cells.append(f"{entry['threads']} thread{'s' * (entry['threads'] > 1)}")
    return ", ".join(cells)


def table(results: dict[str, Any]) -> str:
    """Markdown of one results file: what it was measured with, and a row a bench."""
    machine, benches = results["machine"], results["benches"]
    versions = " and ".join(sorted({entry["torch"] for entry in benches}))
    facts = [machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores", f"torch {versions}"]
    if machine["gpu"]:
        triton = sorted({entry["triton"] or "none" for entry in benches})
        facts += [f"triton {' and '.join(triton)}", f"CUDA {machine['cuda']}"]
    rows = [
        (
            entry["name"].removeprefix("bench_").replace("_", " "),
            _case(entry),
            f"{_time(entry['median_us'])} ({_time(entry['min_us'])})",
            f"{_time(entry['reference_us'])} ({_time(entry['reference_min_us'])})",
            f"{entry['ratio']:.2f}x",
            _memory(entry),
            "" if entry.get("samples_per_s") is None else f"{entry['samples_per_s']:.3g}",
        )
        for entry in benches
        if entry["params"].get("implementation") != "reference"  # a column has it
    ]
    head = ("bench", "case", "median (min)", "reference", "speed-up", "extra memory", "samples/s")
    used = [i for i in range(len(head)) if i < 5 or any(row[i] for row in rows)]
    lines = [[cells[i] for i in used] for cells in (head, ["---"] * len(head), *rows)]
    return f"**{', '.join(facts)}**\n\n" + "\n".join(f"| {' | '.join(x)} |" for x in lines)


def render(folder: Path) -> str:
    """Markdown of every results file in the folder."""
    tables = [table(read(path)) for path in sorted(folder.glob("*.json"))]
    if any("extra memory" in found for found in tables):
        tables.append("Extra memory: peak beyond inputs and outputs, ours / the reference's.")
    return "\n\n".join(tables)


def inserted(text: str, rendered: str) -> str:
    """The README's text with the table between the markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"needed {BEGIN} and then {END}, once each")
    middle = f"\n\n{rendered}\n\n" if rendered else "\n"
    return f"{before}{BEGIN}{middle}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="table of the stored bench results")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="README", help="fail if its table is stale")
    action.add_argument("--write", type=Path, metavar="README", help="bring its table up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    try:
        rendered = render(options.results)
        readme = options.check or options.write
        if readme is None:
            print(rendered)
            return 0
        found = readme.read_text()
        wanted = inserted(found, rendered)
    except ValueError as problem:
        print(f"report.py: {problem}", file=sys.stderr)
        return 1
    if options.write:
        readme.write_text(wanted)
    elif found != wanted:
        print(
            f"{readme}: the bench table is stale; type: python benches/report.py --write {readme}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

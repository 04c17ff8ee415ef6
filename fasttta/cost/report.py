"""What was counted, as numbers and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from .log import Log
from .operation import Operation
from .roofline import GPU


@dataclass(frozen=True)
class Sum:
    """Several operations together; seconds without the gaps between kernels."""

    launches: int
    bytes: int
    flops: int
    seconds: float


def summed(operations: Iterable[Operation], gpu: GPU) -> Sum:
    """Adds up operations."""
    operations = list(operations)
    return Sum(
        sum(x.launches for x in operations),
        sum(x.bytes for x in operations),
        sum(x.flops for x in operations),
        sum(map(gpu.seconds, operations)),
    )


def grouped(
    operations: Iterable[Operation], key: Callable[[Operation], str], gpu: GPU
) -> dict[str, Sum]:
    """Sums of the operations of each key, the longest first."""
    groups: dict[str, list[Operation]] = {}
    for x in operations:
        groups.setdefault(key(x), []).append(x)
    sums = {name: summed(group, gpu) for name, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def numbers(log: Log, gpu: GPU, graph: bool) -> dict[str, object]:
    """What was counted, JSON-ready: bytes and FLOP, seconds, by kind of operation."""
    predicted = gpu.predicted(log.operations, graph)
    return {
        **asdict(summed(log.operations, gpu)),
        "peak": log.peak,
        "gpu": gpu.name,
        "predicted": predicted[0],
        "predicted_slow_host": predicted[1],
        "kinds": {
            name: asdict(x) for name, x in grouped(log.operations, lambda x: x.kind, gpu).items()
        },
        "findings": [str(x) for x in dict.fromkeys(log.findings)],
    }


def text(log: Log, gpu: GPU, graph: bool, lines: int = 0) -> str:
    """What was counted, for people; ``lines``: how many of the largest source lines."""
    total, (fast, slow) = summed(log.operations, gpu), gpu.predicted(log.operations, graph)
    times = f"{fast * 1e3:.2f}" if graph else f"{fast * 1e3:.2f} to {slow * 1e3:.2f}"
    rows = [
        f"{total.launches:,} launches, {total.bytes / 1e9:.2f} GB moved, "
        f"{total.flops / 1e12:.3f} TFLOP, {log.peak / 2**30:.2f} GiB at the peak beyond weights "
        "and state",
        f"estimate for {gpu.name}: {times} ms a step (a roofline of published peaks, not measured)",
        "",
        *_table(grouped(log.operations, lambda x: x.kind, gpu), "kind of operation"),
    ]
    if lines:
        sums = grouped(log.operations, lambda x: f"{x.name}  {x.where}", gpu)
        rows += ["", *_table(dict(list(sums.items())[:lines]), "operation and source line")]
    found = Counter(map(str, log.findings))
    rows += ["", *(f"{n} x {name}" for name, n in found.most_common())] if found else []
    return "\n".join(rows)


def _table(sums: dict[str, Sum], title: str) -> list[str]:
    rows = [f"{'ms':>8}{'launches':>10}{'GB':>9}{'TFLOP':>9}  {title}"]
    for name, x in sums.items():
        rows.append(
            f"{x.seconds * 1e3:>8.3f}{x.launches:>10,}{x.bytes / 1e9:>9.3f}"
            f"{x.flops / 1e12:>9.3f}  {name}"
        )
    return rows

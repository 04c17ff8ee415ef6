"""Time that operations need at least on a named GPU: an estimate, from published peaks.

An operation takes the longer of two times: its bytes at the rate of memory, its FLOP at the rate
of matrix products of its type. Large kernels reach ``MEMORY`` and ``MATRICES`` of the peaks. A
product's rate falls with its last, partly filled wave of tiles and with a short inner dimension. No
kernel takes less than ``LEAST``. Caches are not credited: small batches may be faster. Nothing of
this has been measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .operation import Operation

MEMORY, MATRICES, VECTORS = 0.833, 0.8, 0.75  # of the peaks: 4.0 TB/s, 790 and 50 TFLOP/s (H200)
LEAST = 2e-6  # seconds of the smallest kernel
IN_A_GRAPH = 1e-6  # seconds between kernels of a CUDA graph
EAGER = 3e-6, 8e-6  # seconds to launch a kernel from Python: a fast and a slow host
_GAP = 0.5e-6  # seconds between kernels of a full queue

# tiles of a product and the share of the best rate that they reach
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 128, 0.75), (128, 64, 0.75),
          (64, 64, 0.55))  # fmt: skip
_SHORT = 160  # inner dimension at which a product reaches half of its rate


@dataclass(frozen=True)
class GPU:
    """Published peaks, dense.

    Attributes:
        rates: TFLOP/s of products by type; "fp32" is IEEE, without tensor cores.
        memory: TB/s. units: streaming multiprocessors, or compute units.
    """

    name: str
    rates: dict[str, float]
    memory: float
    units: int

    def seconds(self, operation: Operation) -> float:
        """Seconds of an operation's kernels, without the gaps between them."""
        busy = operation.bytes / (self.memory * 1e12 * MEMORY)
        if operation.flops:
            reached = VECTORS if operation.rate in ("fp32", "fp64") else MATRICES
            rate = self.rates[operation.rate] * 1e12 * reached * operation.share
            if operation.product is not None:
                rate *= self._filled(*operation.product)
            busy = max(busy, operation.flops / rate)
        return max(busy, operation.launches * LEAST)

    def _filled(self, m: int, n: int, k: int, batch: int) -> float:
        """The share of the rate that a product of these sizes reaches, with its best tiles."""
        best = 0.0
        for rows, columns, share in _TILES:
            tiles = math.ceil(m / rows) * math.ceil(n / columns) * batch
            waves = math.ceil(tiles / self.units)
            best = max(best, share * m * n * batch / (waves * self.units * rows * columns))
        return best * k / (k + _SHORT)

    def predicted(self, operations: Iterable[Operation], graph: bool) -> tuple[float, float]:
        """Seconds of a step: as a CUDA graph twice the same, eager on a fast and a slow host."""
        operations = list(operations)
        launches = sum(x.launches for x in operations)
        busy = sum(map(self.seconds, operations))
        if graph:
            return (busy + launches * IN_A_GRAPH,) * 2
        fast, slow = (max(busy + launches * _GAP, launches * host) for host in EAGER)
        return fast, slow


def _rates(bf16: float, tf32: float, fp32: float, fp64: float, fp8: float) -> dict[str, float]:
    return {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64, "fp8": fp8}


#: By name. Peaks of the vendors' data sheets; an A100 has no FP8, and counts as in bf16.
GPUS = {
    "h200": GPU("NVIDIA H200", _rates(989, 494, 67, 67, 1979), 4.8, 132),
    "h100": GPU("NVIDIA H100 SXM", _rates(989, 494, 67, 67, 1979), 3.35, 132),
    "a100": GPU("NVIDIA A100 80GB SXM", _rates(312, 156, 19.5, 19.5, 312), 2.04, 108),
    "b200": GPU("NVIDIA B200", _rates(2250, 1125, 75, 37, 4500), 7.7, 148),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", _rates(209.5, 104.8, 104.8, 1.64, 419), 1.79, 170),
    "mi300x": GPU("AMD Instinct MI300X", _rates(1307, 654, 163, 163, 2615), 5.3, 304),
}  # fmt: skip

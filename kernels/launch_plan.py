"""What a launch plan is, and what the plans of all operations use. Pure Python, no Triton.

Each operation's plans lie in <operation>_plan.py: grid, blocks, warps and stages as functions of
shapes. Blocks are those that compile without spills for the family; the choice between them
follows from operation and wave counts, none has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# bytes that one block of threads may use, by family of GPUs
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}


@dataclass(frozen=True)
class Plan:
    """How a kernel is started.

    Attributes:
        grid: programs along each axis.
        constants: the kernel's constexpr arguments, by name.
        warps: of a program; a warp has 32 threads (64 on gfx942).
        stages: of the software pipeline, iterations of a loop whose loads are in flight.
        registers: the most that a thread may have; None leaves it to ptxas (NVIDIA only).
    """

    grid: tuple[int, ...]
    constants: Mapping[str, object]
    warps: int
    stages: int = 1
    registers: int | None = None


def integer(constants: Mapping[str, object], name: str) -> int:
    """The constant ``name``, which must be an integer."""
    value = constants[name]
    assert isinstance(value, int), f"{name} is {value!r}"
    return value


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def precision(architecture: str, half: bool) -> str:
    """The ``input_precision`` of tl.dot.

    Three TF32 products keep the digits of float32, which a single one would not.
    """
    return "tf32x3" if not half and architecture in ("sm_90", "sm_100") else "ieee"

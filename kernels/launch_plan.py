"""What a launch plan is, and what the plans of all operations use. Pure Python, no Triton.

Each operation's plans lie in <operation>_plan.py: grid, blocks, warps and stages as functions of
shapes. Blocks are those that compile without spills for the family; the choice between them
follows from operation and wave counts, none has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Bytes that one block of threads may use on every GPU of a family. An A100 (sm_80) has 163 KB, but
# its plans serve sm_86 and sm_89 too, which have 99 KB.
SHARED_MEMORY = {
    "sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}  # fmt: skip


def family(major: int) -> str:
    """The family that plans are made for, of an NVIDIA GPU of compute capability ``major``.x.

    sm_120 (RTX 50xx, RTX PRO 6000) is no small sm_100: its matrix products are a warp's own
    (mma.sync), as on sm_80, for it has neither tcgen05 nor wgmma. Later GPUs are planned as it,
    since every NVIDIA GPU runs such products.
    """
    if major < 9:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def warp_products(architecture: str) -> bool:
    """Whether a family multiplies matrices by mma.sync: each warp holds its operands and sums in
    registers of its own, so that tiles must be smaller than those of wgmma or tcgen05."""
    return architecture in ("sm_80", "sm_120")


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

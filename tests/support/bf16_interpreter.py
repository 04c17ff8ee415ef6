"""Arithmetic in bfloat16 for Triton's interpreter, which has none.

The interpreter holds bfloat16 as bits in uint16. It cuts digits off where a cast has to round, and
adds, multiplies, compares and sums bits as if they were integers. With ``install`` an operation
computes in float32 from the operands' exact values, and a result in bfloat16 is rounded once, to
the nearest, ties to even; products of matrices keep their sums in float32. GPUs do the same, but
for the order of a sum. Products and sums of two bfloat16 that are rounded to float32 first end in
the same bfloat16: 24 digits are more than twice 8 plus two.

Sums over an axis in bfloat16 raise: Triton would round after every addition, in an order of its
own, and kernels accumulate in float32. Atomic operations and conversions to and from float8 stay
the interpreter's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

_NAN = 0x7FFF  # what a GPU's cast makes of any nan


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 of the bits of bfloat16 in a uint16 array; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bits(x: np.ndarray) -> np.ndarray:
    """The bits, in uint16, of the bfloat16 next to each number; of two at the same distance, the
    even one."""
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
        x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), _NAN, bits).astype(np.uint16)


def _is_bf16(x: TensorHandle) -> bool:
    # comparisons of other types are bool in a handle that has the operands' type
    return x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _float32(x: TensorHandle) -> TensorHandle:
    """x in float32 if it is bfloat16, else x."""
    return TensorHandle(widen(x.data), tl.float32) if _is_bf16(x) else x


def _bf16(x: np.ndarray) -> TensorHandle:
    return TensorHandle(round_to_bits(x), tl.bfloat16)


class _Builder(InterpreterBuilder):
    """The interpreter's operations, with those on bfloat16 changed."""

    def get_bf16(self, value):
        return _bf16(np.array([value], dtype=np.float32))

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _bf16(src.data)
        return super().cast_impl(_float32(src), dst_type)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return super().binary_op(lhs, rhs, op)
        result = op(_float32(lhs).data, _float32(rhs).data)
        return TensorHandle(result, tl.int1) if result.dtype == bool else _bf16(result)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return _bf16(super().create_fma(*map(_float32, (x, y, z))).data)

    def create_dot(self, a, b, d, *options):
        return super().create_dot(_float32(a), _float32(b), d, *options)


def _check_tensor(self, tensors, check=ReduceScanOpInterface.check_tensor):
    check(self, tensors)
    if any(x.dtype == tl.bfloat16 for x in tensors):
        raise TypeError("a reduction in bfloat16 rounds at every step: cast to float32 before it")


def install() -> None:
    """Replaces the operations on bfloat16 for all kernels that are interpreted."""
    interpreter.interpreter_builder.__class__ = _Builder
    ReduceScanOpInterface.check_tensor = _check_tensor


@contextmanager
def removed() -> Iterator[None]:
    """The interpreter as Triton has it."""
    interpreter.interpreter_builder.__class__ = InterpreterBuilder
    ReduceScanOpInterface.check_tensor = _check_tensor.__defaults__[0]
    try:
        yield
    finally:
        install()

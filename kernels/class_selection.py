"""Selects the k largest logits of a row without sorting, ties to the lowest index, and their terms.

A key is an unsigned integer in the order of its logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# bits of a logit's key that tell it from others
KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


@triton.jit
def order_keys(b_z, BITS: tl.constexpr):
    """Keys of z; -0 equals 0. float16 and bfloat16 need 20 and 16 of the 32 bits, as the others are
    the same in every key."""
    b_bits = (b_z + 0.0).to(tl.int32, bitcast=True)
    b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True)
    return (b_key ^ tl.full([1], 0x80000000, tl.uint32)) >> (32 - BITS)


@triton.jit
def smallest_selected(b_key, k, BITS: tl.constexpr, PACKED: tl.constexpr):
    """The k-th largest key: bit by bit, the largest t that at least k keys are not below.

    PACKED takes two bits a step, with three counts of at most 1023 in one sum: half as many sums.
    """
    threshold = tl.full([1], 0, tl.uint32)
    if PACKED:
        unit = tl.full([1], 1 << (BITS - 2), tl.uint32)
        for _ in range(BITS // 2):
            b_counts = (b_key >= threshold + unit).to(tl.int32)
            b_counts += (b_key >= threshold + unit * 2).to(tl.int32) << 10
            b_counts += (b_key >= threshold + unit * 3).to(tl.int32) << 20
            total = tl.sum(b_counts, axis=0)
            steps = ((total & 1023) >= k).to(tl.uint32)
            steps += (((total >> 10) & 1023) >= k).to(tl.uint32)
            steps += ((total >> 20) >= k).to(tl.uint32)
            threshold += steps * unit
            unit = unit >> 2
    else:
        unit = tl.full([1], 1 << (BITS - 1), tl.uint32)
        for _ in range(BITS):
            total = tl.sum((b_key >= threshold + unit).to(tl.int32), axis=0)
            threshold += (total >= k).to(tl.uint32) * unit
            unit = unit >> 1
    return threshold


@triton.jit
def surprise(b_p, eps):
    """-ln(p + eps), 0 where that is infinite: p ln p ends there. nan stays."""
    b_x = b_p + eps
    return tl.where(b_x == 0, 0.0, -tl.log(tl.where(b_x == 0, 1.0, b_x)))


@triton.jit
def principal_terms(b_p, m_selected, eps):
    """p s and p g on the selected classes, s = -ln(p + eps), g = s - p / (p + eps)."""
    b_s = tl.where(m_selected, surprise(b_p, eps), 0.0)
    b_x = b_p + eps
    b_share = tl.where(m_selected & (b_x != 0), b_p / tl.where(b_x == 0, 1.0, b_x), 0.0)
    return b_p * b_s, b_p * (b_s - b_share)

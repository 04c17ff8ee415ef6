"""Launch plans of the score moments of each head. Pure Python, no Triton.

Used by score_moments_per_head.py, for attention_bootstrap too.
"""

from __future__ import annotations

from collections.abc import Sequence

from .launch_plan import Plan, power_of_2, precision, warp_products

WIDEST_HEAD = 64  # channels of which covariances stay in registers


def unsuitable(d: int) -> str | None:
    """Why the kernels are not made for heads of d channels; None if they are."""
    return None if d <= WIDEST_HEAD else f"it needs heads of at most {WIDEST_HEAD} channels"


def _head(
    architecture: str, half: bool, spans: Sequence[int], d: int, pair_query: bool
) -> dict[str, object]:
    return {
        "SPANS": tuple(spans), "D": d, "BD": power_of_2(max(16, d)), "HALF": half,
        "PRECISION": precision(architecture, half), "PAIR_QUERY": pair_query,
    }  # fmt: skip


def moments(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int,
    pair_query: bool,
) -> Plan:  # fmt: skip
    """Plan of the forward: a program a head of a sample.

    Args:
        architecture: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        half: whether q and k are of a half type.
        batch, heads, spans, d: samples, heads, tokens of each modality, channels of a head.
        pair_query: whether block (i, j) is compared with (i, i), not with (j, j).
    """
    tokens = 16 if half and warp_products(architecture) else 64 if half else 32
    constants = _head(architecture, half, spans, d, pair_query)
    constants |= {"BT": tokens, "BB": power_of_2(max(2, len(spans) ** 2))}
    return Plan((heads, batch), constants, 8)


def gradients(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int,
    self_blocks: bool, pair_query: bool,
) -> Plan:  # fmt: skip
    """Plan of the backward: two programs a head of a sample, one for dq and one for dk.

    Args:
        self_blocks: whether the blocks (i, i) have a gradient; the rest as in ``moments``.
    """
    constants = _head(architecture, half, spans, d, pair_query)
    tokens = 64 if architecture == "gfx942" else 128 if half else 32
    constants |= {"BT": tokens, "SELF": self_blocks}
    return Plan((2 * heads, batch), constants, 8 if half or not warp_products(architecture) else 16)

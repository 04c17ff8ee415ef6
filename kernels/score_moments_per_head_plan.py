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


def _head(architecture: str, half: bool, spans: Sequence[int], d: int) -> dict[str, object]:
    return {
        "SPANS": tuple(spans), "D": d, "BD": power_of_2(max(16, d)), "HALF": half,
        "PRECISION": precision(architecture, half),
    }  # fmt: skip


def token_moments(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int
) -> Plan:
    """Plan of the covariances: a program a modality's queries or keys of a head of a sample.

    Small tiles, whose loads run ahead by two of them: with 128 registers a thread (sm_90,
    half types) four programs share a processor, and one computes while others wait.

    Args:
        architecture: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        half: whether q and k are of a half type.
        batch, heads, spans, d: samples, heads, tokens of each modality, channels of a head.
    """
    constants = _head(architecture, half, spans, d) | {
        "BT": 32, "TWICE": architecture == "sm_100"
    }  # fmt: skip
    return Plan((2 * len(spans) * heads, batch), constants, 4, 3)


def moments(batch: int, heads: int, spans: Sequence[int], d: int, pair_query: bool) -> Plan:
    """Plan of the forward's second launch: a program a head of a sample.

    Args:
        pair_query: whether block (i, j) is compared with (i, i), not with (j, j); the rest as in
            ``token_moments``.
    """
    constants = {
        "SPANS": tuple(spans), "D": d, "BD": power_of_2(max(16, d)), "PAIR_QUERY": pair_query,
        "BB": power_of_2(max(2, len(spans) ** 2)),
    }  # fmt: skip
    return Plan((heads, batch), constants, 4)


def gradients(
    architecture: str, half: bool, batch: int, heads: int, spans: Sequence[int], d: int,
    self_blocks: bool, pair_query: bool,
) -> Plan:  # fmt: skip
    """Plan of the backward: a program dq or dk of a modality of a head of a sample.

    Args:
        self_blocks: whether the blocks (i, i) have a gradient; the rest as in ``moments``.
    """
    constants = _head(architecture, half, spans, d)
    tokens = 32 if not half and warp_products(architecture) else 64
    constants |= {"BT": tokens, "PAIR_QUERY": pair_query, "SELF": self_blocks}
    # of their own accord ptxas takes 168 of Triton 3.6 and 3.7, and spills 8 bytes with them
    registers = 255 if warp_products(architecture) else None
    return Plan((2 * len(spans) * heads, batch), constants, 4, 3, registers)

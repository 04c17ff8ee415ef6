"""How far cross-modal attention is from self-attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel


def attention_gap(model: FusionModel, tokens: Iterable[Tensor]) -> dict[str, float]:
    """Attention gap of a two-modality model, the mean over samples, in nats.

    The gap is KL(va, aa) + KL(av, vv) between normal distributions with the moments of the raw
    attention scores, averaged over heads (row = query modality; blocks are paired by key, as
    ABPEM's loss does).

    Args:
        model: the weights in question, e.g. ``adapted.unwrap(merge=True)``.
        tokens: batches of encoder outputs [b, T, D], ``model.encode(*inputs)``.

    Returns:
        ``"gap"``, its two parts ``"va|aa"`` and ``"av|vv"``, and the opposite directions
        ``"aa|va"`` = KL(aa, va) and ``"vv|av"``.

    Raises:
        ValueError: the model does not have two modalities, or there are no tokens.

    Source: ABPEM, attention gap and bootstrapping loss.
    """
    if len(model.spans) != 2:
        raise ValueError(
            f"the attention gap is between two modalities, the model's spans are {model.spans}"
        )
    a, v = 0, 1
    parts: dict[str, list[Tensor]] = {"va|aa": [], "av|vv": [], "aa|va": [], "vv|av": []}
    blocks = {"aa": (a, a), "vv": (v, v), "av": (a, v), "va": (v, a)}
    with torch.no_grad():
        for batch in tokens:
            _, (q, k, scale) = model.fuse_attention(batch)
            mean, std = F.score_moments(q, k, model.spans, scale)  # [b, 2, 2]
            for name, values in parts.items():
                p, r = (blocks[block] for block in name.split("|"))
                values.append(
                    F.gaussian_kl(mean[:, *p], std[:, *p], mean[:, *r], std[:, *r])  # [b]
                )
    if not parts["va|aa"]:
        raise ValueError("tokens: no batch; needed at least one sample")
    means = {name: torch.cat(values).double().mean().item() for name, values in parts.items()}
    return {"gap": means["va|aa"] + means["av|vv"], **means}


def gap_numbers(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What ``Report`` takes of two ``attention_gap``: the gap and its parts, by name and time."""
    return {
        f"{name}_{when}": gap[name]
        for when, gap in (("before", before), ("after", after))
        for name in ("gap", "va|aa", "av|vv")
    }

"""Whether the raw scores that statistics are taken of are those that a module computes."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from .projections import Projections
from .watch import Watch


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-2, -1))


def check_scores(last: Projections, seen: Watch, q: Tensor, k: Tensor) -> None:
    """Compares raw scores from the projections with what the module gives to its softmax.

    Args:
        last: the fusion attention.
        seen: a pass over two samples in float64.
        q, k: [2, H, T, d] of that pass.

    Raises:
        ValueError: they differ, or the module masks its attention.
    """
    ours = _scores(q, k, last.scale)
    for stack, func, args, kwargs in reversed(seen.scores):
        if not any(call.name == last.path for call in stack):
            continue
        if func is nnf.scaled_dot_product_attention:
            options = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
                               args, strict=False)) | kwargs  # fmt: skip
            if options.get("attn_mask") is not None or options.get("is_causal"):
                raise ValueError(
                    f"{last.path} attends under a mask or bias; needed plain attention over all "
                    "tokens, whose raw scores the statistics are of"
                )
            theirs = _scores(options["query"], options["key"], options.get("scale"))
        else:
            theirs = args[0] if args else kwargs["input"]
        if theirs.shape[-2:] != ours.shape[-2:]:
            continue
        same = theirs.numel() == ours.numel()
        error = (theirs.reshape(ours.shape) - ours).abs().max().item() if same else float("inf")
        if not error <= 1e-6 * max(1.0, ours.abs().max().item()):
            raise ValueError(
                f"the scores that {last.path} computes differ from scale * q·k of its projections "
                f"({', '.join(last.modules)}; {last.num_heads} heads, scale "
                f"{q.shape[-1] ** -0.5 if last.scale is None else last.scale:g}) by {error:.1e}: "
                "are q and k rotated, normalised or masked, the rows interleaved by head, or "
                "num_heads or scale others? ModelSpec(..., num_heads=, scale=, qkv=) say so"
            )
        return

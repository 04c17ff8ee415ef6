"""Whether the raw scores that statistics are taken of are those that a module computes."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .attention_calls import Attended, Softmax
from .forward_pass import ForwardPass
from .projections import Projections

_ADVICE = (
    "the statistics of this method are those of raw scores over all tokens, and would count what "
    "is hidden. Give batches without padding, or take a method that needs no scores (read, tent, "
    "eata, source)"
)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-2, -1))


def check_scores(last: Projections, seen: ForwardPass, q: Tensor, k: Tensor) -> None:
    """Compares raw scores from the projections with what the module gives to its softmax.

    Args:
        last: the fusion attention.
        seen: a pass over two samples, in float64 to be strict.
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
            if options.get("is_causal") or hides(options.get("attn_mask")):
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
        limit = max(1e-6, 8 * q.shape[-1] * torch.finfo(ours.dtype).eps)
        if not error <= limit * max(1.0, ours.abs().max().item()):
            raise ValueError(
                f"the scores that {last.path} computes differ from scale * q·k of its projections "
                f"({', '.join(last.modules)}; {last.num_heads} heads, scale "
                f"{q.shape[-1] ** -0.5 if last.scale is None else last.scale:g}) by {error:.1e}: "
                "are q and k rotated, normalised or masked, the rows interleaved by head, or "
                "num_heads or scale others? ModelSpec(..., num_heads=, scale=, qkv=) say so"
            )
        return


def hides(mask: Tensor | None) -> bool:
    """Whether a mask of scaled_dot_product_attention hides or biases something."""
    if mask is None:
        return False
    return not bool(mask.all()) if mask.dtype == torch.bool else bool((mask != 0).any())


@torch.no_grad()
def hidden(last: Projections, call: Attended, q: Tensor, k: Tensor) -> Tensor:
    """Whether some scores of a call are not scale * q·k, because a mask hides them; 0-d bool.

    Args:
        q, k: [B, H, T, d] of the call.

    Raises:
        ValueError: the call showed no scores at all, or (on a CPU, where the answer is at hand)
            some are hidden.
    """
    ours = torch.Size((*q.shape[:-1], k.shape[-2]))
    scores = [
        s for s in call.softmax if s.shape[-2:] == ours[-2:] and s.shape.numel() == ours.numel()
    ]
    if not scores and (call.seen == len(call.softmax)):
        raise ValueError(
            f"{last.path} gave no scores [{ours[-2]}, {ours[-1]}] to a softmax or to "
            "scaled_dot_product_attention, so that masks cannot be told: needed one of them, or a "
            "method that needs no scores (read, tent, eata, source)"
        )
    flag = torch.zeros((), dtype=torch.bool, device=q.device)
    for mask in call.hidden:
        flag = flag | mask
    for softmax in scores:
        flag = flag | _other_rows(last, softmax, q.detach(), k.detach())
    if flag.device.type == "cpu" and flag:
        raise ValueError(
            f"{last.path} attends under a mask that hides tokens of this batch; {_ADVICE}"
        )
    return flag


def _other_rows(last: Projections, softmax: Softmax, q: Tensor, k: Tensor) -> Tensor:
    """Whether the scores given to a softmax have other sums over keys than scale * q·k has, or (in
    half precision) values below the least that it can have. A hidden key has a score of -1e4 or
    less, which shows in both, and neither needs the T x T product."""
    scale = abs(q.shape[-1] ** -0.5 if last.scale is None else last.scale)
    lengths, keys = q.norm(dim=-1), k.norm(dim=-1)  # [B, H, T]
    eps = max(torch.finfo(softmax.dtype).eps, torch.finfo(q.dtype).eps)
    if q.device.type != "cpu":
        eps = max(eps, 2**-10)  # products may be those of TF32
    rows = softmax.rows.reshape(lengths.shape)
    if softmax.dtype in (torch.float16, torch.bfloat16):
        least = -scale * lengths * keys.amax(dim=-1, keepdim=True)
        return ~(rows >= least * (1 + 8 * eps) - 8 * eps).all()
    wide = torch.promote_types(q.dtype, softmax.dtype)
    total = k.to(wide).sum(dim=-2, keepdim=True)  # [B, H, 1, d]
    sign = 1 if last.scale is None or last.scale > 0 else -1
    ours = sign * scale * (q.to(wide) * total).sum(dim=-1)
    bound = 8 * eps * (scale * lengths * keys.sum(dim=-1, keepdim=True) + 1)
    return ~((rows - ours).abs() <= bound).all()

"""Differentiable operations of the adaptation losses.

Every function runs on any device and in float64, and takes ``backend``: ``None`` lets PyTorch's
dispatcher choose among what is registered for the tensors' device, ``"reference"`` is the plain
formulation that all others are compared with. Half-precision inputs are computed, and statistics
and losses returned, in float32; gradients have the input's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

from torch import Tensor

from .ops import reference

_FORMS = ("mean", "softmax-sum")
_HEADS = ("mean", "each")
_PAIRS = ("key", "query")


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of raw attention scores by block (query, key)."""

    mean: Tensor
    std: Tensor


def _implementation(name: str, backend: str | None):
    if backend is None:
        from .ops import autograd

        return getattr(autograd, name)
    if backend == "reference":
        return getattr(reference, name)
    if backend in ("triton", "cpp"):
        raise ValueError(
            f"backend={backend!r}: {name} has no {backend} kernel in this version of fasttta; "
            'available: None (default), "reference"'
        )
    raise ValueError(f'backend={backend!r} is unknown; known: None, "reference", "triton", "cpp"')


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}")


def _same(kind: type[Exception], what: str, a: Tensor, b: Tensor, names: str) -> None:
    found = getattr(a, what), getattr(b, what)
    if found[0] != found[1]:
        raise kind(f"{names} must have one {what}, found {found[0]} and {found[1]}")


def _floating(name: str, x: Tensor, rank: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
    if x.ndim != rank:
        raise ValueError(f"{name} must be {layout}, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {x.dtype}")


def _check_scores(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None, heads: str
) -> tuple[list[int], float, bool]:
    for name, x in (("q", q), ("k", k)):
        _floating(name, x, 4, "[batch, heads, tokens, head dim]")
    _same(ValueError, "shape", q, k, "q and k")
    _same(TypeError, "dtype", q, k, "q and k")
    _same(ValueError, "device", q, k, "q and k")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q needs at least one head and one channel, found {tuple(q.shape)}")
    if not all(isinstance(count, Integral) for count in spans):
        raise TypeError(f"spans must be integers, found {list(spans)}")
    spans = [int(count) for count in spans]
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if sum(spans) != q.shape[2] or not spans:
        raise ValueError(
            f"spans={spans} must sum to the token count {q.shape[2]} of q, they sum to {sum(spans)}"
        )
    if min(spans) < 2:
        raise ValueError(
            f"spans={spans}: a modality needs at least 2 tokens, the unbiased standard deviation "
            "of a single score is undefined"
        )
    _one_of("heads", heads, _HEADS)
    return spans, float(q.shape[3] ** -0.5 if scale is None else scale), heads == "each"


def _check_logits(logits: Tensor, rows: int = 0) -> None:
    _floating("logits", logits, 2, "[samples, classes]")
    if logits.shape[0] < rows or logits.shape[1] < 1:
        raise ValueError(
            f"logits need at least {rows} sample and 1 class, found shape {tuple(logits.shape)}"
        )


def _check_k(logits: Tensor, k: int, eps: float) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an int, found {k!r}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} is out of range, needed 1 to {logits.shape[1]} (the class count)")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")


def _check_weight(logits: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [samples], found {type(weight).__name__}")
    if weight.shape != logits.shape[:1]:
        raise ValueError(
            f"weight must be [{logits.shape[0]}], one a sample, found {tuple(weight.shape)}"
        )
    _same(ValueError, "device", logits, weight, "logits and weight")


def score_moments(
    q: Tensor,
    k: Tensor,
    spans: Sequence[int],
    scale: float | None = None,
    heads: str = "mean",
    *,
    backend: str | None = None,
) -> Moments:
    """Mean and standard deviation of the raw (pre-softmax) attention scores, block by block.

    Args:
        q, k: [B, H, T, d], any strides (views of a packed qkv need no copy).
        spans: token counts of the M modalities, in order; they sum to T, each at least 2.
        scale: factor of q·k, d ** -0.5 unless given.
        heads: ``"mean"``: statistics of the scores averaged over heads (the official ABPEM);
            ``"each"``: of every head.

    Returns:
        Moments(mean, std), each [B, M, M], or [B, H, M, M] for heads="each"; row = query
        modality, column = key modality; std is the unbiased one (divisor N - 1). float32 for half
        inputs, else the type of q.

    Raises:
        ValueError, TypeError: shapes, types or devices of q and k differ; spans do not fit.

    Source: ABPEM (attention bootstrapping), the statistics of its official code; the closed form
    var = c² (q̄ᵀC_K q̄ + k̄ᵀC_Q k̄ + <C_Q, C_K>) for heads="each" is ours.
    """
    options = _check_scores(q, k, spans, scale, heads)
    return Moments(*_implementation("score_moments", backend)(q, k, *options))


def gaussian_kl(
    mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor, *, backend: str | None = None
) -> Tensor:
    """KL(N(mean_p, std_p²) || N(mean_q, std_q²)), elementwise with broadcasting.

    ln(std_q / std_p) + (std_p² + (mean_p - mean_q)²) / (2 std_q²) - 1/2, in nats. A standard
    deviation of 0 gives inf or nan, as the formula does.
    """
    for name, x in zip(
        ("mean_p", "std_p", "mean_q", "std_q"), (mean_p, std_p, mean_q, std_q), strict=True
    ):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating point tensor, found {found}")
    if backend is not None:
        _implementation("gaussian_kl", backend)
    return reference.gaussian_kl(*map(reference.wide, (mean_p, std_p, mean_q, std_q)))


def attention_bootstrap(
    q: Tensor,
    k: Tensor,
    spans: Sequence[int],
    scale: float | None = None,
    heads: str = "mean",
    pair: str = "key",
    *,
    anchor: Moments | None = None,
    return_moments: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Moments]:
    """Attention bootstrapping loss: cross-modal attention pulled towards self-attention.

    Sum over the cross blocks (i, j), i != j, of KL(N(block i,j) || N(self block)); the self
    block's statistics are constants (no gradient). No T x T map of the batch is held.

    Args:
        q, k, spans, scale, heads: as in ``score_moments``; ``"each"`` gives the mean over heads.
        pair: ``"key"`` matches block (i, j) with (j, j), as the official code does; ``"query"``
            with (i, i), as figure 2 of the paper draws it.
        anchor: fixed statistics of the self blocks in place of the batch's own: mean and std [M],
            or [H, M] for heads="each".
        return_moments: also return the ``Moments`` of all blocks (without gradient).

    Returns:
        Loss [B], in nats; with return_moments a pair (loss, Moments).

    Source: ABPEM, attention bootstrapping loss; gradient in closed form.
    """
    spans, scale, per_head = _check_scores(q, k, spans, scale, heads)
    _one_of("pair", pair, _PAIRS)
    anchors = ()
    if anchor is not None:
        shape = (q.shape[1], len(spans)) if per_head else (len(spans),)
        for name, x in zip(("mean", "std"), anchor, strict=True):
            if x.shape != shape:
                raise ValueError(f"anchor.{name} must be {list(shape)}, found {list(x.shape)}")
        anchors = tuple(reference.wide(x).to(reference.wide(q[:0])) for x in anchor)
    op = _implementation("attention_bootstrap", backend)
    loss, mean, std = op(q, k, spans, scale, per_head, pair == "query", *anchors)
    return (loss, Moments(mean.detach(), std.detach())) if return_moments else loss


def entropy(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Shannon entropy of softmax(logits) in nats: logits [B, C] -> [B].

    Source: TENT (Wang et al., ICLR 2021). Logits of -inf (masked classes) count as probability 0.
    """
    _check_logits(logits)
    return _implementation("entropy", backend)(logits)


def principal_entropy(
    logits: Tensor, k: int, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Entropy of the k most probable classes: -sum over them of p ln(p + eps), in nats.

    Args:
        logits: [B, C].
        k: 1 to C; of equal logits the lowest index is selected first. The selection carries no
            gradient, and p is not renormalised over it. k=1, eps=0 is READ's confidence loss.
        eps: added inside the logarithm.

    Returns:
        [B].

    Source: ABPEM, principal entropy minimisation.
    """
    _check_logits(logits)
    _check_k(logits, k, eps)
    return _implementation("principal_entropy", backend)(logits, int(k), float(eps))


def balance_entropy(
    logits: Tensor,
    form: str = "mean",
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of the batch's class distribution (scalar, nats); to be maximised.

    Args:
        logits: [B, C], B at least 1.
        form: ``"mean"``: entropy of the mean prediction (every published ABPEM script);
            ``"softmax-sum"``: of softmax(sum of predictions), READ's and much flatter.
        weight: [B], a sample's share, not all 0; None: all equal.

    Source: READ (Yang et al., ICLR 2024) and the ABPEM code's --fix_loss_bal.
    """
    _check_logits(logits, rows=1)
    _one_of("form", form, _FORMS)
    _check_weight(logits, weight)
    return _implementation("balance_entropy", backend)(logits, form == "softmax-sum", weight)


def adaptation_head(
    logits: Tensor,
    k: int,
    entropy_weight: float = 1.0,
    balance_weight: float = 1.0,
    balance: str = "mean",
    eps: float = 1e-6,
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ABPEM and READ on logits as one operation.

    Args:
        logits: [B, C], B at least 1.
        k, eps: of the principal entropy.
        balance: form of the balance term, as in ``balance_entropy``.
        weight: [B], a sample's share in both terms; None: all equal.

    Returns:
        Scalars (total, entropy, balance): the mean principal entropy, the balance entropy, and
        total = entropy_weight * entropy - balance_weight * balance.
    """
    _check_logits(logits, rows=1)
    _check_k(logits, k, eps)
    _one_of("balance", balance, _FORMS)
    _check_weight(logits, weight)
    return _implementation("adaptation_head", backend)(
        logits, int(k), float(entropy_weight), float(balance_weight), balance == "softmax-sum",
        float(eps), weight,
    )  # fmt: skip

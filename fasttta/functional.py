"""Differentiable operations of the adaptation losses.

Every function runs on any device and in float64, and takes ``backend``:

``None``         PyTorch's dispatcher chooses among what is registered for the tensors' device
``"reference"``  the plain formulation that all others are compared with
``"cpp"``        the C++ kernel (CPU)
``"triton"``     the Triton kernel (CUDA)

A named backend runs exactly that, as differentiable as the default, or is a ValueError that says
why it cannot. Half-precision inputs are computed, and statistics and losses returned, in float32;
gradients have the input's type. The reference has second derivatives; with every other backend
``create_graph=True`` is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from .ops import checks, entropies, registry
from .ops.shared_prefix_attention import layout as layout_of

__all__ = [
    "Moments", "adaptation_head", "attention_bootstrap", "balance_entropy", "entropy",
    "flat_attention", "gaussian_kl", "marginal_entropy", "principal_entropy",
    "reliability_ensemble", "reliability_weights", "score_moments", "shared_prefix_attention",
    "total_variation",
]  # fmt: skip


_OPERATIONS = registry.operations()


def _rows(x: Tensor, rank: int) -> Tensor:
    """A batch of any shape as one of the rank that an operation takes."""
    return x.flatten(0, -rank) if isinstance(x, Tensor) and x.ndim > rank else x


def _backend(name: str, backend: str | None) -> Callable[..., Any]:
    """What computes an operation: the dispatcher's choice (None), or a named backend."""
    return _OPERATIONS[name].compute if backend is None else partial(registry.named, name, backend)


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of raw attention scores by block (query, key)."""

    mean: Tensor
    std: Tensor


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
    compute = _backend("score_moments", backend)
    args = q, k, *checks.scores(q, k, spans, scale, heads)
    return Moments(*compute(*args))


def gaussian_kl(
    mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor, *, backend: str | None = None
) -> Tensor:
    """KL(N(mean_p, std_p²) || N(mean_q, std_q²)), elementwise with broadcasting.

    ln(std_q / std_p) + (std_p² + (mean_p - mean_q)²) / (2 std_q²) - 1/2, in nats. A standard
    deviation of 0 gives inf or nan, as the formula does.
    """
    compute = _backend("gaussian_kl", backend)
    checks.floating_tensors(mean_p=mean_p, std_p=std_p, mean_q=mean_q, std_q=std_q)
    moments = map(registry.wide, (mean_p, std_p, mean_q, std_q))
    return compute(*moments)


@overload
def attention_bootstrap(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None = None, heads: str = "mean",
    pair: str = "key", *, anchor: Moments | None = None,
    return_moments: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention_bootstrap(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None = None, heads: str = "mean",
    pair: str = "key", *, anchor: Moments | None = None,
    return_moments: Literal[True], backend: str | None = None,
) -> tuple[Tensor, Moments]: ...  # fmt: skip
def attention_bootstrap(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None = None, heads: str = "mean",
    pair: str = "key", *, anchor: Moments | None = None,
    return_moments: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Moments]:  # fmt: skip
    """Attention bootstrapping loss: cross-modal attention pulled towards self-attention.

    Sum over the cross blocks (i, j), i != j, of KL(N(block i,j) || N(self block)); the self
    block's statistics are constants (no gradient). No T x T map of the batch is held.

    Args:
        q, k, spans, scale, heads: as in ``score_moments``; ``"each"`` gives the mean over heads.
        pair: ``"key"`` matches block (i, j) with (j, j), as the official code does; ``"query"``
            with (i, i), as figure 2 of the paper draws it.
        anchor: fixed statistics of the self blocks in place of the batch's: mean and std [M], or
            [H, M] for heads="each".
        return_moments: also return the ``Moments`` of all blocks (without gradient).

    Returns:
        Loss [B], in nats; with return_moments a pair (loss, Moments).

    Source: ABPEM, attention bootstrapping loss; gradient in closed form.
    """
    compute = _backend("attention_bootstrap", backend)
    spans, scale, per_head = checks.scores(q, k, spans, scale, heads)
    checks.one_of("pair", pair, checks.PAIRS)
    anchors: tuple[Tensor, ...] = ()
    if anchor is not None:
        checks.anchor(anchor, (q.shape[1], len(spans)) if per_head else (len(spans),))
        anchors = tuple(registry.wide(x).to(registry.wide(q[:0])) for x in anchor)
    loss, mean, std = compute(q, k, spans, scale, per_head, pair == "query", *anchors)
    return (loss, Moments(mean.detach(), std.detach())) if return_moments else loss


def entropy(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Shannon entropy of softmax(logits) in nats: logits [..., C] -> [...].

    Source: TENT (Wang et al., ICLR 2021). Logits of -inf (masked classes) count as probability 0.
    """
    compute = _backend("entropy", backend)
    rows = _rows(logits, 2)
    checks.logits_shape(rows)
    return compute(rows).view(logits.shape[:-1])


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
    compute = _backend("principal_entropy", backend)
    checks.logits_shape(logits)
    checks.k_and_eps(logits, k, eps)
    return compute(logits, int(k), float(eps))


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
    compute = _backend("balance_entropy", backend)
    checks.logits_shape(logits, rows=1)
    checks.one_of("form", form, checks.FORMS)
    checks.sample_weight(logits, weight)
    return compute(logits, form == "softmax-sum", weight)


def marginal_entropy(
    logits: Tensor, *, weight: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Entropy of the mean prediction of several views (nats); to be minimised.

    The same number as ``balance_entropy`` of form "mean", which classes' balance maximises.

    Args:
        logits: [N, C], N at least 1: the views of one sample; or [B, N, C], those of B samples,
            which is computed in log space by PyTorch.
        weight: [N], a view's share, 0 for views that are not selected; None: all equal.

    Returns:
        0-d, or [B].

    Raises:
        ValueError: the shapes do not fit, or ``weight`` or a backend is given for [B, N, C].

    Source: TPT (Shu et al., NeurIPS 2022), equation 3.
    """
    if isinstance(logits, Tensor) and logits.ndim == 3:
        checks.logits_shape(_rows(logits, 2), rows=1)
        if weight is not None or backend not in (None, "reference"):
            raise ValueError("weight, backend: needed logits [N, C] of one sample with them")
        return entropies.marginal_entropy(logits)
    return balance_entropy(logits, weight=weight, backend=backend)


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
    compute = _backend("adaptation_head", backend)
    checks.logits_shape(logits, rows=1)
    checks.k_and_eps(logits, k, eps)
    checks.one_of("balance", balance, checks.FORMS)
    checks.sample_weight(logits, weight)
    weights = float(entropy_weight), float(balance_weight)
    options = balance == "softmax-sum", float(eps), weight
    return compute(logits, int(k), *weights, *options)


def total_variation(maps: Tensor, *, backend: str | None = None) -> Tensor:
    """Anisotropic total variation of each map: maps [..., H, W] -> [...].

    sum |x[i+1, j] - x[i, j]| + sum |x[i, j+1] - x[i, j]|; a map of one pixel has 0. It grows with
    the resolution: the same map upsampled s times has about s times the variation. The gradient
    of equal neighbours is 0.

    Source: A-TPT, TV of attention maps.
    """
    compute = _backend("total_variation", backend)
    rows = _rows(maps, 3)
    checks.map_shape(rows)
    return compute(rows).view(maps.shape[:-2])


def reliability_weights(
    tv: Tensor, temperature: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """Weights of views by the total variation of their attention maps: softmax(-tv / temperature).

    Args:
        tv: [..., N].
        temperature: above 0, in units of tv.

    Returns:
        [..., N], summing to 1 over the views; smooth maps weigh most.

    Source: A-TPT (weights of its ensemble; temperature 1 in the paper).
    """
    compute = _backend("reliability_weights", backend)
    rows = _rows(tv, 1)
    checks.floating("tv", rows, 1, "[maps]")
    temperature = checks.temperature_of(temperature)
    return compute(tv, temperature)


def reliability_ensemble(
    maps: Tensor, logits: Tensor, temperature: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of several views, averaged by the reliability of their attention maps.

    Args:
        maps: [N, H, W], N at least 1.
        logits: [N, C].
        temperature: of ``reliability_weights``.

    Returns:
        (probability [C], tv [N], weights [N]): probability = sum of weights * softmax(logits).
        Not differentiable: A-TPT predicts with it and never trains through it. A loss is made of
        ``total_variation``, ``reliability_weights`` and the logits.

    Source: A-TPT, the TV-weighted ensemble of probabilities.
    """
    compute = _backend("reliability_ensemble", backend)
    checks.maps_and_logits(maps, logits)
    temperature = checks.temperature_of(temperature)
    return compute(maps, logits, temperature)


def flat_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str | None = None
) -> Tensor:
    """K * softmax over all K x K scores of a head at once, times v: RAda's attention over classes.

    Rows do not sum to 1 each, all together do to K. No K x K matrix is held.

    Args:
        q: [B, H, K, d], or [1, H, K, d] where the batch shares its queries.
        k, v: [B, H, K, d].
        scale: factor of q·k, d ** -0.5 unless given.

    Returns:
        [B, H, K, d] in the type of v.

    Raises:
        ValueError, TypeError: shapes, types or devices do not fit.

    Source: Chen et al., "One Last Attention for Your Vision-Language Model", ICCV 2025 (its
    official code); the form without K x K matrices is ours.
    """
    compute = _backend("flat_attention", backend)
    if scale is None and isinstance(k, Tensor) and k.ndim == 4:
        scale = max(1, k.shape[-1]) ** -0.5
    scale = checks.flat(q, k, v, 1.0 if scale is None else scale)
    return compute(q, k, v, scale)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Sequence[int],
    heads: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of sequences that all begin with the same tokens.

    The sequences' tokens are packed, one sequence after the other; the tokens that all begin with
    are there once, as keys and values. Every token sees these, and its sequence up to itself.

    The kernels are made for short sequences: they pad none to the longest, and hold no mask and no
    copies of the prefix. PyTorch's calls, which serve where no kernel does, pad. Every call lays
    the sequences out from ``lengths``, on the host.

    Args:
        q: [B, S, H d], queries of all packed tokens, or [B, C, H d], of every sequence's last one.
        k, v: [B, S, H d].
        prefix_k, prefix_v: [B, P, H d], of the P tokens that all begin with; 0 are allowed.
        lengths: tokens of each of the C sequences, S in all.
        heads: H.
        scale: factor of q·k, d ** -0.5 unless given.

    Returns:
        [B, S, H d] or [B, C, H d], in the type of q.

    Raises:
        ValueError, TypeError: shapes, types or devices do not fit.
    """
    compute = _backend("shared_prefix_attention", backend)
    lengths = checks.integers("lengths", lengths)
    scale = checks.shared_prefix(q, k, v, prefix_k, prefix_v, lengths, heads, scale)
    layout = layout_of(lengths, k.device)
    tensors = q, k, v, prefix_k, prefix_v
    return compute(*tensors, *layout, heads, scale)


def __dir__() -> list[str]:
    return sorted(__all__)

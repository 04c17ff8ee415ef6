"""What methods take from clean source data: statistics and Fisher weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .. import functional as F
from ..engine.precision import Precision, resolve, working_copy
from ..engine.record import model_digest
from ..engine.step import environment, prepare
from ..engine.streaming import as_inputs
from ..families import FusionFamily, recognise
from ..methods import EATA
from ..models.specified.spec import ModelSpec
from ..protocols import FusionModel, Promptable
from ..source_stats import SourceStats


def _samples(
    family: FusionFamily, model: FusionModel, loader: Iterable, n: int, precision: Precision
) -> Iterator[tuple[Tensor, ...]]:
    """Checked batches of a loader until n samples, the last cut to fit."""
    seen = 0
    for batch in loader:
        inputs = prepare(model, as_inputs(batch), precision.master, True)
        if not seen:
            family.verify(inputs)
        inputs = tuple(x[: n - seen] for x in inputs)
        seen += len(inputs[0])
        yield inputs
        if seen >= n:
            return
    if not seen:
        raise ValueError("loader yielded no batch; needed at least one sample")


def _setup(
    model: nn.Module, n: int, spec: ModelSpec | None
) -> tuple[FusionFamily, torch.device, Precision]:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r}: needed a positive integer")
    family = recognise(model, spec)
    if not isinstance(family, FusionFamily):
        raise TypeError(f"{family.name} is no fusion model, which is what is collected of here")
    parameter = next(family.model.parameters())
    name = "fp64" if parameter.dtype == torch.float64 else "fp32"
    return family, parameter.device, resolve(name, parameter.device, parameter.dtype)


def collect_stats(
    model: nn.Module, loader: Iterable, n: int = 32, *, spec: ModelSpec | None = None
) -> SourceStats:
    """Source statistics of a model over the first ``n`` samples of a loader of clean data.

    Args:
        model: as for ``fasttta.adapt``; it is not changed.
        loader: yields batches as tuples of the model's inputs, without labels.
        n: samples wanted; fewer where the loader ends before.
        spec: as for ``fasttta.adapt``.

    Returns:
        ``SourceStats``: ``scores`` and ``scores_per_head``: mean over samples of the score means,
        and the root of the mean over samples of the (unbiased) score variances. Of a CAV-MAE also
        ``audio``, ``video`` and ``joint``: moments over samples of pooled features, from two
        samples on.

    Raises:
        ValueError, TypeError: n is not positive, the loader is empty or a batch cannot be used.
    """
    family, device, precision = _setup(model, n, spec)
    with torch.inference_mode(False):
        working, _ = working_copy(family.model, set(), precision)
    seen = 0
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    moments_of: dict[str, _Moments] = {}
    layered = working if isinstance(working, Promptable) else None
    if layered:
        shapes = layered.feature_shapes()
        bare = layered.prompted(
            {m: torch.zeros(shapes[m][0], 0, shapes[m][1], dtype=precision.master, device=device)
             for m in working.input_names}
        )  # fmt: skip
    for inputs in _samples(family, working, loader, n, precision):
        with environment(device, precision, grad=False):
            if layered:
                tokens, features = bare.layers(*inputs)
                joint, (q, k, scale) = layered.pool(tokens)
                named = zip(working.input_names, features, strict=True)
                for name, x in (*named, ("joint", joint.unsqueeze(1))):
                    moments_of.setdefault(name, _Moments()).add(x)
            else:
                _, (q, k, scale) = working.fuse_attention(working.encode(*inputs))
            for heads in ("mean", "each"):
                moments = F.score_moments(q, k, working.spans, scale, heads)
                mean = moments.mean.diagonal(dim1=-2, dim2=-1).sum(dim=0)
                variance = moments.std.square().diagonal(dim1=-2, dim2=-1).sum(dim=0)
                if before := sums.get(heads):
                    variance, mean = before[0] + variance, before[1] + mean
                sums[heads] = variance, mean
        seen += len(inputs[0])
    std_mean = {heads: ((v / seen).sqrt(), m / seen) for heads, (v, m) in sums.items()}
    pooled = {name: m.std_mean(precision.master) for name, m in moments_of.items() if seen > 1}
    return SourceStats(
        scores=std_mean["mean"],
        scores_per_head=std_mean["each"],
        audio=pooled.get("audio"),
        video=pooled.get("video"),
        joint=pooled.get("joint"),
        n=seen,
        model=model_digest(family.model),
    )


class _Moments:
    """Mean and spread over samples that come in batches, in float64 (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """x: [B, ...]."""
        x = x.double()
        step = x.mean(dim=0) - self.mean
        total = self.n + len(x)
        within = (x - x.mean(dim=0)).square().sum(dim=0)
        self.squares = self.squares + within + step.square() * (self.n * len(x) / total)
        self.mean, self.n = self.mean + step * (len(x) / total), total

    def std_mean(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (self.squares / (self.n - 1)).sqrt().to(dtype), self.mean.to(dtype)


def collect_fisher(
    model: nn.Module, loader: Iterable, n: int = 2000, *, spec: ModelSpec | None = None
) -> dict[str, Tensor]:
    """Diagonal Fisher information of the LayerNorms that EATA tunes, from clean unlabelled data.

    The mean over batches of the squared gradient of the batch's mean cross-entropy with the model's
    predictions as labels. It depends on the batch size, as in the official code, which uses 64.

    Args:
        model: as for ``fasttta.adapt``; it is not changed.
        loader: yields batches as tuples of the model's inputs, without labels.
        n: samples wanted; fewer where the loader ends before. The last batch is cut to fit.
        spec: as for ``fasttta.adapt``.

    Returns:
        Weights by tuned name, for ``fasttta.adapt(model, "eata", fisher=...)``.

    Raises:
        ValueError, TypeError: n is not positive, the loader is empty or a batch cannot be used.

    Source: Niu et al., ICML 2022, equation 9 (pseudo-labels in place of labels).
    """
    (family, device, precision), method = _setup(model, n, spec), EATA()
    names = {name: slot.parameter for name, slot in method.tuned(family.model).items()}
    with torch.inference_mode(False):
        working, leaves = working_copy(family.model, set(names.values()), precision)
    sums: dict[str, Tensor] = {}
    batches = 0
    for inputs in _samples(family, working, loader, n, precision):
        with environment(device, precision, grad=True):
            logits = method.logits(working, inputs)
            loss = nnf.cross_entropy(logits, logits.detach().argmax(dim=1))
            grads = torch.autograd.grad(
                loss, [leaves[x] for x in names.values()], allow_unused=True, materialize_grads=True
            )
            for name, grad in zip(names, grads, strict=True):
                sums[name] = sums[name] + grad.square() if name in sums else grad.square()
        batches += 1
    with torch.inference_mode(False):
        return {name: total / batches for name, total in sums.items()}

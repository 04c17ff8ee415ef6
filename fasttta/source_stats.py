"""Statistics of source data that a method may compare a shifted stream with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import functional as F
from .engine.inputs import as_inputs, prepare
from .engine.precision import environment, resolve
from .engine.state import working_copy
from .families import recognise


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """Means over source samples, in the order (std, mean) of the official BriMPR files.

    Args:
        scores: standard deviation and mean [M] of the raw self-attention scores of each modality,
            of the head-mean of the scores.
        scores_per_head: the same [H, M] of every head.
        n: samples they were taken over.

    Raises:
        ValueError: wrong shapes, non-finite values or a standard deviation that is not positive.
    """

    scores: tuple[Tensor, Tensor]
    scores_per_head: tuple[Tensor, Tensor]
    n: int

    def __post_init__(self) -> None:
        for name, rank, layout in (("scores", 1, "[M]"), ("scores_per_head", 2, "[H, M]")):
            std, mean = getattr(self, name)
            if std.ndim != rank or std.shape != mean.shape:
                raise ValueError(
                    f"{name} must be (std, mean), each {layout}, found {list(std.shape)} and "
                    f"{list(mean.shape)}"
                )
            if not (torch.isfinite(std).all() and torch.isfinite(mean).all() and (std > 0).all()):
                raise ValueError(f"{name} must be finite with std above 0")
        if self.scores[0].shape[-1] != self.scores_per_head[0].shape[-1]:
            raise ValueError("scores and scores_per_head are of different modality counts")

    def self_scores(self, heads: str) -> tuple[Tensor, Tensor]:
        """(std, mean) for ABPEM's ``heads`` option."""
        return self.scores_per_head if heads == "each" else self.scores

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        tensors = {}
        for name in ("scores", "scores_per_head"):
            for part, x in zip(("std", "mean"), getattr(self, name), strict=True):
                tensors[f"{name}.{part}"] = x.detach().cpu().contiguous()
        save_file(tensors, path, metadata={"n": str(self.n)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> SourceStats:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not os.path.exists(path):
            raise FileNotFoundError(f"no source statistics at {os.fspath(path)!r}")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                n = int((file.metadata() or {})["n"])
            parts = {
                name: (tensors[f"{name}.std"], tensors[f"{name}.mean"])
                for name in ("scores", "scores_per_head")
            }
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{os.fspath(path)!r} holds no source statistics: {error}") from error
        return cls(**parts, n=n)


def collect_stats(model: nn.Module, loader: Iterable, n: int = 32) -> SourceStats:
    """Source statistics of a model over the first ``n`` samples of a loader of clean data.

    Args:
        model: as for ``fasttta.adapt``; it is not changed.
        loader: yields batches as tuples of the model's inputs, without labels.
        n: samples wanted; fewer where the loader ends before.

    Returns:
        ``SourceStats``: mean over samples of the score means, and the root of the mean over
        samples of the (unbiased) score variances.

    Raises:
        ValueError, TypeError: n is not positive, the loader is empty or a batch cannot be used.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r}: needed a positive integer")
    fusion = recognise(model)
    parameter = next(fusion.parameters())
    precision = resolve(
        "fp64" if parameter.dtype == torch.float64 else "fp32", parameter.device, parameter.dtype
    )
    working, _ = working_copy(fusion, set(), precision)
    seen, sums = 0, {}
    with environment(parameter.device, precision, grad=False):
        for batch in loader:
            inputs = prepare(working, as_inputs(batch), precision.master, True)
            inputs = tuple(x[: n - seen] for x in inputs)
            _, (q, k, scale) = working.fuse_attention(working.encode(*inputs))
            for heads in ("mean", "each"):
                moments = F.score_moments(q, k, working.spans, scale, heads)
                mean = moments.mean.diagonal(dim1=-2, dim2=-1).sum(dim=0)
                variance = moments.std.square().diagonal(dim1=-2, dim2=-1).sum(dim=0)
                before = sums.get(heads, (0, 0))
                sums[heads] = before[0] + variance, before[1] + mean
            seen += len(inputs[0])
            if seen >= n:
                break
    if not seen:
        raise ValueError("loader yielded no batch; needed at least one sample")
    std_mean = {heads: ((v / seen).sqrt(), m / seen) for heads, (v, m) in sums.items()}
    return SourceStats(scores=std_mean["mean"], scores_per_head=std_mean["each"], n=seen)

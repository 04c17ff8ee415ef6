"""Statistics of source data, and the files that hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import defect, read_file, regular_file

# name, dimensions, layout, whether the standard deviation must be above 0
_STATISTICS = (
    ("scores", 1, "[M]", True),
    ("scores_per_head", 2, "[H, M]", True),
    ("audio", 2, "[blocks, D]", False),
    ("video", 2, "[blocks, D]", False),
    ("joint", 2, "[1, D]", False),
)


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """Statistics of source data, each a pair (std, mean), the order of the official BriMPR files.

    ``fasttta.collect_stats`` makes them. The docstring of a method says which of them it needs.

    Args:
        scores: [M] each: raw self-attention scores of each modality, averaged over heads first.
        scores_per_head: [H, M] each: the same of every head.
        audio, video: [blocks, D] each: over samples (n - 1), of the mean over tokens behind each
            encoder block, under the LayerNorm that the next block begins with.
        joint: [1, D] each: the same of the feature that the classifier reads.
        n: number of samples that they were computed from; None: unknown.
        model: digest of the weights of the model that they belong to. With it, ``adapt`` refuses
            them for any other model. None: unknown.

    Raises:
        TypeError: an entry is not a pair of floating point tensors; ``n`` is not an int; ``model``
            is not a string.
        ValueError: wrong shapes; non-finite values; a standard deviation that is negative, or 0 for
            scores; ``n`` is not positive.
    """

    scores: tuple[Tensor, Tensor] | None = None
    scores_per_head: tuple[Tensor, Tensor] | None = None
    audio: tuple[Tensor, Tensor] | None = None
    video: tuple[Tensor, Tensor] | None = None
    joint: tuple[Tensor, Tensor] | None = None
    n: int | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.n is not None and (isinstance(self.n, bool) or not isinstance(self.n, int)):
            raise TypeError(f"n must be an int, found {type(self.n).__name__}")
        if self.n is not None and self.n < 1:
            raise ValueError(f"n={self.n}: needed a positive integer")
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model must be text, found {type(self.model).__name__}")
        for name, rank, layout, positive in _STATISTICS:
            if getattr(self, name) is None:
                continue
            pair = getattr(self, name)
            if not (
                isinstance(pair, (tuple, list))
                and len(pair) == 2
                and all(isinstance(x, Tensor) and x.is_floating_point() for x in pair)
            ):
                raise TypeError(f"{name} must be a pair of tensors (std, mean), floating point")
            for part, x in zip(("std", "mean"), pair, strict=True):
                if kind := defect(x):
                    raise ValueError(f"{name}: {part} is {kind}, needed a plain tensor")
            std, mean = pair
            if std.ndim != rank or std.shape != mean.shape:
                raise ValueError(
                    f"{name} must be (std, mean), each {layout}, found {list(std.shape)} and "
                    f"{list(mean.shape)}"
                )
            least = (std > 0) if positive else (std >= 0)
            if not (torch.isfinite(std).all() and torch.isfinite(mean).all() and least.all()):
                bound = "above 0" if positive else "at least 0"
                raise ValueError(f"{name} must be finite with std {bound}")

    def self_scores(self, heads: str) -> tuple[Tensor, Tensor]:
        """Returns (std, mean) of the self-attention scores, as ABPEM needs them.

        Args:
            heads: ``"mean"``: [M] each, of scores averaged over heads; ``"each"``: [H, M] each.

        Raises:
            ValueError: these statistics were not collected.
        """
        name = "scores_per_head" if heads == "each" else "scores"
        if getattr(self, name) is None:
            raise ValueError(f"source_stats have no {name}; collect them with collect_stats")
        return getattr(self, name)

    def features(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Returns ``"<name>.std"`` and ``"<name>.mean"`` of pooled features, as BriMPR needs them.

        Args:
            shapes: shape [blocks, D] of each feature by name, as ``Promptable.feature_shapes``
                returns them.

        Raises:
            ValueError: one was not collected, or has another shape.
        """
        moments: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            pair = getattr(self, name, None)
            if pair is None:
                raise ValueError(f"source_stats have no {name}; collect them with collect_stats")
            if tuple(pair[0].shape) != shape:
                raise ValueError(
                    f"source_stats are of another model: {name} {list(pair[0].shape)}, needed "
                    f"{list(shape)} (encoder blocks, width)"
                )
            moments |= {f"{name}.std": pair[0], f"{name}.mean": pair[1]}
        return moments

    def save(self, path: str | os.PathLike) -> None:
        """Writes the statistics into one safetensors file, ``path``."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{part}": x.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, *_ in _STATISTICS
            if getattr(self, name) is not None
            for part, x in zip(("std", "mean"), getattr(self, name), strict=True)
        }
        save_file(tensors, path, metadata={"n": json.dumps(self.n), "model": self.model or ""})

    @classmethod
    def from_official(cls, path: str | os.PathLike) -> SourceStats:
        """Reads a statistics file of the official BriMPR code (``src_stat_ks50.pth``): a pickled
        3-tuple (audio, video, joint) of pairs (std, mean).

        Only tensors and tuples are unpickled. Tensors that were saved on a GPU are loaded to the
        CPU. The file does not say which weights it belongs to, so only shapes can be checked later.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
            TypeError: ``path`` is not a path.
        """
        content = read_file(path, "source statistics")
        pairs = isinstance(content, (tuple, list)) and len(content) == 3
        if not pairs or not all(isinstance(x, (tuple, list)) and len(x) == 2 for x in content):
            raise ValueError(
                f"{os.fspath(path)!r} holds no source statistics: needed three pairs (std, mean), "
                f"found {type(content).__name__}"
            )
        try:
            audio, video, joint = map(tuple, content)
            return cls(audio=audio, video=video, joint=joint)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} holds no source statistics: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> SourceStats:
        """Reads a file that ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        name = regular_file(path, "source statistics")
        try:
            with safe_open(name, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = file.metadata() or {}
                n = json.loads(about.get("n", "null"))
            parts = {
                part: (tensors[f"{part}.std"], tensors[f"{part}.mean"])
                for part, *_ in _STATISTICS
                if f"{part}.std" in tensors or f"{part}.mean" in tensors
            }
            if not parts:
                raise ValueError(f"found {', '.join(list(tensors)[:4]) or 'nothing'}")
            return cls(**parts, n=n, model=about.get("model") or None)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError,
                RecursionError) as error:  # fmt: skip
            raise ValueError(f"{name!r} holds no source statistics: {error}") from error

"""What a method may ask of a model, and what the two exchange."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Slot(NamedTuple):
    """Where a tuned tensor lies: a parameter of the module, or rows [start, stop) of one."""

    parameter: str
    rows: tuple[int, int] | None = None


@runtime_checkable
class FusionModel(Protocol):
    """A model of several modalities that is cut into ``encode`` (frozen for some methods) and
    ``fuse``, whose attention runs over all modalities' tokens."""

    num_classes: int | None  #: None: not known before the first batch
    num_heads: int

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts of the fused sequence, one a modality."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, for messages."""

    def check_inputs(self, *inputs: Tensor) -> None:
        """Raises ValueError or TypeError, naming the input, if a batch cannot be used."""

    def encode(self, *inputs: Tensor) -> Tensor:
        """Inputs -> tokens [B, T, D] (or whatever else, batch first, ``fuse`` needs)."""

    def fuse(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> logits [B, C]."""

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens -> logits [B, C] and (q [B,H,T,d], k [B,H,T,d], scale) of the fusion attention."""

    def tunable(self, group: str) -> dict[str, Slot]:
        """What can be tuned under a group's name ("norm", "encoder_norm", "fusion_qkv")."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in the weights' own), converting frozen weights."""


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Images and class prompts in one space; ``prompts`` is the text tower on a class list, whose
    first tokens after SOT (``initial`` [n, D]) methods tune."""

    logit_scale: Tensor  #: logarithm of the factor of the cosine similarities
    map_kind: str  #: where attention maps come from, "rollout" or "grad-cam"

    @property
    def resolution(self) -> int:
        """R: images are [N, 3, R, R] with pixels in [0, 1]."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, 3, R, R] -> features [N, E], not normalised."""

    def prompts(self, ids: Tensor, length: int = 0) -> Any:
        """Token ids [C, L] -> features, and their derivative, as a function of the prompt."""

    def attention_maps(self, pixels: Tensor, text: Tensor, rollout: str = "code") -> Any:
        """Attention ``grid`` [N, G, G] of every image to its top class of text [C, E]."""


_STATISTICS = (("scores", 1, "[M]"), ("scores_per_head", 2, "[H, M]"))


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """Statistics of source data, each a pair (std, mean), the order of the official BriMPR files.

    Made by ``fasttta.collect_stats``. A method says which of them it needs.

    Args:
        scores: [M] each: raw self-attention scores of each modality, averaged over heads first.
        scores_per_head: [H, M] each: the same of every head.
        n: samples they were taken over, where that is known.

    Raises:
        ValueError: wrong shapes, non-finite values or a standard deviation that is not positive.
    """

    scores: tuple[Tensor, Tensor] | None = None
    scores_per_head: tuple[Tensor, Tensor] | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        for name, rank, layout in _STATISTICS:
            if getattr(self, name) is None:
                continue
            std, mean = getattr(self, name)
            if not (isinstance(std, Tensor) and isinstance(mean, Tensor)):
                raise TypeError(f"{name} must be a pair of tensors (std, mean)")
            if std.ndim != rank or std.shape != mean.shape:
                raise ValueError(
                    f"{name} must be (std, mean), each {layout}, found {list(std.shape)} and "
                    f"{list(mean.shape)}"
                )
            if not (torch.isfinite(std).all() and torch.isfinite(mean).all() and (std > 0).all()):
                raise ValueError(f"{name} must be finite with std above 0")

    def self_scores(self, heads: str) -> tuple[Tensor, Tensor]:
        """(std, mean) for ABPEM's ``heads`` option.

        Raises:
            ValueError: these statistics were not collected.
        """
        name = "scores_per_head" if heads == "each" else "scores"
        if getattr(self, name) is None:
            raise ValueError(f"source_stats have no {name}; collect them with collect_stats")
        return getattr(self, name)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{part}": x.detach().cpu().contiguous()
            for name, _, _ in _STATISTICS
            if getattr(self, name) is not None
            for part, x in zip(("std", "mean"), getattr(self, name), strict=True)
        }
        save_file(tensors, path, metadata={"n": json.dumps(self.n)})

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
                n = json.loads((file.metadata() or {})["n"])
            parts = {
                name: (tensors[f"{name}.std"], tensors[f"{name}.mean"])
                for name, _, _ in _STATISTICS
                if f"{name}.std" in tensors
            }
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{os.fspath(path)!r} holds no source statistics: {error}") from error
        return cls(**parts, n=n)

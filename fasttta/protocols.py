"""What a method may ask of a model, and what the two exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .files import defect, read_file, regular_file


class Slot(NamedTuple):
    """Where a tuned tensor lies: a parameter of the module, or rows [start, stop) of one."""

    parameter: str
    rows: tuple[int, int] | None = None


@runtime_checkable
class FusionModel(Protocol):
    """A model of several modalities that is cut into ``encode`` (frozen for some methods) and
    ``fuse``, whose attention runs over all modalities' tokens."""

    @property
    def num_classes(self) -> int | None:
        """None: not known before the first batch."""

    @property
    def num_heads(self) -> int:
        """Of the fusion's attention."""

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts of the fused sequence, one a modality."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, for messages."""

    def check_inputs(self, *inputs: Any, **named: Any) -> None:
        """Raises ValueError or TypeError, naming the input, if a batch cannot be used."""

    def encode(self, *inputs: Any, **named: Any) -> Tensor:
        """Inputs -> tokens [B, T, D] (or whatever else, batch first, ``fuse`` needs)."""

    def fuse(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> logits [B, C]."""

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens -> logits [B, C] and (q [B,H,T,d], k [B,H,T,d], scale) of the fusion attention."""

    def tunable(self, group: str) -> dict[str, Slot]:
        """What can be tuned under a group's name ("norm", "encoder_norm", "fusion_qkv"; of a
        prompted model "prompts")."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in the weights' own), converting frozen weights."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of every ``nn.Module``."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every ``nn.Module``."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """As of every ``nn.Module``."""

    def state_dict(self) -> dict[str, Any]:
        """As of every ``nn.Module``."""


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Images and class prompts in one space; ``prompts`` is the text tower on a class list, whose
    first tokens after SOT (``initial`` [n, D]) methods tune."""

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor of the cosine similarities."""

    @property
    def map_kind(self) -> str:
        """Where attention maps come from, "rollout" or "grad-cam"."""

    @property
    def resolution(self) -> int:
        """R: images are [N, 3, R, R] with pixels in [0, 1]."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[N, 3, R, R] -> features [N, E], not normalised."""

    def prompts(self, ids: Tensor, length: int = 0) -> Any:
        """Token ids [C, L] -> features, and their derivative, as a function of the prompt."""

    def check_maps(self) -> None:
        """Raises ValueError where ``attention_maps`` would, whatever the image."""

    def attention_maps(self, pixels: Tensor, text: Tensor, rollout: str = "code") -> Any:
        """Attention ``grid`` [N, G, G] of every image to its top class of text [C, E]."""


class Streams(NamedTuple):
    """One batch as BriMPR sees it: every modality whole, with tokens masked away, and alone.

    The latter two are computed when their loss is asked for; what comes back of them is without
    gradient, which is the loss's alone.
    """

    logits: Tensor  # [B, C] of all modalities whole, without gradient
    joint: Tensor  # [B, D], the feature those logits are read from, without gradient
    features: tuple[Tensor, ...]  # a modality: [B, blocks, D], pooled behind each encoder block
    #: (modality, loss) -> 0-d, and logits [B, C] with that modality masked and the others whole;
    #: loss(logits [b, C], rows of the batch) is summed over portions of the batch
    masked: Callable[[int, Callable[[Tensor, slice], Tensor]], tuple[Tensor, Tensor]]
    #: loss -> 0-d, and [B, D] of each modality alone through the fusion blocks, which it takes
    alone: Callable[[Callable[[list[Tensor]], Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


@runtime_checkable
class Prompted(FusionModel, Protocol):
    """A fusion model with prompts."""

    def layers(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Encoder outputs [B, T, D], and of each modality [B, blocks, D], pooled behind each
        block."""


@runtime_checkable
class Promptable(Protocol):
    """A fusion model whose encoders take prompts, as BriMPR tunes them."""

    tuned_prompts: bool  #: whether ``start_prompts`` were tuned and count for predictions

    def start_prompts(self) -> dict[str, Tensor]:
        """The prompts [blocks, n, D] that the model came with, by modality; none: empty."""

    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes [blocks, D] of the pooled features by modality, and [1, D] of ``"joint"``."""

    def pool(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens behind the fusion blocks -> what the classifier reads [B, D], and (q, k, scale) of
        the fusion attention."""

    def prompted(self, prompts: Mapping[str, Tensor]) -> Prompted:
        """The model with prompts [blocks, n, D] a modality; besides what a ``FusionModel`` has, it
        has ``streams(*inputs, *keep, ...) -> Streams``."""


# name, dimensions, layout, whether a standard deviation of 0 makes no sense
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

    Made by ``fasttta.collect_stats``. A method says which of them it needs.

    Args:
        scores: [M] each: raw self-attention scores of each modality, averaged over heads first.
        scores_per_head: [H, M] each: the same of every head.
        audio, video: [blocks, D] each: over samples (n - 1), of the mean over tokens behind each
            encoder block, under the LayerNorm that the next block begins with.
        joint: [1, D] each: the same of the feature that the classifier reads.
        n: samples they were taken over, where that is known.
        model: digest of the weights they are of; with it, other models refuse them.

    Raises:
        TypeError: no pairs of floating point tensors; ``n`` is no int, ``model`` no text.
        ValueError: wrong shapes, non-finite values, a standard deviation that is negative or (of
            scores) 0; ``n`` is not positive.
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
        """(std, mean) for ABPEM's ``heads`` option.

        Raises:
            ValueError: these statistics were not collected.
        """
        name = "scores_per_head" if heads == "each" else "scores"
        if getattr(self, name) is None:
            raise ValueError(f"source_stats have no {name}; collect them with collect_stats")
        return getattr(self, name)

    def features(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """``"<name>.std"`` and ``"<name>.mean"`` of the features that a model has, for BriMPR.

        Raises:
            ValueError: one was not collected, or is of a model of another size.
        """
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            pair = getattr(self, name, None)
            if pair is None:
                raise ValueError(f"source_stats have no {name}; collect them with collect_stats")
            if tuple(pair[0].shape) != shape:
                raise ValueError(
                    f"source_stats are of another model: {name} {list(pair[0].shape)}, needed "
                    f"{list(shape)} (encoder blocks, width)"
                )
            found |= {f"{name}.std": pair[0], f"{name}.mean": pair[1]}
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file."""
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

        Nothing but tensors and tuples is unpickled, and tensors saved on a GPU are taken to the
        CPU. Which weights they are of is not in the file: only shapes can be checked later.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds something else.
            TypeError: it is no path.
        """
        found = read_file(path, "source statistics")
        pairs = isinstance(found, (tuple, list)) and len(found) == 3
        if not pairs or not all(isinstance(x, (tuple, list)) and len(x) == 2 for x in found):
            raise ValueError(
                f"{os.fspath(path)!r} holds no source statistics: needed three pairs (std, mean), "
                f"found {type(found).__name__}"
            )
        try:
            audio, video, joint = map(tuple, found)
            return cls(audio=audio, video=video, joint=joint)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} holds no source statistics: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> SourceStats:
        """Reads what ``save`` wrote.

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

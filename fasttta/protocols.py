"""What a method may ask of a model, and what the two exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


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

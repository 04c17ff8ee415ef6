"""What methods and steps may ask of a model, and what the two exchange.

Every attribute that the engine, the methods, ``adapt`` or ``collect_stats`` ask a model for is
declared here. ``FusionDefaults`` has defaults for those that few models need to define.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """Where a tuned tensor lies: a parameter of the module, or rows [start, stop) of one."""

    parameter: str
    rows: tuple[int, int] | None = None


@runtime_checkable
class FusionModel(Protocol):
    """A model that is cut into ``encode`` (frozen for some methods) and ``fuse``, whose attention
    runs over the tokens of all modalities."""

    @property
    def num_classes(self) -> int | None:
        """C, the number of classes; None: not known before the first batch."""

    @property
    def num_heads(self) -> int:
        """H, the number of heads of the fusion attention; 0: there is no such attention."""

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts of the fused sequence, one per modality; empty: there are no tokens."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in their order, for messages."""

    @property
    def required_inputs(self) -> int:
        """How many of the inputs a call needs, at most ``len(input_names)``."""

    def identity(self) -> str:
        """What a saved state depends on besides the weights, as text; empty: on nothing else."""

    def check_inputs(self, *inputs: Any, **named: Any) -> None:
        """Raises ValueError or TypeError, naming the input, if a batch cannot be used."""

    def encode(self, *inputs: Any, **named: Any) -> Tensor:
        """Inputs -> tokens [B, T, D] (or whatever else ``fuse`` needs, batch first)."""

    def pieces(self, tokens: Tensor) -> Sequence[Tensor]:
        """Tokens [B, T, D] -> portions [b, T, D] of the batch, in order, that are best fused one
        after another."""

    def fuse(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> logits [B, C]."""

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens [B, T, D] -> logits [B, C] and (q [B, H, T, d], k [B, H, T, d], scale) of the
        fusion attention."""

    def tunable(self, group: str) -> dict[str, Slot]:
        """What can be tuned under a group's name, by the name that ``Adapted.tuned`` gives it.

        Groups are ``"norm"``, ``"encoder_norm"`` and ``"fusion_qkv"``; ``"prompts"`` of a prompted
        model; ``"head"`` and ``"head_out"`` of a model with a rational head.

        Raises:
            ValueError: the model has nothing of this kind.
        """

    def source_value(self, start: Tensor) -> Tensor:
        """What the source model has in place of a tuned tensor that starts at ``start``."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in that of the weights), converting frozen weights."""

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


class FusionDefaults:
    """Base class with the attributes of a ``FusionModel`` that few models need to define."""

    if TYPE_CHECKING:  # which the model itself defines

        @property
        def input_names(self) -> tuple[str, ...]:
            """Names of the inputs in their order."""

    @property
    def required_inputs(self) -> int:
        """All inputs are required."""
        return len(self.input_names)

    def identity(self) -> str:
        """A saved state depends on the weights alone."""
        return ""

    def pieces(self, tokens: Tensor) -> Sequence[Tensor]:
        """The batch is fused at once."""
        return (tokens,)

    def source_value(self, start: Tensor) -> Tensor:
        """The source model has the same tensor."""
        return start


@runtime_checkable
class ReturnsMore(Protocol):
    """A fusion model whose module may return more than logits (a tuple, a dict, a ModelOutput)."""

    #: what the module returned in each pass since this was set to []; None: nothing is recorded
    outputs: list[Any] | None

    @property
    def rich(self) -> bool:
        """Whether the module returns more than logits; False before the first batch."""

    def returned(self, logits: Tensor, number: int) -> Any:
        """What the module returned in pass ``number`` of ``outputs``, with ``logits`` [B, C] in
        place of its own."""


@runtime_checkable
class RationalModel(Protocol):
    """A model whose class scores a rational head can weigh, as RAda tunes it."""

    def rational(self, **options: Any) -> Any:
        """A ``FusionModel`` over the same weights with a rational head.

        Args:
            options: ``seed``, ``heads``, ``temperature`` and ``scale_multiplier`` of a fresh head.
        """

    def head_options(self) -> dict[str, Any]:
        """``heads``, ``temperature`` and ``scale_multiplier`` of the head that the model already
        has; empty: it has none."""


class Linearised(Protocol):
    """Class features at one prompt, and their derivative."""

    @property
    def features(self) -> Tensor:
        """[P, C, E], not normalised: features of C classes for each of P prompts."""

    @property
    def pullback(self) -> Callable[[Tensor], Tensor]:
        """Gradient with respect to features [P, C, E] -> gradient with respect to the prompts
        [P, n, D]."""


class ClassPrompts(Protocol):
    """The text tower on a list of classes, as a function of the prompt before the class names."""

    @property
    def initial(self) -> Tensor:
        """[n, D]: embeddings of the first n tokens after SOT, where tuning starts."""

    def features(self, prompt: Tensor | None = None) -> Tensor:
        """Prompts [P, n, D] (None: the initial one) -> class features [P, C, E], not normalised."""

    def linearise(self, prompt: Tensor | None = None) -> Linearised:
        """The same with the derivative."""


class Maps(Protocol):
    """Attention maps of images."""

    @property
    def grid(self) -> Any:
        """Tensor [N, G, G], from 0 to 1."""

    @property
    def features(self) -> Tensor:
        """[N, E]: what ``encode_image`` returns for the same images."""


@runtime_checkable
class VisionLanguageModel(Protocol):
    """A model that puts images and class prompts into one space."""

    @property
    def logit_scale(self) -> Tensor:
        """0-d: logarithm of the factor of the cosine similarities."""

    @property
    def map_kind(self) -> str:
        """How attention maps are made, ``"rollout"`` or ``"grad-cam"``."""

    @property
    def resolution(self) -> int:
        """R: images are [N, 3, R, R] with pixels in [0, 1]."""

    @property
    def context_length(self) -> int:
        """Tokens that the text tower takes."""

    def identity(self) -> str:
        """What a saved state depends on besides the weights, as text; empty: on nothing else."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] -> features [N, E], not normalised."""

    def prompts(self, ids: Tensor, length: int = 0) -> ClassPrompts:
        """Token ids [C, L] -> the classes' prompts, whose first ``length`` tokens after SOT can be
        tuned."""

    def check_maps(self) -> None:
        """Raises ValueError where ``attention_maps`` would, whatever the image."""

    def attention_maps(self, pixels: Tensor, text: Tensor, rollout: str = "code") -> Maps:
        """Attention of images [N, 3, R, R] to their top class of text [C, E]; ``rollout`` is an
        option of ``ATPT``."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in that of the weights)."""

    def state_dict(self) -> dict[str, Any]:
        """As of every ``nn.Module``."""


class Streams(NamedTuple):
    """One batch as BriMPR needs it: with all tokens, with tokens of one modality masked, and each
    modality alone.

    ``masked`` and ``alone`` run when they are called. Of what they return only the loss has a
    gradient.
    """

    logits: Tensor  # [B, C] from all tokens, without gradient
    joint: Tensor  # [B, D], the feature that the classifier reads, without gradient
    features: tuple[Tensor, ...]  # per modality [B, blocks, D], pooled after each encoder block
    #: (modality, loss) -> loss (0-d), and logits [B, C] with tokens of that modality masked.
    #: loss(logits [b, C], rows of the batch) is summed over portions of the batch
    masked: Callable[[int, Callable[[Tensor, slice], Tensor]], tuple[Tensor, Tensor]]
    #: loss -> loss (0-d), and per modality [B, D]: the modality alone through the fusion blocks.
    #: loss takes the list of these
    alone: Callable[[Callable[[list[Tensor]], Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


@runtime_checkable
class Prompted(FusionModel, Protocol):
    """A fusion model whose encoder blocks take prompts."""

    def layers(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Inputs -> encoder outputs [B, T, D], and per modality [B, blocks, D], pooled after each
        block."""

    def streams(self, *inputs: Tensor) -> Streams:
        """Inputs, and per modality the ids [B, K] of the tokens that are kept -> ``Streams``."""


@runtime_checkable
class Promptable(Protocol):
    """A fusion model whose encoder blocks can take prompts, as BriMPR tunes them."""

    tuned_prompts: bool  #: whether ``start_prompts`` were tuned and count for predictions

    def start_prompts(self) -> dict[str, Tensor]:
        """The prompts [blocks, n, D] that the model came with, by modality; empty: none."""

    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes [blocks, D] of the pooled features by modality, and [1, D] of ``"joint"``."""

    def pool(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens [B, T, D] -> what the classifier reads [B, D], and (q, k, scale) of the fusion
        attention."""

    def prompted(self, prompts: Mapping[str, Tensor]) -> Prompted:
        """The model over the same weights with prompts [blocks, n, D] per modality."""

"""What every adaptation method is: a frozen set of options and an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from ..protocols import FusionModel, Slot
from .contract import check_class, check_layout
from .options import AtLeast, Finite, OneOf, Positive, check_option, check_options, declared
from .window import joined, pieces


@dataclass
class Objective:
    """What one evaluation of a method's objective hands to the step."""

    losses: dict[str, Tensor]  # 0-d, unweighted, and "total"
    logits: Tensor  # [B, C] of the current batch
    n_used: Tensor | int  # samples that entered the loss
    stats: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)  # method state once the step succeeds
    trace: Mapping[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    apply: Tensor | float = 1.0  # 0: the method leaves this update out
    recover: Tensor | None = None  # 0-d bool, true: back to the start after this update
    passes: int = 1  # of the fusion, the last of which holds the current batch


def sample_weight(valid: Tensor) -> Tensor | None:
    """Weights [B] of a batch's samples in a mean; None: all alike."""
    return valid if valid.ndim else None


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options that every method has, and what a subclass must say.

    A subclass is a dataclass, ``@dataclass(frozen=True)``: its fields are the method's options. It
    has ``name``, the name that records and errors give it; ``group``, what of the model is tuned
    (``"norm"``, ``"encoder_norm"``, ``"fusion_qkv"``; None: nothing); ``frozen_encoder``, whether
    everything before the fusion is encoded once a batch, without gradient (then ``group`` must not
    lie in the encoders); ``lr``, an option, if it tunes; and ``objective``, which returns
    ``Objective(losses={"total": loss}, logits=logits, n_used=len(logits))``. Its ``state=`` is the
    ``state`` of the next batch, is saved, and starts as an empty dict.

    Args:
        steps: updates on each batch.
        score_at: which prediction is ``StepResult.logits``: ``"before"`` the update or
            ``"after"`` it, from a second forward pass. The default is the published protocol.
    """

    name: ClassVar[str]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: kinds of models that it adapts
    families: ClassVar[tuple[str, ...]] = ("fusion",)
    #: keywords of ``adapt`` besides the options: tensors that the method needs
    RESOURCES: ClassVar[tuple[str, ...]] = ()
    #: with several steps on a batch, each takes the method state that the one before it left
    carries_state: ClassVar[bool] = False
    #: what of the model is tuned ("norm", "encoder_norm", "fusion_qkv", "prompts"; None:
    #: nothing)
    group: ClassVar[str | None]
    #: everything before ``fuse`` is frozen: encoded once a batch, without autograd
    frozen_encoder: ClassVar[bool]

    steps: Annotated[int, AtLeast(1, most=10_000)] = 1
    score_at: Annotated[str | None, OneOf("before", "after")] = "before"

    if TYPE_CHECKING:  # a field of every subclass, which places it

        @property
        def lr(self) -> float | None: ...

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        """Refuses a method with a missing part when its class is made; ``class Base(Method,
        abstract=True)`` is a base of methods and may lack any.

        Raises:
            TypeError: a part is missing, or is of the wrong kind.
        """
        super().__init_subclass__(**kwargs)
        check_class(cls, Method, abstract)

    def __post_init__(self) -> None:
        check_options(self)
        if "lr" not in declared(type(self)) and (self.group is not None or hasattr(self, "lr")):
            # above a million the tuned tensors would not stay finite
            check_option("lr", self.lr, Finite(1e6) if self.group is None else Positive(1e6))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The method with published settings; the class docstring gives their source."""
        if name not in cls.PRESETS:
            known = ", ".join(map(repr, cls.PRESETS)) or "none"
            raise ValueError(f"{cls.__name__} has no preset {name!r}; known: {known}")
        return cls(**cls.PRESETS[name])

    @property
    def updates(self) -> bool:
        """Whether a step changes anything."""
        return self.group is not None

    @property
    def episodic(self) -> bool:
        """Whether every step begins at the start again, whatever the one before it learnt."""
        return False

    @property
    def window_batches(self) -> int:
        """Batches in the loss, the current one included."""
        return 1

    @property
    def balanced(self) -> bool:
        """Whether the loss has a class-balance term, which a single sample degenerates."""
        return False

    @property
    def single_sample(self) -> str | None:
        """What to warn of when a batch is one sample; None: nothing."""
        if not self.balanced:
            return None
        advice = "" if getattr(self, "window", 2) > 1 else ", or a window of past batches"
        return (
            f"{type(self).__name__} on a single sample: the balance term is the entropy of that "
            f"one prediction and works against the entropy term. Give larger batches{advice}"
        )

    def fitted(self, model: FusionModel) -> Method:
        """The method with the options that follow from the model's kind."""
        return self

    def extend(self, model: FusionModel, seed: int) -> FusionModel:
        """The model as this method runs it, where it needs more than the source model has (tensors
        that are new and tuned); frozen weights stay shared."""
        return model

    def draw(
        self, model: FusionModel, inputs: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """What a step draws at random for a batch; its objective finds it behind the inputs."""
        return ()

    def injected(
        self, model: FusionModel, inputs: tuple[Tensor, ...], keep: Any
    ) -> tuple[Tensor, ...]:
        """What a caller gives in place of ``draw``, checked.

        Raises:
            TypeError, ValueError: it cannot be used.
        """
        raise TypeError(f"keep: {type(self).__name__} masks no tokens; known to brimpr")

    def tuned(self, model: FusionModel) -> dict[str, Slot]:
        """Names of the tuned tensors and where they lie in the model."""
        return {} if self.group is None else model.tunable(self.group)

    def check_model(self, model: FusionModel) -> None:
        """Raises ValueError if the options do not fit the model."""
        if self.updates and model.num_classes == 1:
            raise ValueError(
                f"{type(self).__name__} learns from entropies of predictions, and of one class, "
                "logits [B, 1], they are 0 whatever the weights: needed at least 2 classes. "
                "(Scores of a regression have no class distribution; two logits, (0, x), make one "
                "of a binary score x.)"
            )

    def constants(self, model: FusionModel, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors fixed at the start, from what ``RESOURCES`` names; saved with the state."""
        return {}

    def check_constants(self, model: FusionModel, constants: Mapping[str, Tensor]) -> None:
        """Whether tensors from a file (floating point, finite) are what ``constants`` makes for
        this model. Methods with ``RESOURCES`` say more.

        Raises:
            ValueError: they are not.
        """
        if not self.RESOURCES:
            check_layout("constant", constants, self.constants(model, {}))

    def check_state(self, model: FusionModel, state: Mapping[str, Tensor]) -> None:
        """Whether a method state from a file (finite) is one that ``objective`` can go on with:
        by default, none yet, or what ``blank_state`` describes.

        Raises:
            ValueError: it is not.
        """
        blank = self.blank_state(torch.zeros(0), model.num_classes or 0)
        if blank and state:
            known = model.num_classes is not None
            check_layout("method", state, blank, shapes=known)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Adam (0.9, 0.999), no weight decay: what all published runs of this benchmark use."""
        parameters = list(parameters)
        cuda = parameters[0].is_cuda
        assert self.lr is not None  # settled by ``fitted``
        return torch.optim.Adam(parameters, lr=self.lr, fused=True, capturable=cuda)

    def features(self, model: FusionModel, inputs: tuple[Tensor, ...]) -> Any:
        """What the steps on one batch share: encoder outputs where these are frozen."""
        return model.encode(*inputs) if self.frozen_encoder else inputs

    def blank_state(self, features: Tensor, num_classes: int) -> dict[str, Tensor]:
        """The state before any batch as tensors of their final shape, for captured steps (a window
        excepted, for which the step has places of its own)."""
        return {}

    def logits(self, model: FusionModel, features: Any) -> Tensor:
        """Prediction [B, C] with the current weights."""
        if not self.frozen_encoder:
            return model.fuse(model.encode(*features))
        return joined([model.fuse(part) for part in pieces(model, features)])

    def score(self, model: FusionModel, features: Any) -> Tensor:
        """What a step that scores after its update predicts; for most methods the logits."""
        return self.logits(model, features)

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Losses of one batch, differentiable with respect to what is tuned.

        Args:
            features: what ``features`` returned for this batch.
            state: the method's state before this batch; never written to.
            constants: what ``constants`` returned.
            valid: 0-d float, 0 if the batch holds non-finite values (then the step skips the
                update on the device and this batch must not spoil later ones); or [B], 0 also for
                rows that only fill a batch up to the size that a step was captured with.
        """
        raise TypeError(f"{type(self).__name__} defines no objective")

    def after_update(
        self, state: dict[str, Tensor], finite: Tensor, before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The method's state for the next batch.

        Args:
            state: what the last objective returned as its ``state``.
            finite: 0-d float, 0 if the loss or a gradient overflowed, so that the update was
                skipped; then this batch must not spoil later ones.
            before: the state before this batch.
        """
        return state

    #: length of the perturbation of a two-pass (sharpness-aware) update; 0: a plain gradient step
    rho = 0.0

    def perturbed_objective(
        self, model: FusionModel, features: Any, first: Objective, *, state: Mapping[str, Tensor]
    ) -> Objective:
        """Second pass of a two-pass update, at the perturbed weights; it replaces the first."""
        raise TypeError(f"{type(self).__name__} has no second pass")

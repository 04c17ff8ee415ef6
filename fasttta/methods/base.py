"""What every adaptation method is: a frozen set of options and an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from ..protocols import FusionModel, Slot
from .class_check import check_class, check_decorated
from .options import AtLeast, Finite, OneOf, Positive, check_option, check_options, declared


@dataclass
class Objective:
    """Losses and prediction of one batch, as ``Method.objective`` returns them.

    Attributes:
        losses: 0-d tensors, unweighted, and ``"total"``, the one that is minimised.
        logits: [B, C], the prediction of the current batch.
        n_used: number of samples that entered the loss, 0-d tensor or int.
        stats: tensors that ``StepResult.stats`` shows, of any shape.
        state: the method's state for the next batch, once the step has succeeded.
        trace: intermediates for ``step(..., trace=True)``, or functions that compute them.
        apply: 0-d; 0: this update is left out.
    """

    losses: dict[str, Tensor]
    logits: Tensor
    n_used: Tensor | int
    stats: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    trace: Mapping[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    apply: Tensor | float = 1.0


def check_objective(method: Method, result: Any, updates: bool) -> None:
    """Checks what a method's ``objective`` returned, before anything is updated by it. It reads no
    values, so that nothing waits for a GPU.

    Args:
        updates: whether steps change the tuned tensors by it.

    Raises:
        TypeError, ValueError: a part is missing or of the wrong kind; names the part.
    """
    where = f"{type(method).__name__}.objective"
    if not isinstance(result, Objective):
        raise TypeError(
            f"{where} returned {type(result).__name__}; needed fasttta.methods.Objective("
            'losses={"total": loss}, logits=logits, n_used=len(logits))'
        )
    if updates and "total" not in result.losses:
        names = ", ".join(map(repr, result.losses)) or "none"
        raise ValueError(
            f'{where} returned the losses {names}; needed "total", the one that is minimised'
        )
    for name, loss in result.losses.items():
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{where} returned {type(loss).__name__} as loss {name!r}; needed a tensor"
            )
        if loss.ndim:
            raise ValueError(
                f"{where} returned a loss {name!r} of shape {list(loss.shape)}; needed one number, "
                "a 0-d tensor: take its mean"
            )
    if not isinstance(result.logits, Tensor):
        raise TypeError(
            f"{where} returned {type(result.logits).__name__} as logits; needed a tensor [B, C]"
        )
    if result.logits.ndim != 2:
        raise ValueError(
            f"{where} returned logits of shape {list(result.logits.shape)}; needed [B, C]"
        )
    if not isinstance(result.n_used, (Tensor, int)):
        raise TypeError(
            f"{where} returned n_used={result.n_used!r:.40}; needed the number of samples that "
            "entered the loss"
        )
    for part in ("stats", "state"):
        for name, value in getattr(result, part).items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{where} returned {type(value).__name__} as {part}[{name!r}]; needed a tensor"
                )


def sample_weight(valid: Tensor) -> Tensor | None:
    """The weights [B] of a batch's samples in a mean, from ``valid`` of ``Method.objective``;
    None: all samples count alike."""
    return valid if valid.ndim else None


def samples_used(valid: Tensor, logits: Tensor) -> Tensor | int:
    """How many of the samples of logits [B, C] count."""
    return valid.sum() if valid.ndim else len(logits)


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of values [B] over samples; 0-d.

    Args:
        weight: [B], 0 for samples that do not count, whose values may be anything, NaN included;
            None: all samples count alike.
    """
    if weight is None:
        return values.sum() / len(values)
    # where a weight is not above 0 it is 0, so that no zeros are made
    return torch.where(weight > 0, values * weight, weight).sum() / weight.sum()


def joined(parts: Iterable[Tensor]) -> Tensor:
    """torch.cat along the batch, without a copy of a single part."""
    parts = tuple(parts)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its options, what it tunes, and its objective. README.md has complete examples.

    A subclass is a frozen dataclass whose fields are its options. It must define ``name``,
    ``group``, ``frozen_encoder``, ``objective`` and, if it tunes something, the option ``lr``.

    Args:
        steps: updates on each batch.
        score_at: which prediction is ``StepResult.logits``: ``"before"`` the update, or
            ``"after"`` it, from a second forward pass. The default is the published protocol.
    """

    #: the name that ``adapt``, ``save`` and errors use
    name: ClassVar[str]
    #: what is tuned, a name that ``model.tunable`` knows: ``"norm"``, ``"encoder_norm"``,
    #: ``"fusion_qkv"``, ``"prompts"``, ``"head"``; None: nothing
    group: ClassVar[str | None]
    #: whether everything before ``model.fuse`` is frozen. True: ``objective`` gets the encoder's
    #: output, computed once a batch without gradient. False: it gets the inputs
    frozen_encoder: ClassVar[bool]
    #: the kinds of models that it adapts: ``"fusion"``, ``"vision-language"``, ``"features"``
    families: ClassVar[tuple[str, ...]] = ("fusion",)
    #: published settings: name -> options
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: keywords of ``adapt`` that are no options: tensors that ``constants`` takes
    RESOURCES: ClassVar[tuple[str, ...]] = ()

    steps: Annotated[int, AtLeast(1, most=10_000)] = 1
    score_at: Annotated[str | None, OneOf("before", "after")] = "before"

    if TYPE_CHECKING:  # a field of every subclass, which decides its position

        @property
        def lr(self) -> float | None:
            """The learning rate, an option of every method that tunes something."""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        """Checks the class when it is made. ``class Base(Method, abstract=True)`` is a base of
        methods, which may lack parts.

        Raises:
            TypeError: a part is missing or of the wrong kind.
        """
        super().__init_subclass__(**kwargs)
        check_class(cls, Method, abstract)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses a class with options that lacks ``@dataclass(frozen=True)``."""
        if "__dataclass_fields__" not in vars(cls):
            check_decorated(cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks the options; a subclass that checks more calls this first.

        Raises:
            ValueError: an option has a value that is not allowed.
        """
        check_options(self)
        if "lr" not in declared(type(self)) and (self.group is not None or hasattr(self, "lr")):
            # above a million the tuned tensors would not stay finite
            check_option("lr", self.lr, Finite(1e6) if self.group is None else Positive(1e6))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The method with published settings, whose source the docstring of the class names.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in cls.PRESETS:
            names = ", ".join(map(repr, cls.PRESETS)) or "none"
            raise ValueError(f"{cls.__name__} has no preset {name!r}; known: {names}")
        return cls(**cls.PRESETS[name])

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """The losses of one batch, differentiable with respect to the tuned tensors, and its
        prediction. Called ``steps`` times a batch, with a gradient if something is tuned.

        Args:
            features: output of ``model.encode``, [B, T, D], if ``frozen_encoder``; else the inputs
                of the batch, a tuple, followed by what a ``DrawingMethod`` drew.
            state: the ``Objective.state`` of the batch before; empty at the start. With several
                steps on a batch, each gets the state that the step before returned. Never write to
                it.
            constants: what ``constants`` returned, on the device of the model.
            valid: 0-d float, 0 if the batch has non-finite values: the step then skips the update
                on the device, and this batch must not spoil the state. Or [B], 0 also for rows that
                only fill the batch up to the size of a captured step.
        """
        raise TypeError(f"{type(self).__name__} defines no objective")

    def tuned(self, model: FusionModel) -> dict[str, Slot]:
        """The tuned tensors, by name. Called once, by ``adapt``; by default those of ``group``."""
        return {} if self.group is None else model.tunable(self.group)

    def fitted(self, model: FusionModel) -> Method:
        """The method with the options that follow from the model. Called by ``adapt``, and again
        once the first batch has shown the number of classes. A subclass calls this, too.

        Raises:
            ValueError: the method or its options do not fit the model.
        """
        if self.group is not None and model.num_classes == 1:
            raise ValueError(
                f"{type(self).__name__} learns from entropies of predictions, and of one class, "
                "logits [B, 1], they are 0 whatever the weights: needed at least 2 classes. "
                "(Scores of a regression have no class distribution; two logits, (0, x), make one "
                "of a binary score x.)"
            )
        return self

    def constants(self, model: FusionModel, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        """Floating point tensors that stay as they are and are saved with the state. Called once,
        by ``adapt``.

        Args:
            resources: arguments of the caller for ``RESOURCES``; missing ones are absent.

        Raises:
            TypeError, ValueError: a resource is missing, or of another model.
        """
        return {}

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of the tuned tensors. Called once, by ``adapt``. By default Adam with betas
        (0.9, 0.999) and no weight decay, as in all published runs of this benchmark."""
        parameters = list(parameters)
        cuda = parameters[0].is_cuda
        assert self.lr is not None  # ``fitted`` has set it
        return torch.optim.Adam(parameters, lr=self.lr, fused=True, capturable=cuda)

    def logits(self, model: FusionModel, features: Any) -> Tensor:
        """The prediction [B, C] with the current weights. Called by ``objective`` and by
        ``predict``; ``features`` as ``objective`` gets them."""
        if not self.frozen_encoder:
            return model.fuse(model.encode(*features))
        return joined(model.fuse(part) for part in model.pieces(features))


@dataclass(frozen=True)
class WeightedMethod(Method, abstract=True):
    """A method whose loss is a sum of terms over a batch with weights that are options."""

    #: methods that a subclass must define
    NEEDED: ClassVar[tuple[str, ...]] = ("weights", "single_sample")

    def weights(self) -> tuple[float, ...]:
        """The weights of the terms; where all are 0, no step updates anything."""
        raise NotImplementedError

    def fitted(self, model: FusionModel) -> Method:
        """As of ``Method``; of a method that updates nothing the model may be of one class."""
        return super().fitted(model) if any(self.weights()) else self

    def single_sample(self) -> str:
        """What to warn of when the first batch is a single sample; empty: nothing."""
        raise NotImplementedError


@dataclass(frozen=True)
class EpisodeMethod(Method, abstract=True):
    """A method whose steps start from the same tensors, whatever the steps before them learnt, if
    its options say so."""

    @property
    def episodic(self) -> bool:
        """Whether every step is an episode of its own."""
        return True

    def score(self, model: FusionModel, features: Any) -> Tensor:
        """The prediction [B, C] of a step after its update; by default ``logits``."""
        return self.logits(model, features)


def updates_tensors(method: Method) -> bool:
    """Whether a step changes the tuned tensors; False: ``objective`` runs without gradient."""
    if isinstance(method, WeightedMethod) and not any(method.weights()):
        return False
    return method.group is not None


def captured_by_default(method: Method) -> bool:
    """Whether ``engine="auto"`` captures the method's steps on a GPU, as tests/engine/test_cuda.py
    does: its class says ``captured_by_default = True``. A subclass does not inherit it, as its
    objective is another one."""
    return bool(vars(type(method)).get("captured_by_default", False))


def runs_episodes(method: Method) -> bool:
    """Whether every step of a method starts from the same tensors."""
    return isinstance(method, EpisodeMethod) and method.episodic


def balance_warning(method: Method, window: int | None = None) -> str:
    """The warning of methods with a class-balance term about a batch of a single sample.

    Args:
        window: batches in the loss; None: the method has no window.
    """
    advice = ", or a window of past batches" if window == 1 else ""
    return (
        f"{type(method).__name__} on a single sample: the balance term is the entropy of that one "
        f"prediction and works against the entropy term. Give larger batches{advice}"
    )

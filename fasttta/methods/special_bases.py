"""Bases of methods that do more than turn a batch into a loss: a second pass, a described state,
tensors of their own in the model, draws at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import FusionModel
from .base import Method, Objective
from .saved_state import check_layout


@dataclass(frozen=True)
class TwoPassMethod(Method, abstract=True):
    """A method with sharpness-aware updates: the gradient at the weights perturbs them by ``rho``
    along it, and the gradient of a second objective there updates them.

    Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("second_objective",)

    if TYPE_CHECKING:  # a field of every subclass, which decides its position

        @property
        def rho(self) -> float:
            """Length of the perturbation, a positive option."""

    def second_objective(
        self, model: FusionModel, features: Any, first: Objective, *, state: Mapping[str, Tensor]
    ) -> tuple[Objective, Tensor]:
        """The objective at the perturbed weights.

        Args:
            first: what ``objective`` returned at the weights themselves.
            features, state: as ``objective`` got them.

        Returns:
            The ``Objective`` that replaces the first one, and a 0-d bool tensor; True: after this
            update tuned tensors and optimiser go back to the start.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StatefulMethod(Method, abstract=True):
    """A method that describes the tensors it carries from batch to batch, so that its steps can be
    captured (``engine="graph"``) and a state from a file is checked."""

    def blank_state(self, features: Tensor, num_classes: int) -> dict[str, Tensor]:
        """The state before any batch, as tensors of the shapes that ``Objective.state`` will have.
        Empty: ``check_saved`` has to say what a state may be.

        Args:
            features: an empty tensor of the device and type that the state shall have.
        """
        return {}

    def check_saved(
        self, model: FusionModel, constants: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Checks constants and state (finite tensors) from a file. Called by ``load``. By default
        the state must be empty or have the names and shapes of ``blank_state``, and the constants
        those that ``constants`` returns without resources.

        Raises:
            ValueError: the method cannot go on with them; names the tensor.
        """
        check_constants(self, model, constants)
        blank = self.blank_state(torch.zeros(0), model.num_classes or 0)
        if blank and state:
            check_layout("method", state, blank, shapes=model.num_classes is not None)


@dataclass(frozen=True)
class ExtendingMethod(Method, abstract=True):
    """A method that tunes tensors which the source model lacks, such as prompts."""

    NEEDED: ClassVar[tuple[str, ...]] = ("extend",)

    def extend(self, model: FusionModel, seed: int) -> FusionModel:
        """The model with these tensors, which steps run; frozen weights stay shared. Called once,
        by ``adapt``."""
        raise NotImplementedError


@dataclass(frozen=True)
class DrawingMethod(Method, abstract=True):
    """A method whose steps draw something at random, such as masks."""

    NEEDED: ClassVar[tuple[str, ...]] = ("draw",)

    def draw(
        self,
        model: FusionModel,
        inputs: tuple[Tensor, ...],
        generator: torch.Generator,
        keep: Any = None,
    ) -> tuple[Tensor, ...]:
        """Draws random tensors for a batch; ``objective`` gets them after the inputs. Called once a
        batch.

        Args:
            generator: to draw from; its state is part of the state of the adapted model.
            keep: the argument of ``step(..., keep=)``, which replaces random tensors; None: draw.

        Raises:
            TypeError, ValueError: ``keep`` cannot be used.
        """
        raise NotImplementedError


def check_constants(method: Method, model: FusionModel, constants: Mapping[str, Tensor]) -> None:
    """Checks constants from a file against those that a method makes without resources.

    Raises:
        ValueError: they are others; names the tensor.
    """
    if not method.RESOURCES:
        check_layout("constant", constants, method.constants(model, {}))


def check_saved(
    method: Method,
    model: FusionModel,
    constants: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Checks what a file holds of a method, as far as the method describes it.

    Raises:
        ValueError: the method cannot go on with it; names the tensor.
    """
    if isinstance(method, StatefulMethod):
        method.check_saved(model, constants, state)
    else:
        check_constants(method, model, constants)

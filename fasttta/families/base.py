"""Base of families: a user's module as methods see it, and how it is compared and merged."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..engine.precision import Precision
from ..engine.step import environment
from ..models.copies import (
    Tree,
    own_buffers,
    replace_parameters,
    structural_copy,
    without_checkpointing,
)
from ..protocols import FusionModel
from .refusals import hook_advice
from .self_check import check_gradients, gradients_of


@dataclass
class Family(abc.ABC):
    """A model that fasttta recognised. ``recognise`` makes it.

    Attributes:
        name: of the family, for messages.
        model: what fasttta runs, over the weights of the user's module.
        prefix: where the model lies in the user's module (``"module."``).
        module: the recognised part of the user's module, with which the first batch compares
            ``model``; None if it is ``model`` itself, without hooks.
        structure: a copy of ``model`` at recognition, with separate buffers. The user's module may
            get other classes and buffers later; adapted models keep the old ones.
        takes_images: whether inputs are images, of which views can be made.

    Class attributes:
        methods: kinds of methods (``Method.families``) that the family's models run.
        default_method: the name that ``method="auto"`` stands for.
        takes_classes: whether ``adapt`` takes ``classes=``; no_classes: why not, for messages.
    """

    name: str
    model: Any
    prefix: str = ""
    module: nn.Module | None = field(default=None, repr=False)
    structure: Any = field(default=None, repr=False)
    takes_images: bool = False

    methods: ClassVar[tuple[str, ...]]
    default_method: ClassVar[str]
    takes_classes: ClassVar[bool] = False
    no_classes: ClassVar[str] = "models of this family take no classes"

    @abc.abstractmethod
    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Compares the recognised model with the forward of the user's module.

        Returns:
            Whether the batch allowed a comparison: False for non-finite input.

        Raises:
            ValueError: the two differ, or the module's forward fails: it does not compute what its
                structure says.
        """

    def compare_again(self) -> None:
        """Makes the next ``verify`` compare again, after hooks or classes of the module changed."""
        if self.module is None:
            self.module = self.model

    @property
    def _compared(self) -> Any:
        return self.model if self.structure is None else self.structure


@dataclass
class FusionFamily(Family):
    """Models of several modalities that are cut into ``encode`` and ``fuse``.

    Attributes:
        tuned: names of the parameters of ``model`` that the method tunes, whose gradients are
            compared too.
        all_used: the logits must depend on each of them.
    """

    model: FusionModel
    tuned: frozenset[str] = frozenset()
    all_used: bool = False

    methods: ClassVar[tuple[str, ...]] = ("fusion", "features")
    default_method: ClassVar[str] = "abpem"

    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Compares logits of the first two samples of a batch, and gradients of what is tuned, in
        float64 on a copy of the module's structure. (READ's and ABPEM's code changes its weights'
        storage on the first forward: the module itself is not run.)

        Returns, Raises: as ``Family.verify``; they differ by more than 1e-6 of the largest logit or
            gradient.
        """
        if self.module is None:
            return True
        inputs = tuple(x[:2].double() if x.is_floating_point() else x[:2] for x in inputs)
        if not all(torch.isfinite(x).all() for x in inputs):
            return False
        exact = Precision("fp64", torch.float64, torch.float64)
        with environment(inputs[0].device, exact, grad=False):
            # one copy at a time is held
            model = in_type(self._compared, torch.float64)
            ours, our_grads = self._cut_forward(model, inputs)
            del model
            twin = own_copy(self.module, torch.float64)
            theirs, their_grads = self._own_forward(twin, inputs)
            if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
                shape = list(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
                raise ValueError(
                    f"recognised as {self.name}, but its forward returns {shape}, needed logits "
                    f"{list(ours.shape)} (or a tuple that begins with them)"
                )
            tolerance = 1e-6 * max(1.0, theirs.abs().max().item())
            error = (theirs.double() - ours).abs().max().item()
            if not error <= tolerance:
                raise ValueError(
                    f"recognised as {self.name}, but its own forward differs from that "
                    f"architecture's by {error:.1e}, needed at most {tolerance:.1e}: is its "
                    f"attention or forward patched?{hook_advice(self.module)}"
                )
            if self.tuned:
                check_gradients(f"recognised as {self.name}", sorted(self.tuned), their_grads,
                                our_grads, 1e-6, self.module, self.all_used)  # fmt: skip
        return True

    def _cut_forward(
        self, model: FusionModel, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Logits and gradients of the tuned tensors, through encode and fuse."""
        leaves = [model.get_parameter(name) for name in sorted(self.tuned)]
        return graded(lambda: model.fuse(model.encode(*inputs)), leaves)

    def _own_forward(
        self, twin: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor | None]]:
        """The same through the forward of the user's module, which runs once, so that each of
        its hooks does, too."""
        leaves = [twin.get_parameter(name) for name in sorted(self.tuned)]
        return graded(lambda: self._own_logits(twin, inputs), leaves)

    def _own_logits(self, twin: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """What the module predicts."""
        try:
            returned = twin(*inputs)
        except Exception as error:
            raise ValueError(
                f"recognised as {self.name}, but its own forward fails: {error}"
            ) from error
        return returned[0] if isinstance(returned, (tuple, list)) else returned

    def copied_parameters(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        """Names of the parameters that the user's module copies from packed ones when it runs ->
        the name of the packed one, and which third of it."""
        return {}

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Writes an adapted parameter into a copy of the user's module."""
        module.get_parameter(self.prefix + name).copy_(value)

    def merges(self, names: Iterable[str]) -> bool:
        """Whether the user's module has a place for what a method added to the model."""
        return False


def graded(run: Callable[[], Any], leaves: list[nn.Parameter]) -> tuple[Any, list[Tensor | None]]:
    """Result of ``run``, detached, and its gradients with respect to leaves. ``run`` is called
    once."""
    if not leaves:
        return run(), []
    returned: list[Any] = []

    def once() -> Any:
        returned.append(run())
        return returned[-1]

    for leaf in leaves:
        leaf.requires_grad_(True)
    with torch.enable_grad():
        grads = gradients_of(once, leaves)
    (output,) = returned
    return output.detach() if isinstance(output, Tensor) else output, grads


def in_type(module: Tree, dtype: torch.dtype) -> Tree:
    """A copy of a module tree with separate parameters and buffers in a type, without users'
    hooks."""
    twin = structural_copy(module)
    _convert(cast(nn.Module, twin), dtype)
    return twin


def own_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the user's module in a type, with all its hooks and without gradient
    checkpointing. It computes what the module does; running it does not change the module."""
    twin = structural_copy(module, hooks=True)
    _convert(twin, dtype)
    without_checkpointing(twin)
    return twin


def _convert(twin: nn.Module, dtype: torch.dtype) -> None:
    """Gives a copy of a module parameters and buffers of its own in a type."""
    replace_parameters(
        twin, lambda _, x: nn.Parameter(x.detach().to(dtype, copy=True), requires_grad=False)
    )
    own_buffers(twin, dtype)

"""Any fusion transformer under a ModelSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.precision import Precision
from ..engine.step import environment
from ..models.specified.model import SpecifiedModel
from ..models.specified.outputs import rebuilt
from ..models.specified.spec import ModelSpec
from .base import FusionFamily, graded, in_type, own_copy
from .refusals import hook_advice, refuse_replaced_forwards
from .self_check import check_gradients, check_returned


@dataclass
class SpecifiedFamily(FusionFamily):
    """A user's module under a ModelSpec."""

    model: SpecifiedModel

    @classmethod
    def of(cls, module: nn.Module, prefix: str, spec: ModelSpec) -> SpecifiedFamily:
        """The family of a module that lies at ``prefix`` in the user's module.

        Raises:
            TypeError: the spec is none.
            ValueError: the spec does not fit the module.
        """
        if not isinstance(spec, ModelSpec):
            raise TypeError(f"spec must be a fasttta.ModelSpec, found {type(spec).__name__}")
        refuse_replaced_forwards(module)
        name = f"{type(module).__name__} by its ModelSpec"
        return cls(name, SpecifiedModel(module, spec), prefix, module)

    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Learns from two samples of the first batch how the module runs, and compares encode and
        fuse of each sample with the module's forward, in float64 on a copy of its structure.

        Returns, Raises: as ``FusionFamily.verify``.
        """
        two = tuple(torch.cat((x, x)) if len(x) == 1 else x[:2] for x in inputs)
        if not all(torch.isfinite(x).all() for x in two):
            return False
        try:
            self._compare(two, torch.float64, 1e-6)
        except RuntimeError as error:  # a forward that sets types itself
            if "dtype" not in str(error) and "type" not in str(error):
                raise
            self._compare(two, torch.float32, 1e-4)
        return True

    def _compare(self, two: tuple[Tensor, ...], dtype: torch.dtype, tolerance: float) -> None:
        two = tuple(x.to(dtype) if x.is_floating_point() else x for x in two)
        exact, module = Precision("exact", dtype, dtype), self.module
        assert module is not None  # SpecifiedFamily.of sets it
        kind = f"{type(module).__name__} cut as its ModelSpec says"
        with environment(two[0].device, exact, grad=False):
            twin = in_type(self._compared, dtype)
            # this copy keeps the module's hooks, as calls by the user run them
            output, module_grads = self._module_forward(twin, own_copy(module, dtype), two)
            expected = twin.own_logits(output).detach()
            twin.own_logits(twin.learn(two, check=dtype == torch.float64))
            tokens = [twin.encode(*(x[i : i + 1] for x in two)) for i in (0, 1)]
            alone = torch.cat([twin.fuse(x) for x in tokens])
            twin.outputs = []
            together = twin.fuse(torch.cat(tokens))
            returned = twin.returned(together, 0)
        limit = tolerance * max(1.0, expected.abs().max().item())
        error = max(
            (expected - x).abs().max().item() if expected.shape == x.shape else float("inf")
            for x in (alone, together)
        )
        if not error <= limit:
            raise ValueError(
                f"{kind} differs from its own forward by {error:.1e}, needed at most {limit:.1e}: "
                "is there something random or stateful in its forward, does it mix the samples of "
                "a batch, or do forward hooks change results? ModelSpec(..., encode=(encode, "
                f"fuse)) gives the cut as two functions.{hook_advice(module)}"
            )
        check_returned(kind, output, returned, tolerance)
        if self.tuned:
            twin.outputs = None
            with environment(two[0].device, exact, grad=True):
                _, grads = self._cut_forward(twin, two)
            names = sorted(self.tuned)
            check_gradients(kind, names, module_grads, grads, tolerance, module, self.all_used)

    def _module_forward(
        self, twin: SpecifiedModel, hooked: nn.Module, two: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor | None]]:
        """What the module returns and gradients of the tuned tensors, from one run: its hooks are
        the user's."""
        leaves = [hooked.get_parameter(name.removeprefix("module.")) for name in sorted(self.tuned)]
        outputs: list[Any] = []

        def run() -> Tensor:
            outputs.append(hooked(*(x.clone() for x in two)))
            return twin.own_logits(outputs[-1]) if leaves else outputs[-1]

        _, grads = graded(run, leaves)
        return (rebuilt(outputs[-1], Tensor.detach) if leaves else outputs[-1]), grads

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Writes a parameter; its name begins with the wrapper's ``module.``."""
        super().merge_into(module, name.removeprefix("module."), value)

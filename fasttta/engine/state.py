"""The only owner of what adaptation changes: tuned tensors, optimiser, method and random state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method
from ..protocols import Slot
from .precision import Precision


def working_copy(
    model: nn.Module, tuned: set[str], precision: Precision
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the module tree that shares frozen weights and owns the tuned ones.

    The user's module is not touched: its parameters stay its own, hooks and flags included.

    Returns:
        The copy in evaluation mode, and its tuned parameters by name.
    """
    shared: dict[int, nn.Parameter] = {}
    leaves: dict[str, nn.Parameter] = {}

    def own(name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if name in tuned:
            value = parameter.detach().to(precision.master, copy=True)
            leaves[name] = nn.Parameter(value.contiguous())
            return leaves[name]
        if id(parameter) not in shared:  # tied parameters stay tied
            value = parameter.detach()
            value = value.clone() if value.is_inference() else value
            if value.is_floating_point():
                value = value.to(precision.master)
            shared[id(parameter)] = nn.Parameter(value, requires_grad=False)
        return shared[id(parameter)]

    copy = structural_copy(model, own)
    for module in copy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:  # what a forward writes there must not reach the user's module
                dtype = precision.master if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.detach().to(dtype, copy=True)
    copy.set_compute_dtype(None if precision.compute == precision.master else precision.compute)
    return copy, leaves


def structural_copy(
    model: nn.Module,
    parameter: Callable[[str, nn.Parameter | None], nn.Parameter | None],
    hooks: bool = False,
) -> nn.Module:
    """The module tree anew, in evaluation mode and (unless ``hooks``) without hooks, which stay
    with the user's module; parameters as ``parameter(name, theirs)`` says, everything else shared.
    Unlike ``copy.deepcopy`` it takes modules that hold on to activations, locks or files."""
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module, prefix: str) -> nn.Module:
        if id(module) in twins:  # one object under several names stays one
            return twins[id(module)]
        new = twins[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__ = {
            key: (type(value)() if "_hooks" in key and not hooks else value.copy())
            if isinstance(value, dict)
            else value
            for key, value in vars(module).items()
        }
        # of Module.compile(): it is bound to the original
        new.__dict__.pop("_compiled_call_impl", None)
        own = vars(module).get("forward")
        if isinstance(own, MethodType) and own.__self__ is module:
            new.__dict__["forward"] = MethodType(own.__func__, new)
        for name, theirs in module._parameters.items():
            new._parameters[name] = parameter(prefix + name, theirs)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else twin(child, f"{prefix}{name}.")
        new.training = False
        return new

    return twin(model, "")


class State:
    """Tuned tensors, optimiser moments, method state and random state of one adapted model.

    Attributes:
        leaves: the tuned parameters by their name in the module.
        slots: tuned name -> parameter, or rows of one.
        method: tensors the method carries from batch to batch; replaced, never written to.
        constants: tensors the method fixed at the start.
        source: the tuned parameters as ``adapt`` made them; start: as every episode begins.
        generator: on the CPU, seeded.
    """

    def __init__(
        self,
        leaves: dict[str, nn.Parameter],
        slots: Mapping[str, Slot],
        method: Method,
        constants: dict[str, Tensor],
        seed: int,
    ) -> None:
        self.leaves, self.slots, self.seed = leaves, dict(slots), seed
        self.constants = constants
        self.source = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        self.start = self.source  # of every episode
        self.method: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.episodic = method.episodic
        self.optimizer = method.optimizer(leaves.values()) if leaves else None
        if leaves:  # what it warns of is meant: the same optimiser runs in and out of a capture
            self.optimizer._warned_capturable_if_run_uncaptured = True
        for leaf in leaves.values():
            # as Adam's first step would make it; made here so that a state can be saved,
            # restored and reset before any step
            self.optimizer.state[leaf] = {
                "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                "exp_avg": torch.zeros_like(leaf),
                "exp_avg_sq": torch.zeros_like(leaf),
            }

    # ------------------------------------------------------------------ tuned tensors

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter name -> views of them by tuned name."""
        views = {}
        for name, slot in self.slots.items():
            tensor = tensors[slot.parameter]
            views[name] = tensor if slot.rows is None else tensor[slot.rows[0] : slot.rows[1]]
        return views

    def tuned(self) -> dict[str, Tensor]:
        """Copies of the tuned tensors by name."""
        return {
            name: view.clone()
            for name, view in self.named({n: p.detach() for n, p in self.leaves.items()}).items()
        }

    def load_tuned(self, values: Mapping[str, Tensor]) -> None:
        """Sets some or all tuned tensors; checks all of them before it changes any."""
        views, ready = self.named({n: p.detach() for n, p in self.leaves.items()}), {}
        for name, value in values.items():
            if name not in views:
                known = ", ".join(list(views)[:6]) or "none: this method tunes nothing"
                raise ValueError(f"{name!r} is not tuned; tuned: {known}")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating point tensor, found {found}")
            if value.shape != views[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, needed {tuple(views[name].shape)}"
                )
            if value.device.type == "meta":
                raise ValueError(f"{name} is on meta: it holds no values")
            ready[name] = value.detach().to(views[name])
            if not torch.isfinite(ready[name]).all():
                raise ValueError(f"{name} holds non-finite values")
        with torch.inference_mode(False), torch.no_grad():
            if self.episodic:  # not what the last episode made of the others
                for name, leaf in self.leaves.items():
                    leaf.copy_(self.start[name])
            for name, value in ready.items():
                views[name].copy_(value)
            if self.episodic:  # or the next episode would not begin with them
                self.start = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    # ------------------------------------------------------------------ snapshots

    def _written(self) -> dict[str, Tensor]:
        """Everything that a step writes to in place."""
        tensors = {f"tuned.{name}": leaf.detach() for name, leaf in self.leaves.items()}
        for name, leaf in self.leaves.items():
            for kind, value in self.optimizer.state[leaf].items():
                tensors[f"adam.{kind}.{name}"] = value
        return tensors

    def snapshot(self) -> Callable[[], None]:
        """Remembers the state; the function returned puts it back."""
        saved = {name: tensor.clone() for name, tensor in self._written().items()}
        method, random = self.method, self.generator.get_state()

        def restore() -> None:
            with torch.inference_mode(False), torch.no_grad():
                for name, tensor in self._written().items():
                    tensor.copy_(saved[name])
            self.method = method
            self.generator.set_state(random)

        return restore

    def reset(self) -> None:
        """The state at the start, bit for bit."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._written().items():
                if name.startswith("tuned."):
                    tensor.copy_(self.source[name.removeprefix("tuned.")])
                else:
                    tensor.zero_()
        self.start, self.method = self.source, {}
        self.generator.manual_seed(self.seed)

    def recover(self, flag: Tensor) -> None:
        """Tuned tensors and optimiser at an episode's start where a 0-d flag is true; decided on
        the device."""
        with torch.no_grad():
            for name, tensor in self._written().items():
                start = self.start.get(name.removeprefix("tuned."), torch.zeros_like(tensor))
                tensor.copy_(torch.where(flag, start, tensor))

    # ------------------------------------------------------------------ files

    def _fixed(self) -> dict[str, Tensor]:
        """What is saved besides what steps write to."""
        tensors = {f"constant.{name}": value for name, value in self.constants.items()}
        if self.episodic:
            tensors |= {f"start.{name}": value for name, value in self.start.items()}
        return tensors

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that a later session needs to go on, by name, on the CPU."""
        tensors = self._written() | {"random": self.generator.get_state()}
        tensors |= {f"method.{name}": value for name, value in self.method.items()}
        tensors |= self._fixed()
        # `.cpu()` alone gives the live memory on a CPU, which the next step writes to
        layout = torch.contiguous_format
        return {
            name: tensor.detach().to("cpu", copy=True, memory_format=layout)
            for name, tensor in tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` returned; checks everything before it changes anything.

        Raises:
            ValueError: names or shapes are not this state's.
        """
        written = self._written()
        fixed = written | self._fixed()
        found = {n for n in tensors if not n.startswith("method.") and n != "random"}
        if found != fixed.keys() or "random" not in tensors:
            odd = sorted((found ^ fixed.keys()) | ({"random"} - tensors.keys()))
            raise ValueError(f"the saved state is of another model or method: {', '.join(odd[:3])}")
        for name, tensor in fixed.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise ValueError(
                    f"{name} was saved as {_describe(tensors[name])}, needed {_describe(tensor)}"
                )
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in written.items():
                tensor.copy_(tensors[name])
            device = next(iter(self.leaves.values())).device if self.leaves else "cpu"
            if self.episodic:
                self.start = {n: tensors[f"start.{n}"].to(device) for n in self.leaves}
            self.method = {
                name.removeprefix("method."): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith("method.")
            }
        self.generator.set_state(tensors["random"])


def _describe(tensor: Tensor) -> Any:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

"""Hooks of a module tree: which belong to the model, and what they are bound to in a copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as _global

#: dicts of hooks that a call of a module runs
CALLED = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: the same hooks' flags, by their key in the dicts above
_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
#: what a copy of a module has of its own
_REGISTRIES = {"_parameters", "_buffers", "_modules"}
#: of PyTorch's own hooks, which compute a weight from its parts before each call
_TORCH = ("torch.nn.utils.",)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """All hooks that a call of this module, or of one inside it, runs."""
    for child in module.modules():
        for kind in CALLED:
            yield from vars(child).get(kind, {}).values()


def global_hooks() -> list[Any]:
    """The process-wide hooks of ``torch.nn.modules.module.register_module_forward_hook`` etc."""
    dicts = (
        _global._global_forward_pre_hooks,
        _global._global_forward_hooks,
        _global._global_backward_pre_hooks,
        _global._global_backward_hooks,
    )
    return [hook for hooks in dicts for hook in hooks.values()]


def copy_hooks(twins: Mapping[int, tuple[nn.Module, nn.Module]], every: bool) -> None:
    """Gives the modules of a copied tree their hooks.

    A hook that is bound to a module of the tree (a method, a closure over it) belongs to the
    model: its forward may read what the hook writes, so the copy gets one that is bound to the
    copy. Hooks of ``torch.nn.utils`` (``weight_norm``, ``spectral_norm``, ``prune``) compute the
    weight, and are kept too.

    Args:
        twins: identity of each module -> the module and its copy.
        every: also keep the hooks that others have registered.
    """
    for module, new in twins.values():
        for kind in CALLED:
            kept = {}
            for key, hook in vars(module).get(kind, {}).items():
                bound = _rebound(hook, twins)
                torch_own = type(hook).__module__.startswith(_TORCH)
                if every or torch_own or bound is not hook:
                    kept[key] = bound
            new.__dict__.setdefault(kind, type(vars(module).get(kind, {}))()).update(kept)
            for flag in _FLAGS.get(kind, ()):
                flags = {k: x for k, x in vars(module).get(flag, {}).items() if k in kept}
                new.__dict__.setdefault(flag, type(vars(module).get(flag, {}))()).update(flags)


def rebind_attributes(twins: Mapping[int, tuple[nn.Module, nn.Module]]) -> None:
    """Binds what a copied tree's modules keep as plain attributes to the copy: methods of a module
    of the tree, partial functions and closures over one, lists of them."""
    for module, new in twins.values():
        for name, value in vars(module).items():
            if name not in _REGISTRIES and not name.endswith("_hooks"):
                bound = _rebound(value, twins)
                if bound is not value:
                    new.__dict__[name] = bound


def _rebound(value: Any, twins: Mapping[int, tuple[nn.Module, nn.Module]], depth: int = 3) -> Any:
    """A hook, or what it holds, with the tree's modules exchanged for their copies; the same
    object where it holds none of them."""
    if isinstance(value, nn.Module):
        return twins[id(value)][1] if id(value) in twins else value
    if depth == 0:
        return value
    again = functools.partial(_rebound, twins=twins, depth=depth - 1)
    if isinstance(value, MethodType):
        owner = again(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = [again(value.func), *map(again, value.args)]
        named = {name: again(x) for name, x in value.keywords.items()}
        old = [value.func, *value.args, *value.keywords.values()]
        if all(a is b for a, b in zip([*parts, *named.values()], old, strict=True)):
            return value
        function, *rest = parts
        return functools.partial(function, *rest, **named)
    if isinstance(value, FunctionType):
        return _rebound_function(value, again)
    if type(value) in (list, tuple, dict):
        old = list(value.values() if isinstance(value, dict) else value)
        new = list(map(again, old))
        if all(a is b for a, b in zip(new, old, strict=True)):
            return value
        pairs = zip(value, new, strict=True) if isinstance(value, dict) else new
        return type(value)(pairs)
    return value


def _rebound_function(function: FunctionType, again: Any) -> FunctionType:
    cells, changed = [], False
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        new = again(content)
        changed |= new is not content
        cells.append(cell if new is content else CellType(new))
    defaults = tuple(map(again, function.__defaults__ or ()))
    changed |= any(a is not b for a, b in zip(defaults, function.__defaults__ or (), strict=True))
    if not changed:
        return function
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults or None, tuple(cells)
    )
    new.__kwdefaults__ = copy.copy(function.__kwdefaults__)
    return new

"""Copies of a model's modules that share its weights, and the hooks that belong to a copy."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn

#: a module; protocols such as ``FusionModel`` do not say that they are modules
Tree = TypeVar("Tree")
#: dicts of hooks that a call of a module runs
CALLED = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: flags of these hooks, by their key in the dicts above
_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
#: dicts that a copy of a module does not share with it
_REGISTRIES = {"_parameters", "_buffers", "_modules"}
#: PyTorch's own hooks, which compute a weight from its parts before each call
_TORCH = ("torch.nn.utils.",)
#: "grad_checkpointing" (timm, open_clip), "gradient_checkpointing" (transformers), "use_checkpoint"
#: (Swin), "with_cp" (OpenMMLab)
_CHECKPOINTING = re.compile("checkpointing|(use|grad|gradient|activation)_checkpoint|^with_cp$")


def structural_copy(
    model: Tree,
    hooks: bool = False,
) -> Tree:
    """A copy of a module tree, in evaluation mode, that shares its parameters and buffers.

    Unlike ``copy.deepcopy`` it takes modules that hold on to activations, locks or files. One
    module under several names stays one module.

    Args:
        model: a module; it is not changed.
        hooks: also copy hooks that others have registered. Those that belong to the model
            (``copy_hooks``) are always copied. With the others goes the flag by which
            transformers 5 knows that a model has its hooks, so that a copy installs its own.
    """
    twins: dict[int, tuple[nn.Module, nn.Module]] = {}
    off = () if hooks else ("_output_capturing_hooks_installed",)

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in twins:  # one object under several names stays one
            return twins[id(module)][1]
        new = module.__class__.__new__(module.__class__)
        twins[id(module)] = module, new
        new.__dict__ = {
            key: (type(value)() if "_hooks" in key else value.copy())
            if isinstance(value, dict)
            else False
            if key in off
            else value
            for key, value in vars(module).items()
        }
        # of Module.compile(): it is bound to the original
        new.__dict__.pop("_compiled_call_impl", None)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else twin(child)
        new.training = False
        return new

    copied = twin(cast(nn.Module, model))
    if not hooks:
        without_checkpointing(copied)
    rebind_attributes(twins)
    copy_hooks(twins, every=hooks)
    return cast(Tree, copied)


def replace_parameters(
    module: nn.Module, replacement: Callable[[str, nn.Parameter], nn.Parameter]
) -> None:
    """Gives a copy of a module other parameters.

    Args:
        replacement: (name, parameter) -> the parameter that the copy has instead.
    """
    for path, child in module.named_modules():
        for leaf, x in child._parameters.items():
            if x is not None:
                child._parameters[leaf] = replacement(f"{path}.{leaf}" if path else leaf, x)


def own_buffers(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Replaces the buffers of a module by copies; floating point ones become ``dtype`` (None:
    they keep their type)."""
    for child in module.modules():
        for name, x in child._buffers.items():
            if x is not None:
                wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
                child._buffers[name] = x.detach().to(wanted, copy=True)


def without_checkpointing(model: nn.Module) -> bool:
    """Switches gradient checkpointing off in all modules that have a flag for it.

    Checkpointing computes the same numbers, but it runs parts of a forward again during the
    backward pass, when the results that a forward was given are gone.

    Returns:
        Whether a flag was on.
    """
    switched = False
    for module in model.modules():
        for name, value in vars(module).items():
            if value is True and _CHECKPOINTING.search(name):
                module.__dict__[name], switched = False, True
    return switched


def copy_hooks(twins: Mapping[int, tuple[nn.Module, nn.Module]], every: bool) -> None:
    """Gives the modules of a copied tree their hooks.

    A hook that is bound to a module of the tree (a method, a closure over it) belongs to the
    model: the forward may read what the hook writes, so the copy gets a hook that is bound to the
    copy. Hooks of ``torch.nn.utils`` (``weight_norm``, ``spectral_norm``, ``prune``) compute the
    weight, and are copied too.

    Args:
        twins: identity of each module -> the module and its copy.
        every: also copy the hooks that others have registered.
    """
    for module, new in twins.values():
        for kind in CALLED:
            kept = {}
            for key, hook in vars(module).get(kind, {}).items():
                bound = _rebound(hook, twins)
                is_torch = type(hook).__module__.startswith(_TORCH)
                if every or is_torch or bound is not hook:
                    kept[key] = bound
            new.__dict__.setdefault(kind, type(vars(module).get(kind, {}))()).update(kept)
            for flag in _FLAGS.get(kind, ()):
                flags = {k: x for k, x in vars(module).get(flag, {}).items() if k in kept}
                new.__dict__.setdefault(flag, type(vars(module).get(flag, {}))()).update(flags)


def rebind_attributes(twins: Mapping[int, tuple[nn.Module, nn.Module]]) -> None:
    """Binds plain attributes of a copied tree's modules to the copy: methods of a module of the
    tree, partial functions and closures over one, lists of them."""
    for module, new in twins.values():
        for name, value in vars(module).items():
            if name not in _REGISTRIES and not name.endswith("_hooks"):
                bound = _rebound(value, twins)
                if bound is not value:
                    new.__dict__[name] = bound


def _rebound(value: Any, twins: Mapping[int, tuple[nn.Module, nn.Module]], depth: int = 3) -> Any:
    """A hook, or a value in it, with the tree's modules replaced by their copies; the same object
    where it holds none of them."""
    if isinstance(value, nn.Module):
        return twins[id(value)][1] if id(value) in twins else value
    if depth == 0:
        return value
    rebind = functools.partial(_rebound, twins=twins, depth=depth - 1)
    if isinstance(value, MethodType):
        owner = rebind(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = [rebind(value.func), *map(rebind, value.args)]
        named = {name: rebind(x) for name, x in value.keywords.items()}
        old = [value.func, *value.args, *value.keywords.values()]
        if all(a is b for a, b in zip([*parts, *named.values()], old, strict=True)):
            return value
        function, *rest = parts
        return functools.partial(function, *rest, **named)
    if isinstance(value, FunctionType):
        return _rebound_function(value, rebind)
    if type(value) in (list, tuple, dict):
        old = list(value.values() if isinstance(value, dict) else value)
        new = list(map(rebind, old))
        if all(a is b for a, b in zip(new, old, strict=True)):
            return value
        pairs = zip(value, new, strict=True) if isinstance(value, dict) else new
        return type(value)(pairs)
    return value


def _rebound_function(function: FunctionType, rebind: Any) -> FunctionType:
    cells, changed = [], False
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        new = rebind(content)
        changed |= new is not content
        cells.append(cell if new is content else CellType(new))
    defaults = tuple(map(rebind, function.__defaults__ or ()))
    changed |= any(a is not b for a, b in zip(defaults, function.__defaults__ or (), strict=True))
    if not changed:
        return function
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults or None, tuple(cells)
    )
    new.__kwdefaults__ = copy.copy(function.__kwdefaults__)
    return new

"""The encode / fuse cut of any module: ``encode`` keeps results, ``fuse`` puts them back.

``fuse`` runs the module's own forward; submodules that had returned before the fusion started
return what they returned in ``encode`` instead of computing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .forward_pass import Call, ForwardPass, cut, finished, record_pass
from .outputs import alike, rebuilt, tensors

_DIGIT = 2**22  # integers travel as two float32 digits, exact up to 2^46


class Cut(BaseException):
    """Ends a forward pass where the fusion starts; passes by ``except Exception``."""


@dataclass
class Leaf:
    """A tensor among inputs and kept results.

    Attributes:
        shape: for one sample; ``dim`` the axis that grows with the batch.
        integer: its type, None for floating point ones.
        columns: where its values lie in the packed features, None: nobody reads them.
        overwritten: the module changes it in place later in the pass.
    """

    shape: tuple[int, ...]
    dim: int
    integer: torch.dtype | None
    columns: slice | None = None
    overwritten: bool = False

    @property
    def width(self) -> int:
        """The columns that it takes in the packed features; an integer takes two."""
        return torch.Size(self.shape).numel() * (1 if self.integer is None else 2)

    def pack(self, x: Tensor, batch: int) -> Tensor:
        """[batch, width]"""
        x = x.movedim(self.dim, 0).reshape(batch, -1)
        if self.integer is None:
            return x
        x = x.long()
        return torch.cat((x.remainder(_DIGIT), x.div(_DIGIT, rounding_mode="floor")), 1).float()

    def unpack(self, features: Tensor) -> Tensor:
        """The tensor of a batch, from the packed features [batch, columns]."""
        batch, grow = len(features), self.dim
        shape = list(self.shape)
        if self.columns is None:
            shape[grow] *= batch
            if self.integer is not None:
                return features.new_zeros((), dtype=self.integer).expand(shape)
            return features.new_full((), torch.nan).expand(shape)
        x = features[:, self.columns]
        if self.integer is not None:
            low, high = x.double().chunk(2, dim=1)
            x = (low + high * _DIGIT).to(self.integer)
        rest = [n for i, n in enumerate(shape) if i != grow]
        x = x.reshape(batch * shape[grow], *rest).movedim(0, grow)
        # a copy: what the module does in place must not reach the features
        return x.clone(memory_format=torch.contiguous_format)


@dataclass
class KeptResults:
    """Which results are kept and put back, from a pass over one sample and one over two.

    Attributes:
        leaves: tensors of the inputs, then of the kept results.
        inputs: how many of them are inputs.
        kept: submodule -> index of a call -> its result, with numbers of ``leaves`` for tensors.
        results: the same by the index of the call among those that ``fuse`` makes.
        stop: (submodule, index) of the call at which ``encode`` ends.
    """

    leaves: list[Leaf]
    inputs: int
    kept: dict[str, dict[int, Any]] = field(repr=False)
    results: dict[str, dict[int, Any]] = field(repr=False)
    stop: tuple[str, int] = ("", 0)

    @classmethod
    def find(
        cls,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        fusion: tuple[str, ...],
        tuned: set[str],
        names: tuple[str, ...] | None,
    ) -> tuple[KeptResults, ForwardPass]:
        """The plan, and what was seen of the pass over two samples.

        Args:
            inputs: two samples.
            fusion: names of the fusion modules.
            tuned: names of modules whose parameters are tuned, which always compute.
            names: of the modules to keep results of; None: all that can be.

        Raises:
            ValueError: the fusion is not called, or a result mixes the samples of a batch.
        """
        versions = [x._version for x in inputs]
        one = record_pass(module, module, tuple(x[:1].clone() for x in inputs))
        two = record_pass(module, module, inputs)
        if [(c.name, c.index) for c in one.calls] != [(c.name, c.index) for c in two.calls]:
            raise ValueError("the model calls other submodules for two samples than for one")
        time = cut(two, fusion)
        single = {(c.name, c.index): c.output for c in one.calls}
        chosen = _repeatable(two, single, time, tuned, names, _around_hooks(module))
        leaves, numbers = [], {}
        identities = [id(x) for x in inputs]
        for x, version in zip(inputs, versions, strict=True):
            leaves.append(_leaf(x[:1], x, "an input"))
            leaves[-1].overwritten = x._version != version
        kept: dict[str, dict[int, Any]] = {}
        results: dict[str, dict[int, Any]] = {}
        outermost = set(chosen)

        def inner(call: Call) -> bool:
            return not outermost.isdisjoint(call.stack)

        for call in chosen:
            ones = tensors(single[call.name, call.index])
            twos = zip(tensors(call.output), call.versions, strict=True)
            for a, (b, version) in zip(ones, twos, strict=True):
                numbers[id(b)] = len(leaves)
                leaves.append(_leaf(a, b, f"the result of {call.name}"))
                leaves[-1].overwritten = b._version != version
                identities.append(id(b))
            template = rebuilt(call.output, lambda x: _Number(numbers[id(x)]))
            kept.setdefault(call.name, {})[call.index] = template
            # calls inside a kept one are not made when its result is put back
            made = [c for c in two.calls if c.name == call.name and not inner(c)]
            results.setdefault(call.name, {})[made.index(call)] = template
        used = two.used(set(chosen), two.output)
        column = 0
        for leaf, identity in zip(leaves, identities, strict=True):
            if identity in used:
                leaf.columns = slice(column, column + leaf.width)
                column += leaf.width
        stop = next((c.name, c.index) for c in two.calls if c.start == time)
        return cls(leaves, len(inputs), kept, results, stop), two

    def encode(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Runs the module up to the fusion: what is kept, packed, [B, values].

        Raises:
            ValueError: the module runs otherwise than on the first batch.
        """
        if len(inputs) != self.inputs:
            raise ValueError(
                f"found {len(inputs)} inputs, the first batch had {self.inputs}; an adapted model "
                "takes the same inputs every time"
            )
        results: dict[int, Tensor] = dict(enumerate(inputs))
        inputs = tuple(
            x.clone() if leaf.overwritten else x
            for x, leaf in zip(inputs, self.leaves, strict=False)
        )
        with ExitStack() as hooks:
            for name, templates in self.kept.items():
                keep = _keeping(templates, self.leaves, results)
                hooks.callback(module.get_submodule(name).register_forward_hook(keep).remove)
            last = module.get_submodule(self.stop[0])
            hooks.callback(last.register_forward_pre_hook(_ending(self.stop[1])).remove)
            try:
                module(*inputs)
            except Cut:
                pass
            else:
                raise ValueError(
                    f"{self.stop[0]} was not called for this batch, as it was for the first one"
                )
        batch = len(inputs[0])
        parts = []
        for number, leaf in enumerate(self.leaves):
            if leaf.columns is None:
                continue
            if number not in results:
                raise ValueError("the model calls other submodules for this batch than for others")
            parts.append(leaf.pack(results[number], batch))
            if parts[-1].shape[1] != leaf.width:
                raise ValueError(
                    f"this batch gives {list(results[number].shape)} where the first gave "
                    f"{list(leaf.shape)} a sample; an adapted model takes inputs of one size"
                )
        if not parts:
            return inputs[0].new_empty((batch, 0), dtype=next(module.parameters()).dtype)
        return torch.cat(parts, dim=1)  # in the widest of their types

    @contextmanager
    def put_back(self, module: nn.Module, features: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """While it lasts, submodules return their kept results; yields the inputs to call with.

        Raises:
            ValueError: the features are of another cut (a saved state of another ModelSpec).
        """
        width = sum(leaf.width for leaf in self.leaves if leaf.columns is not None)
        if features.shape[1] != width:
            raise ValueError(
                f"features have {features.shape[1]} values a sample, needed {width}: they were "
                "encoded under another ModelSpec"
            )
        values: dict[int, Tensor] = {}

        def value(number: int) -> Tensor:
            if number not in values:
                values[number] = self.leaves[number].unpack(features)
            return values[number]

        changed = []
        for name, results in self.results.items():
            submodule = module.get_submodule(name)
            changed.append((submodule, vars(submodule).get("forward")))
            submodule.forward = _returning(submodule.forward, results, value)
        try:
            yield tuple(value(number) for number in range(self.inputs))
        finally:
            for submodule, before in changed:
                if before is None:
                    del submodule.forward
                else:
                    submodule.forward = before


def _around_hooks(module: nn.Module) -> set[str]:
    """Names of modules that hold one with hooks: the model may read what these record. (Those of
    ``torch.nn.utils`` compute a weight.)"""
    around: set[str] = set()
    for name, child in module.named_modules():
        hooks = (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
        if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
            parts = name.split(".")
            around |= {".".join(parts[:i]) for i in range(1, len(parts))}
    return around


class _Number(int):
    """Of a leaf, in the place of its tensor."""


def _repeatable(
    two: ForwardPass,
    single: dict[tuple[str, int], Any],
    time: int,
    tuned: set[str],
    names: tuple[str, ...] | None,
    around_hooks: set[str],
) -> list[Call]:
    """The outermost calls whose results can be put back: the same for one sample and for two but
    for the batch axis of their tensors. (Others, which return constants or shapes, are looked
    into; so are those around hooks, which run only where a module is called.)"""
    without = {(call.name, call.index) for call in two.calls if call.name in around_hooks}
    while True:
        chosen = finished(two, time, tuned, names, without)
        odd = set()
        for call in chosen:
            a, b = single[call.name, call.index], call.output
            grows = all(x.shape != y.shape for x, y in zip(tensors(a), tensors(b), strict=False))
            if not alike(a, b) or not grows:
                odd.add((call.name, call.index))
        if not odd:
            return chosen
        without |= odd


def _keeping(templates: dict[int, Any], leaves: list[Leaf], results: dict[int, Tensor]):
    counter = [0]

    def hook(_module, _inputs, output):
        template = templates.get(counter[0])
        counter[0] += 1
        numbers: list[int] = []
        rebuilt(template, numbers.append, _Number)
        for number, x in zip(numbers, tensors(output), strict=False):
            results[number] = x.clone() if leaves[number].overwritten else x

    return hook


def _ending(index: int):
    counter = [0]

    def hook(_module, _inputs):
        if counter[0] == index:
            raise Cut
        counter[0] += 1

    return hook


def _returning(compute, results: dict[int, Any], value):
    counter = [0]

    def forward(*args, **kwargs):
        index = counter[0]
        counter[0] += 1
        if index in results:
            return rebuilt(results[index], value, _Number)
        return compute(*args, **kwargs)

    return forward


def _leaf(one: Tensor, two: Tensor, what: str) -> Leaf:
    integer = None if one.is_floating_point() else one.dtype
    grown = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise ValueError(
            f"{what} has shape {list(one.shape)} for one sample and {list(two.shape)} for two: it "
            "mixes the samples of a batch, which fasttta does not split"
        )
    return Leaf(tuple(one.shape), grown[0], integer)

"""The encode / fuse cut of any module: results of its frozen submodules are kept and given again.

``fuse`` runs the module's own forward; submodules that had returned before the fusion started
give what they gave in ``encode`` instead of computing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .trees import rebuilt, tensors
from .watch import Watch, cut, finished, watch


class Cut(BaseException):
    """Ends a forward pass where the fusion starts; passes by ``except Exception``."""


@dataclass
class Leaf:
    """A tensor among inputs and kept results.

    Attributes:
        shape: for one sample; ``dim`` the axis that grows with the batch, None: constant.
        integer: its type, None for floating point ones.
        columns: where its values lie in the packed features, None: nobody reads them.
        overwritten: the module changes it in place later in the pass.
    """

    shape: tuple[int, ...]
    dim: int | None
    integer: torch.dtype | None
    columns: slice | None = None
    overwritten: bool = False

    def pack(self, x: Tensor, batch: int) -> Tensor:
        """[batch, values]"""
        if self.dim is None:
            return x.flatten().expand(batch, -1)
        return x.movedim(self.dim, 0).reshape(batch, -1)

    def unpack(self, features: Tensor) -> Tensor:
        batch, grow = len(features), self.dim
        shape = list(self.shape)
        if self.columns is None:
            if grow is not None:
                shape[grow] *= batch
            if self.integer is not None:
                return features.new_zeros((), dtype=self.integer).expand(shape)
            return features.new_full((), torch.nan).expand(shape)
        part = features[:, self.columns]
        if grow is None:
            x = part[0].reshape(shape)
        else:
            rest = [n for i, n in enumerate(shape) if i != grow]
            x = part.reshape(batch * shape[grow], *rest).movedim(0, grow)
        x = x if self.integer is None else x.to(self.integer)
        # of its own: what the module does in place must not reach the features
        return x.clone(memory_format=torch.contiguous_format)


@dataclass
class Replay:
    """What to keep and give again, found from two passes over one and over two samples.

    Attributes:
        leaves: tensors of the inputs, then of the kept results.
        kept: submodule -> index of a call -> its result, with numbers of ``leaves`` for tensors.
        stop: (submodule, index) of the call at which ``encode`` ends.
    """

    leaves: list[Leaf]
    inputs: int
    kept: dict[str, dict[int, Any]] = field(repr=False)
    stop: tuple[str, int] = ("", 0)

    # ------------------------------------------------------------------ finding it

    @classmethod
    def find(
        cls,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        fusion: tuple[str, ...],
        tuned: set[str],
        names: tuple[str, ...] | None,
    ) -> tuple[Replay, Watch]:
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
        one, two = watch(module, tuple(x[:1].clone() for x in inputs)), watch(module, inputs)
        if [(c.name, c.index) for c in one.calls] != [(c.name, c.index) for c in two.calls]:
            raise ValueError("the model calls other submodules for two samples than for one")
        time = cut(two, fusion)
        chosen = finished(two, time, tuned, names)
        single = {(c.name, c.index): c.output for c in one.calls}
        leaves, numbers = [], {}
        identities = [id(x) for x in inputs]
        for x, version in zip(inputs, versions, strict=True):
            leaves.append(_leaf(x[:1], x, "an input"))
            leaves[-1].overwritten = x._version != version
        kept: dict[str, dict[int, Any]] = {}
        for call in chosen:
            ones = list(tensors(single[call.name, call.index]))
            twos = zip(tensors(call.output), call.versions, strict=True)
            for a, (b, version) in zip(ones, twos, strict=True):
                numbers[id(b)] = len(leaves)
                leaves.append(_leaf(a, b, f"the result of {call.name}"))
                leaves[-1].overwritten = b._version != version
                identities.append(id(b))
            template = rebuilt(call.output, lambda x: _Number(numbers[id(x)]))
            kept.setdefault(call.name, {})[call.index] = template
        used = two.used(set(chosen), two.output)
        column = 0
        for leaf, identity in zip(leaves, identities, strict=True):
            if identity in used:
                width = torch.Size(leaf.shape).numel()
                leaf.columns = slice(column, column + width)
                column += width
        stop = next((c.name, c.index) for c in two.calls if c.start == time)
        return cls(leaves, len(inputs), kept, stop), two

    # ------------------------------------------------------------------ using it

    def encode(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Runs the module up to the fusion: what is kept, packed, [B, values]."""
        results: dict[int, Tensor] = dict(enumerate(inputs))
        inputs = tuple(
            x.clone() if leaf.overwritten else x
            for x, leaf in zip(inputs, self.leaves, strict=False)
        )
        counts: dict[str, int] = {}

        def keep(name: str):
            def hook(_module, _inputs, output):
                index = counts.get(name, 0)
                counts[name] = index + 1
                template = self.kept[name].get(index)
                numbers = () if template is None else _numbers(template)
                for number, x in zip(numbers, tensors(output), strict=False):
                    results[number] = x.clone() if self.leaves[number].overwritten else x

            return hook

        calls = [0]

        def end(_module, _inputs):
            if calls[0] == self.stop[1]:
                raise Cut
            calls[0] += 1

        with ExitStack() as hooks:
            for name in self.kept:
                handle = module.get_submodule(name).register_forward_hook(keep(name))
                hooks.callback(handle.remove)
            last = module.get_submodule(self.stop[0])
            hooks.callback(last.register_forward_pre_hook(end).remove)
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
            if leaf.columns is not None:
                part = leaf.pack(results[number], batch)
                if part.shape[1] != leaf.columns.stop - leaf.columns.start:
                    raise ValueError(
                        f"this batch gives {list(results[number].shape)} where the first gave "
                        f"{list(leaf.shape)} a sample; an adapted model takes inputs of one size"
                    )
                parts.append(part)
        floats = [x.dtype for x in parts if x.is_floating_point()]
        dtype = next(module.parameters()).dtype if not floats else floats[0]
        for other in floats[1:]:
            dtype = torch.promote_types(dtype, other)
        return torch.cat([x.to(dtype) for x in parts], dim=1)

    @contextmanager
    def given(self, module: nn.Module, features: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """While it lasts, kept results are given again; yields the inputs to call with."""
        values = {}

        def value(number: int) -> Tensor:
            if number not in values:
                values[number] = self.leaves[number].unpack(features)
            return values[number]

        changed = []
        for name, results in self.kept.items():
            submodule = module.get_submodule(name)
            changed.append((submodule, vars(submodule).get("forward")))
            submodule.forward = _giving(submodule.forward, results, value)
        try:
            yield tuple(value(number) for number in range(self.inputs))
        finally:
            for submodule, before in changed:
                if before is None:
                    del submodule.forward
                else:
                    submodule.forward = before


class _Number(int):
    """Of a leaf, in the place of its tensor."""


def _numbers(template: Any) -> list[int]:
    found: list[int] = []
    rebuilt(template, found.append, _Number)
    return found


def _giving(compute, results: dict[int, Any], value):
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
    if not grown:
        return Leaf(tuple(one.shape), None, integer)
    if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise ValueError(
            f"{what} has shape {list(one.shape)} for one sample and {list(two.shape)} for two: it "
            "mixes the samples of a batch, which fasttta does not split"
        )
    return Leaf(tuple(one.shape), grown[0], integer)

"""What an operator's kernels cost on a GPU, which its file declares beside schema and fake.

Nothing that runs reads this: ``fasttta.cost`` does, which counts a step without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Cost of one call, by the shapes of its arguments.

    Attributes:
        launches: kernels that start, PyTorch's own small ones included.
        flops: multiplications and additions of matrix products, in the type of the first argument
            that has two or more dimensions.
        share: how much of the rate of large matrix products the kernels are expected to reach.
        workspace: bytes written and read besides the arguments, which are read once, and the
            results, which are written once.
    """

    launches: int = 1
    flops: int = 0
    share: float = 1.0
    workspace: int = 0


def with_copies(cost: Cost, *tensors: Tensor | None) -> Cost:
    """The cost of kernels whose launcher first makes these tensors contiguous."""
    copied = [x for x in tensors if x is not None and not x.is_contiguous()]
    written = sum(x.numel() * x.element_size() for x in copied)
    return replace(
        cost, launches=cost.launches + len(copied), workspace=cost.workspace + 2 * written
    )

"""Tensors of the host on a device, packed into one copy."""

from __future__ import annotations

import pytest
import torch
from host_copies import HostCopies

from fasttta.views.transfer import to_device

TENSORS = [
    torch.arange(7),
    torch.rand(3, 5, dtype=torch.float64).T,
    torch.empty(0, 4),
    torch.tensor([True, False, True]),
    torch.rand(5),
    torch.randint(0, 255, (4, 3, 3), dtype=torch.uint8).permute(2, 0, 1),
    torch.tensor(3.5, dtype=torch.float64),
    torch.rand(1, 2, dtype=torch.bfloat16),
]


def test_the_same_tensors():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for x, y in zip(TENSORS, to_device(TENSORS, device), strict=True):
        assert y.device.type == device.type
        assert y.is_contiguous()
        assert x.dtype == y.dtype
        assert torch.equal(x, y.cpu())
        assert y.data_ptr() % 16 == 0 or not y.numel()


@pytest.mark.parametrize("tensors", [TENSORS, TENSORS[:1], []])
def test_one_copy(tensors):
    with HostCopies() as copies:
        moved = to_device(tensors, torch.device("meta"))
    assert [x.shape for x in moved] == [x.shape for x in tensors]
    assert len(copies.to_device) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_waits_for_nothing():
    torch.cuda.set_sync_debug_mode("error")
    try:
        to_device(TENSORS, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Checksums of bytes: three computations, one result; what they notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import without_native

from fasttta.ops import byte_sums as module
from fasttta.ops import native
from fasttta.ops.byte_sums import byte_sums

SIZES = (1, 7, 8, 9, 8191, 8192, 8193, 3 * 8192, 700_001)


def _exact(data: bytes) -> list[tuple[int, int]]:
    """The definition, in Python's integers."""
    data += bytes(-len(data) % 8192)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    keys = [int(k) & (2**64 - 1) for k in module._keys(torch.device("cpu")).tolist()]
    half, sums = 2**32, []
    for at in range(0, len(words), 1024):
        pair = []
        for moved in (0, 1):
            total = 0
            for word, key in zip(words[at : at + 1024], keys[moved:], strict=False):
                low = (word % half + key % half) % half
                total += low * ((word // half + key // half) % half)
            pair.append(total % 2**64)
        sums.append(tuple(pair))
    return sums


def _random(n, offset=0):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n + offset,), dtype=torch.uint8, generator=generator)[offset:]


@pytest.mark.parametrize("n", SIZES[:-1])
def test_definition(n):
    x = _random(n)
    sums = np.frombuffer(byte_sums([x]), dtype="<u8").reshape(-1, 2)
    assert [tuple(map(int, pair)) for pair in sums] == _exact(x.numpy().tobytes())


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("n", SIZES)
def test_three_computations_agree(monkeypatch, n, offset):
    """C++ (where it is), numpy, and what runs on a GPU, also in several groups."""
    x = _random(n, offset)
    expected = byte_sums([x])
    assert len(expected) == 16 * -(-n // 8192)
    without_native(monkeypatch)
    assert byte_sums([x]) == expected
    for size in (module._GROUP, 16384):
        monkeypatch.setattr(module, "_GROUP", size)
        parts = [module._sums(words) for words in module._groups([x])]
        assert torch.cat(parts).numpy().tobytes() == expected


def test_many_tensors_are_one_after_the_other():
    xs = [_random(n) for n in SIZES]
    assert byte_sums([*xs, torch.empty(0), xs[0]]) == b"".join(byte_sums([x]) for x in [*xs, xs[0]])
    words = list(module._groups(xs))
    assert torch.cat([module._sums(x) for x in words]).numpy().tobytes() == byte_sums(xs)


def test_every_bit_counts_at_its_place():
    x = torch.randn(4096)
    bits = x.view(torch.int32)
    seen = {byte_sums([x])}
    for place in (0, 1, 2, 1023, 2047, 2048, 4095):
        for bit in range(32):
            changed = bits.clone()
            changed[place] ^= (1 << bit) - (2**32 if bit == 31 else 0)
            seen.add(byte_sums([changed]))
    for i, j in ((0, 1), (0, 2), (1, 3), (0, 2048), (2047, 2048)):
        changed = x.clone()
        changed[[i, j]] = x[[j, i]]
        seen.add(byte_sums([changed]))
    # signs of pairs of values, which sums of products by odd numbers do not notice
    for i, j in ((1, 3), (1, 2049), (0, 1), (0, 2)):
        changed = x.clone()
        changed[[i, j]] *= -1
        seen.add(byte_sums([changed]))
    assert len(seen) == 1 + 7 * 32 + 5 + 4


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(6.0).view(2, 3).T, torch.randn(5, dtype=torch.complex64).conj(),
        torch.tensor(True), torch.eye(3).to_sparse(), torch.ones(3).bfloat16(),
    ],
    ids=["strided", "conjugate", "bool", "sparse", "half"],
)  # fmt: skip
def test_values_whatever_holds_them(x):
    dense = x.to_dense() if x.is_sparse else x
    assert byte_sums([x]) == byte_sums([dense.resolve_conj().contiguous().clone()])


def test_what_holds_no_bytes():
    with pytest.raises(TypeError, match="the bytes of a Tensor cannot be read: it holds no values"):
        byte_sums([torch.ones(3, device="meta")])


def test_under_modes():
    """Of default types, gradients and inference."""
    x = torch.randn(100, requires_grad=True)
    expected = byte_sums([x])
    with torch.inference_mode():
        assert byte_sums([x, x.clone()]) == 2 * expected
    try:
        torch.set_default_dtype(torch.float64)
        assert byte_sums([x]) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        (torch.ones(3), None, "data must be uint8"),
        (torch.ones(3, 3, dtype=torch.uint8), None, "data must be uint8"),
        (torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.int64), "keys must be int64"),
    ],
)
def test_kernel_refuses(data, keys, message):
    if not native.load():
        pytest.skip("no C++ kernels")
    keys = module._keys(torch.device("cpu")) if keys is None else keys
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fasttta.byte_sums(data, keys)

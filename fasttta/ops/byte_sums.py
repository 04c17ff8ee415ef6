"""Checksums of all bytes of many tensors, at the rate of memory: has any value changed?

A tensor's bytes, filled up with zeros, are chunks of 1,024 words of 64 bits. Of a chunk with words
w and fixed keys k, ``sum_i (low(w_i) + low(k_i)) * (high(w_i) + high(k_i))`` is taken twice, the
second time with the keys moved by one word; halves are added modulo 2^32, products and sums modulo
2^64. This is NH with a Toeplitz shift (Black et al., "UMAC", CRYPTO 1999): two contents that
were chosen without looking at the keys have equal sums with a chance of at most 2^-64 a chunk. All
words count, at their place, sign bits too. The keys are public, so that whoever wants two contents
with equal sums can make them: against that a cache of one's own computations needs no guard.

One product a word and no dependence between words: C++ reads 20 GB/s on one core (AMD EPYC with
AVX-512, weights in memory), numpy without a compiler 3, where CRC-32 reads 4 and blake2b 1.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from . import native
from .registry import define, ops

_WORDS = 1024
_BYTES = 8 * _WORDS
_HALF = 0xFFFFFFFF
_ROWS = 64  # chunks that numpy takes together: 512 kB stay in the second cache
_GROUP = 2**26  # bytes that a GPU takes together, so that it is launched for few times


def _fake(data, keys):
    return keys.new_empty((-(-data.numel() // _BYTES), 2))


define("byte_sums(Tensor data, Tensor keys) -> Tensor", _fake, cpp=True)


@functools.lru_cache(maxsize=16)
def _keys(device: torch.device) -> Tensor:
    """[1025] int64, the same everywhere."""
    stream = hashlib.shake_256(b"fasttta byte_sums").digest(8 * (_WORDS + 1))
    with torch.inference_mode(False):
        keys = torch.from_numpy(np.frombuffer(stream, dtype="<i8").astype(np.int64))
        return keys.to(device)


def byte_sums(tensors: Sequence[Tensor]) -> bytes:
    """16 bytes for every 8,192 bytes of each tensor's values in the order of its elements, whatever
    its strides; the same numbers on every device. Values of a GPU are not read on the host: one
    copy of all sums is, at the end.

    Raises:
        TypeError: a tensor whose bytes cannot be read, such as one on the meta device.
    """
    with torch.inference_mode(False), torch.no_grad():
        pieces = [x for x in map(_bytes_of, tensors) if x.numel()]
        sums = []
        for device, together in groupby(pieces, key=lambda x: x.device):
            if device.type != "cpu":
                rows = [_sums(group) for group in _groups(together)]
            elif native.loaded or native.load():
                rows = [ops.byte_sums(x, _keys(device)) for x in together]
            else:
                rows = [torch.from_numpy(_numpy_sums(x.numpy())) for x in together]
            sums.append(torch.cat(rows).cpu())
        return b"".join(x.numpy().tobytes() for x in sums)


def sums_size(x: Tensor) -> int:
    """How many of the bytes that ``byte_sums`` returns are of this tensor."""
    return 16 * -(-x.numel() * x.element_size() // _BYTES)


def _bytes_of(x: Tensor) -> Tensor:
    """A tensor's values as uint8 [n]."""
    try:
        x = x.detach()
        if x.layout != torch.strided:
            x = x.to_dense()
        x = x.resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = x.view(torch.uint8)
        if data.device.type == "meta":
            raise TypeError("it holds no values")
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise TypeError(f"the bytes of a {type(x).__name__} cannot be read: {reason}") from error
    return data


def _numpy_sums(data: np.ndarray) -> np.ndarray:
    """uint8 [n] -> sums [chunks, 2] int64, on one thread as the C++ kernel."""
    keys = _keys(torch.device("cpu")).numpy().view("<u4")  # low and high halves in turn
    rest = np.zeros(-len(data) % _BYTES, dtype=np.uint8)
    whole = len(data) // _BYTES * _BYTES
    sums = []
    for part in (data[:whole], np.concatenate([data[whole:], rest])):
        halves = part.view("<u4").reshape(-1, 2 * _WORDS)
        for at in range(0, len(halves), _ROWS):
            pair = []
            for moved in (keys[: 2 * _WORDS], keys[2:]):
                word = (halves[at : at + _ROWS] + moved).view("<u8")
                pair.append(np.einsum("ij,ij->i", word & np.uint64(_HALF), word >> np.uint64(32)))
            sums.append(np.stack(pair, axis=1))
    return np.concatenate(sums).view(np.int64)


def _groups(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Consecutive tensors of bytes, each filled up to whole chunks, as words [chunks, 1024]."""
    group: list[Tensor] = []
    size = 0
    for piece in pieces:
        for part in piece.split(_GROUP):
            group += [part, part.new_zeros(-len(part) % _BYTES)]
            size += len(part)
            if size >= _GROUP:
                yield torch.cat(group).view(torch.int64).view(-1, _WORDS)
                group, size = [], 0
    if group:
        yield torch.cat(group).view(torch.int64).view(-1, _WORDS)


def _sums(words: Tensor) -> Tensor:
    """Words [n, 1024] -> sums [n, 2]; what overflows wraps round."""
    keys, high = _keys(words.device), words >> 32
    sums = []
    for key in (keys[:-1], keys[1:]):
        low = (words + key).bitwise_and_(_HALF)
        sums.append(low.mul_((high + (key >> 32)).bitwise_and_(_HALF)).sum(dim=1))
    return torch.stack(sums, dim=1)

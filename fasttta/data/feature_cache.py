"""Encoder outputs on disk, for methods, seeds and options that come after the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.result import warn
from ..protocols import FusionModel
from .feature_keys import model_key, named_key, sample_keys
from .feature_shards import NAME, PART, Shards, clear_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_MARK = "fasttta-features.txt"
_MARK_TEXT = "Encoder outputs kept by fasttta.data.FeatureCache. May be deleted at any time.\n"
_PART_SECONDS = 3600.0


class Batch(NamedTuple):
    """What a loader may yield for ``Adapted.stream``: a batch whose samples have names.

    A FeatureCache then looks at 64 values of each input in place of all. An id must stand for the
    content: the same clip under another corruption or crop is another sample.

    Args:
        inputs: the model's inputs [n, ...], a tuple of tensors.
        ids: n strings or integers, or a tensor [n] of integers. PyTorch's default collation makes
            such a batch from samples ``Batch((audio, video), index)``.
    """

    inputs: tuple[Tensor, ...]
    ids: Sequence[str | int] | Tensor


class FeatureCache:
    """Keeps encoder outputs in a folder: ``adapted.stream(loader, cache=FeatureCache(folder))``.

    Used by methods with frozen encoders, which share features whatever their options and seed. A
    sample is known by its content (or ``Batch``), so that the order does not matter. A model is
    known by every byte of its weights and buffers, its settings, precision and ModelSpec, the names
    of its classes and the versions of their packages, of PyTorch and of fasttta: features of
    another model are never used, nor deleted. Code is not looked at. After you edit a forward or a
    function of the spec, take another folder, another ``key=``, or another ``__version__`` of the
    package that the model lies in; the old features would be used without a word.

    Weights are read again for every group of batches, whoever may have written to them (``.data``,
    numpy, another process): 41 ms for the 658 MB of a ViT-B CAV-MAE, 1 % of encoding 8 samples (one
    thread of an AMD EPYC; 0.3 s where there is no C++ compiler), and once more for features that
    are new, which are kept only if nothing changed while they were computed. ``key=`` saves that
    time for a promise.

    With features of another batch size, or from another device, results may differ within the float
    noise of the precision; otherwise ``"fp32"`` gives back what was computed bit for bit, and
    results are those without a cache. ``"bf16"`` halves the folder and rounds features to 8 bits,
    in the run that computes them too, so that all runs agree.

    Features are written whenever ``shard_mb`` have come together (a CAV-MAE sample in fp32 takes
    2.2 MB) and when a stream ends, fails or is closed; a killed process loses those still in memory
    and no others. Processes may share a folder, threads not an object. A damaged shard is removed
    with a RuntimeWarning and its samples are encoded again; features that cannot be written (a
    full disk) are given up with one.

    Args:
        folder: made if it does not exist; must be empty or a feature cache.
        dtype: ``"fp32"``, ``"bf16"``, or ``"fp64"`` for ``precision="fp64"``. Features that are
            narrower than this are stored as they are.
        key: a name for the model, such as ``"my-model-v3"``, in place of its contents, which are
            then not read. The user promises that under one key weights, buffers, settings, code and
            spec are always the same; precision and dtype are still part of the name. A broken
            promise gives features of other weights without a word.
        shard_mb: megabytes of features in a file, at most 256 samples.

    Attributes:
        hits, misses: samples that were found, and those that had to be encoded.

    Raises:
        ValueError: an unknown dtype, an empty key, shard_mb not above 0, or a folder that holds
            something else.
        TypeError: a key that is no string.
        OSError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        dtype: str = "fp32",
        *,
        key: str | None = None,
        shard_mb: float = 64.0,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; known: {', '.join(map(repr, DTYPES))}")
        if isinstance(shard_mb, bool) or not isinstance(shard_mb, (int, float)) or not shard_mb > 0:
            raise ValueError(f"shard_mb={shard_mb!r}: needed megabytes above 0")
        if key is not None and not isinstance(key, str):
            raise TypeError(f"key must be a string that names the model, found {key!r:.80}")
        if key is not None and not key.strip():
            raise ValueError(
                f"key={key!r}: needed a name for the model, or None to read its weights"
            )
        self.folder, self.dtype, self.shard_mb = Path(folder), dtype, shard_mb
        self.key = key
        self.hits = self.misses = 0
        self._shards: dict[str, Shards] = {}
        _open(self.folder)

    def flush(self) -> None:
        """Writes the features that are still in memory."""
        for shards in self._shards.values():
            shards.flush()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __repr__(self) -> str:
        return (
            f"FeatureCache({os.fspath(self.folder)!r}, dtype={self.dtype!r}, key={self.key!r}, "
            f"hits={self.hits}, misses={self.misses})"
        )

    def of(self, model: FusionModel, precision: str) -> Kept:
        """The features of one model, as steps in a precision run it.

        Raises:
            ValueError: float64 features would be rounded.
        """
        if precision == "fp64" and self.dtype == "fp32":
            raise ValueError(
                'dtype="fp32" would round the float64 features of precision="fp64"; needed '
                'FeatureCache(folder, dtype="fp64")'
            )
        return Kept(self, model, precision)

    def shards(self, kind: str) -> Shards:
        """The files of one kind of features."""
        if kind not in self._shards:
            self._shards[kind] = Shards(self.folder, kind, self.shard_mb * 1e6)
        return self._shards[kind]


class Kept:
    """The features of one model in a cache."""

    def __init__(self, cache: FeatureCache, model: FusionModel, precision: str) -> None:
        self._cache, self._model, self._precision = cache, model, precision
        self._last = ""
        self._warned = False

    keys = staticmethod(sample_keys)

    def _kind(self) -> str:
        """The name of the model's features as it is now.

        Raises:
            TypeError: weights whose values cannot be read.
        """
        cache = self._cache
        if cache.key is not None:
            return named_key(cache.key, self._precision, cache.dtype)
        try:
            return model_key(self._model, self._precision, cache.dtype)
        except TypeError as error:
            raise TypeError(
                f"{error}; name the model yourself: FeatureCache(folder, key=...)"
            ) from error

    def features(
        self,
        keys: list[str],
        inputs: tuple[Tensor, ...],
        encode: Callable[[tuple[Tensor, ...]], Tensor],
    ) -> Tensor:
        """Features [n, ...] of a batch; those that are not kept are computed together, and kept.

        Args:
            keys: of the samples (``sample_keys``).
            inputs: [n, ...] each.
            encode: inputs of some of the samples -> their features.
        """
        kind = self._kind()  # of every batch: weights may change in the middle of a stream
        if self._last not in ("", kind):  # or a model in training would leave rows in memory
            self._cache.shards(self._last).flush()
        self._last = kind
        rows, missing, computed = self._cache.shards(kind).read(keys)
        self._cache.misses += len(missing)
        self._cache.hits += len(keys) - len(missing)
        if len(missing) == len(keys) or rows is None or computed is None:  # all three, or none
            return self._computed(kind, keys, inputs, encode)
        if missing:
            at = torch.tensor(missing, device=inputs[0].device)
            fresh = self._computed(
                kind, [keys[i] for i in missing], tuple(x[at] for x in inputs), encode
            )
            if fresh.shape[1:] != rows.shape[1:] or fresh.dtype != computed:
                return self._computed(kind, keys, inputs, encode)
            rows = rows.to(computed)
            rows[missing] = fresh.cpu()
        return rows.to(inputs[0].device, computed)

    def _computed(
        self,
        kind: str,
        keys: list[str],
        inputs: tuple[Tensor, ...],
        encode: Callable[[tuple[Tensor, ...]], Tensor],
    ) -> Tensor:
        fresh = encode(inputs)
        if not isinstance(fresh, Tensor) or not fresh.is_floating_point() or fresh.ndim < 2:
            shape = list(fresh.shape) if isinstance(fresh, Tensor) else type(fresh).__name__
            raise TypeError(
                f"a feature cache keeps one floating point tensor [B, ...] a batch, found {shape} "
                "as the encoders' output; stream without cache"
            )
        dtype = DTYPES[self._cache.dtype]
        dtype = dtype if dtype.itemsize < fresh.dtype.itemsize else fresh.dtype
        stored = fresh.detach().to("cpu", dtype).contiguous()
        if self._kind() == kind:
            self._cache.shards(kind).add(keys, stored, fresh.dtype)
        elif not self._warned:
            self._warned = True
            warn(
                "weights or buffers of the model changed while its features were computed (does "
                "its forward count calls?): they are not kept; where such a change has no effect "
                "on features, FeatureCache(folder, key=...) names the model without reading it",
                RuntimeWarning,
            )
        return fresh if dtype == fresh.dtype else stored.to(fresh)


def _open(folder: Path) -> None:
    """Makes a folder a feature cache, or finds that it is one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={os.fspath(folder)!r} is a file; needed a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = os.listdir(folder)
    if _MARK not in names:
        other = [x for x in names if not x.startswith(".") and not x.endswith(PART)]
        other = [x for x in other if not NAME.fullmatch(x)]
        if other:
            raise ValueError(
                f"folder={os.fspath(folder)!r} holds something else ({', '.join(other[:3])}); "
                "needed an empty folder, one that does not exist, or a feature cache"
            )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"folder={os.fspath(folder)!r} cannot be written to")
    if _MARK not in names:
        (folder / _MARK).write_text(_MARK_TEXT)
    clear_parts(folder, _PART_SECONDS)

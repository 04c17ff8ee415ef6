"""Models that count what they encode, and folders of features."""

from __future__ import annotations

from pathlib import Path

from cases import METHODS, same

import fasttta


def counting(adapted):
    """``adapted.encoded``: how many samples its encoders took, call by call."""
    working = adapted._hidden[1]
    encode, adapted.encoded = working.encode, []

    def counted(*inputs):
        adapted.encoded.append(len(inputs[0]))
        return encode(*inputs)

    # in a class that passes for ours: attributes and code of a model are part of its key
    cls = type(working)
    working.__class__ = type(
        cls.__name__, (cls,), {"__module__": "fasttta", "encode": staticmethod(counted)}
    )
    return adapted


def adapting(model, method="read", **options):
    """An adapted model that counts how many samples it encodes."""
    return counting(fasttta.adapt(model, method, **{**METHODS[method], **options}))


def shards(folder):
    """The files of features in a folder."""
    return sorted(Path(folder).glob("*.safetensors"))


def all_same(a, b):
    """Whether two lists of results agree bit for bit."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))

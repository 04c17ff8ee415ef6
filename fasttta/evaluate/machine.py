"""What a measurement ran on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .. import __version__
from ..environment import processor


def machine() -> dict[str, Any]:
    """Processor, threads and versions, JSON-ready; no names of hosts, users or paths."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fasttta": __version__,
    }

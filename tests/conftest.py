"""Shared fixtures: golden vectors, the small official model; how tests are spread over cores."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import cases
import goldens
import pytest

# threads that spin while they wait make tiny models ten times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cases import METHODS
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the checkout on sys.path, and with it a top-level `kernels`
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def _hide_broken_torchvision() -> None:
    """Packages of models import torchvision where it is installed, and fail with it where it is of
    another build than PyTorch. Without it they work."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # an ImportError from now on


_hide_broken_torchvision()

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# the workers of one run share the cores: a worker with as many threads as there are cores would
# wait for the others at every operation
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, min(2, CORES // WORKERS)))

MOST_WORKERS = 8  # each one needs a GiB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs on a worker a core where no -n is given: not for a single file, which is done before the
    workers have imported PyTorch, and not on a GPU, whose memory they would share."""
    option = config.option
    if getattr(option, "numprocesses", 0) is not None or hasattr(config, "workerinput"):
        return  # asked for, without xdist, or a worker itself
    paths = {Path(arg.partition("::")[0]).resolve() for arg in config.args}
    few = len(paths) == 1 and not any(path.is_dir() for path in paths)
    if not (few or option.usepdb or option.collectonly or torch.cuda.is_available()):
        option.numprocesses = min(CORES, MOST_WORKERS) if CORES > 1 else 0
        if option.dist == "no":
            option.dist = "worksteal"


class Golden:
    """The vectors of the audio-visual methods."""

    FILES = ("abpem", "abpem_attn_only", "abpem_cache", "abpem_softbal", "inputs", "kernels",
             "model", "read", "tent_eta_sar")  # fmt: skip

    def __init__(self) -> None:
        files = [f"abpem/{name}.safetensors" for name in self.FILES]
        self.root = goldens.require("abpem/golden.json", *files) / "abpem"
        self.json = json.loads((self.root / "golden.json").read_text())
        self.inputs = self.load("inputs")
        self.steps = sum(f"step{s}.audio" in self.inputs for s in range(3))

    def load(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / f"{name}.safetensors")

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[f"step{step}.audio"], self.inputs[f"step{step}.video"]


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def atpt_kernels() -> dict[str, torch.Tensor]:
    """Float64 vectors of A-TPT's operations: total variation, ensemble, losses."""
    file = "atpt/kernels_f64.safetensors"
    return load_file(goldens.require(file) / file)


@pytest.fixture(scope="session")
def golden_model(golden):
    """The official model of width 48; nothing may change it."""
    from fasttta.models import CAVMAE

    return CAVMAE.from_checkpoint(golden.root / "model.safetensors", num_heads=4)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=METHODS)
def method(request):
    """Every method's name; its options are in cases.METHODS."""
    return request.param


@pytest.fixture
def tiny_model():
    """Makes CAV-MAEs of odd sizes: 6 + 4 tokens of width 12, 7 classes."""
    return cases.tiny_model


@pytest.fixture
def tiny_batch():
    """Makes batches for tiny_model: audio [n, 6, 8], video [n, 3, 6, 6]."""

    def make(n: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(seed)
        audio = torch.randn(n, 6, 8, generator=generator, dtype=dtype)
        return audio, torch.randn(n, 3, 6, 6, generator=generator, dtype=dtype)

    return make

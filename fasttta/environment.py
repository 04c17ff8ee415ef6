"""What fasttta finds on this machine: ``fasttta doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import __version__
from .ops import autograd, schema

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "nvtx", "ninja")


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _operations() -> dict[str, dict[str, str]]:
    """For every operation, which implementations there are, from the dispatcher itself."""
    found = {}
    for name in schema.SCHEMAS:
        if name.endswith("_backward"):
            continue  # comes with its forward

        def registered(key: str, name: str = name) -> bool:
            return torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttta::{name}", key)

        found[name] = {
            "default": "composite" if registered("CompositeExplicitAutograd") else "missing",
            "reference": "live",
            "triton": "live" if registered("CUDA") else "no kernel in this version",
            "cpp": "live" if registered("CPU") else "no kernel in this version",
        }
    return found


def diagnose() -> dict[str, Any]:
    """Versions, processor, GPU, and which backends of which operation are live, JSON-ready."""
    assert autograd.ops is torch.ops.fasttta
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "compute_capability": f"{properties.major}.{properties.minor}",
                }
            )
    return {
        "fasttta": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "processor": {
            "name": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "simd": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {"built_for": torch.version.cuda, "gpus": gpus},
        "engines": {
            "eager": "live",
            "graph": "captured steps are not in this version",
        },
        "precision_auto": "bf16 on GPUs that have it, else fp32; a float64 model stays in float64",
        "operations": _operations(),
    }


def table(found: dict[str, Any]) -> str:
    """What ``diagnose`` found, as text."""
    cpu, cuda = found["processor"], found["cuda"]
    versions = ", ".join(f"{name} {v or 'missing'}" for name, v in found["packages"].items())
    gpus = "; ".join(
        f"{g['name']}, {g['memory_gib']} GiB, sm_{g['compute_capability'].replace('.', '')}"
        for g in cuda["gpus"]
    )
    built = f"torch is built for CUDA {cuda['built_for']}" if cuda["built_for"] else (
        "torch is a CPU build"
    )  # fmt: skip
    lines = [
        f"fasttta     {found['fasttta']} on Python {found['python']}",
        f"packages    {versions}",
        f"processor   {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['simd']}",
        f"GPU         {gpus or f'none that torch can use; {built}'}",
        *(f"engine      {name}: {state}" for name, state in found["engines"].items()),
        "",
        f"{'operation':<22}" + "".join(f"{name:<12}" for name in ("default", "reference"))
        + f"{'triton':<28}cpp",
    ]  # fmt: skip
    for name, backends in found["operations"].items():
        lines.append(
            f"{name:<22}{backends['default']:<12}{backends['reference']:<12}"
            f"{backends['triton']:<28}{backends['cpp']}"
        )
    return "\n".join(lines)

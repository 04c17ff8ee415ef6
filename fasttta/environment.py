"""What fasttta finds on this machine: ``fasttta doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import __version__
from .ops import backends, native, schema

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


def _native() -> dict[str, Any]:
    """The C++ kernels; builds them if that was not tried, as the first use on a CPU does."""
    outcome, compiler = native.attempt(), native.compiler()
    return {
        "mode": native.mode(),
        "library": None if outcome.path is None else str(outcome.path),
        "why_not": outcome.reason or None,
        "compiler": compiler and f"{compiler}: {native.version(compiler).splitlines()[0]}",
        "cache": str(native.cache_folder()),
    }


def _operations() -> dict[str, dict[str, str]]:
    """For every operation what serves it on a CPU and on a GPU, from the dispatcher itself, and
    which backends can be asked for, or why not."""
    found = {}
    for name in schema.SCHEMAS:
        if name.endswith("_backward"):
            continue  # comes with its forward
        found[name] = {
            "cpu": "cpp" if backends.has_kernel(name, "CPU") else "composite",
            "cuda": "triton" if backends.has_kernel(name, "CUDA") else "composite",
            **{backend: backends.refusal(name, backend) or "live" for backend in backends.BACKENDS},
        }
    return found


def diagnose() -> dict[str, Any]:
    """Versions, processor, GPU, and which backends of which operation are live, JSON-ready."""
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
            "graph": "live" if gpus else "captured steps need a GPU",
        },
        "precision_auto": "bf16 on GPUs that have it, else fp32; a float64 model stays in float64",
        "native": _native(),  # before the operations: it loads what they then have
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
    cpp = found["native"]
    lines = [
        f"fasttta     {found['fasttta']} on Python {found['python']}",
        f"packages    {versions}",
        f"processor   {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['simd']}",
        f"GPU         {gpus or f'none that torch can use; {built}'}",
        *(f"engine      {name}: {state}" for name, state in found["engines"].items()),
        f"C++         {cpp['library'] or cpp['why_not']} (FASTTTA_NATIVE={cpp['mode']})",
        f"compiler    {cpp['compiler'] or 'none'}; cache {cpp['cache']}",
        "",
        f"{'operation':<22}{'on a CPU':<12}on a GPU",
        *(f"{name:<22}{x['cpu']:<12}{x['cuda']}" for name, x in found["operations"].items()),
        "",
        'backend="reference" is live for every operation; not live are',
    ]
    reasons: dict[str, list[str]] = {}
    for name, states in found["operations"].items():
        for backend in ("triton", "cpp"):
            if states[backend] != "live":
                reason = states[backend].removeprefix(f"{name} ")
                reasons.setdefault(f"{backend:<8}{reason}", []).append(name)
    lines += [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
    return "\n".join(lines)

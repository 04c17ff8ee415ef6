"""Versions, devices and live backends on this machine: ``fasttta doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any

import torch

from . import __version__
from .ops import native, native_build, registry
from .ops.scaled_rows import emulated

_PACKAGES = ("torch", "numpy", "safetensors", "nvtx", "ninja")
# package name for pip -> purpose
_OPTIONAL = {
    "triton": "kernels on GPUs (PyTorch's CUDA builds bring it)",
    "matplotlib": "reports: their charts",
    "jinja2": "reports: their HTML pages",
    "tokenizers": "class names of CLIP models as token ids",
    "transformers": "Hugging Face's CLIP and its relatives",
    "open_clip_torch": "open_clip's CLIP models",
    "peft": "models with LoRA, to be merged first",
    "pillow": "images as PIL takes them",
    "soundfile": "audio files",
    "soxr": "audio at another rate",
}


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


def _install(package: str) -> str:
    """How to install an optional package: by the extra that names it, where there is one."""
    try:
        required = importlib.metadata.requires("fasttta") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        required = []
    for requirement in required:
        name, _, extra = requirement.partition("extra ==")
        match = re.match(r"[\w.-]+", name)
        extra = extra.strip(" '\"()")
        if match and match[0].lower() == package and extra and extra not in ("test", "dev"):
            return f"pip install 'fasttta[{extra}]'"
    return f"pip install {package}"


def _optional() -> dict[str, dict[str, str | None]]:
    return {
        name: {"version": _version(name), "purpose": purpose, "install": _install(name)}
        for name, purpose in _OPTIONAL.items()
    }


def _native() -> dict[str, Any]:
    """State of the C++ kernels. Builds them if nothing has tried yet, as the first use on a CPU
    would."""
    outcome, compiler = native.attempt(), native.compiler()
    try:
        cache, note = str(native.cache_folder()), native.cache_note()
    except OSError as error:
        cache, note = "none", str(error)
    try:
        version = compiler and f"{compiler}: {native_build.version(compiler).splitlines()[0]}"
    except (OSError, subprocess.SubprocessError, IndexError):
        version = f"{compiler} (it does not answer --version)"
    return {
        "mode": native.mode(),
        "library": None if outcome.path is None else str(outcome.path),
        "why_not": outcome.reason or None,
        "compiler": version,
        "cache": cache,
        "cache_note": note,
    }


def _operations() -> dict[str, dict[str, str]]:
    """For every operation: the backend on a CPU and on a GPU, as the dispatcher has it, and
    which backends can be requested, or why not."""
    operations = {}
    registry.operations()  # imports the files of all operations
    for name, operator in sorted(registry.OPERATORS.items()):
        if operator.default is None or name.endswith("_backward"):
            continue  # parts of other operations, and backward operations
        operations[name] = {
            "cpu": "cpp" if registry.has_kernel(name, "CPU") else "composite",
            "cuda": "triton" if registry.has_kernel(name, "CUDA") else "composite",
            **{backend: registry.refusal(name, backend) or "live" for backend in registry.BACKENDS},
        }
    return operations


def _float8(gpus: int) -> str:
    """Where ``precision="fp8"`` multiplies float8, and why not elsewhere."""
    devices = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    reasons = [emulated(device) for device in devices]
    return "; ".join(
        f"{device}: live" if reason is None else f"{device}: emulated, slower than bf16: {reason}"
        for device, reason in zip(devices, reasons, strict=True)
    )


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
        "optional": _optional(),
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
            "auto": "graph for CAV-MAE on a GPU with fasttta's own methods, else eager",
        },
        "precision_auto": "bf16 on GPUs that have it, else fp32; a float64 model stays in float64",
        "precision_fp8": _float8(len(gpus)),
        "native": _native(),  # before the operations: this loads their C++ kernels
        "operations": _operations(),
    }


def table(state: dict[str, Any]) -> str:
    """What ``diagnose`` returns, as text."""
    cpu, cuda = state["processor"], state["cuda"]
    versions = ", ".join(f"{name} {v or 'missing'}" for name, v in state["packages"].items())
    gpus = "; ".join(
        f"{g['name']}, {g['memory_gib']} GiB, sm_{g['compute_capability'].replace('.', '')}"
        for g in cuda["gpus"]
    )
    built = f"torch is built for CUDA {cuda['built_for']}" if cuda["built_for"] else (
        "torch is a CPU build"
    )  # fmt: skip
    cpp = state["native"]
    note = f" ({cpp['cache_note']})" if cpp["cache_note"] else ""
    operations = state["operations"]
    width = max(map(len, operations)) + 2
    lines = [
        f"fasttta     {state['fasttta']} on Python {state['python']}",
        f"packages    {versions}",
        f"processor   {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['simd']}",
        f"GPU         {gpus or f'none that torch can use; {built}'}",
        *(f"engine      {name}: {word}" for name, word in state["engines"].items()),
        f"fp8         {state['precision_fp8']}",
        f"C++         {cpp['library'] or cpp['why_not']} (FASTTTA_NATIVE={cpp['mode']})",
        f"compiler    {cpp['compiler'] or 'none'}; cache {cpp['cache']}{note}",
        *_optional_lines(state["optional"]),
        "",
        f"{'operation':<{width}}{'on a CPU':<12}on a GPU",
        *(f"{name:<{width}}{x['cpu']:<12}{x['cuda']}" for name, x in operations.items()),
        "",
        'backend="reference" is live for every operation; not live are',
    ]
    reasons: dict[str, list[str]] = {}
    for name, states in operations.items():
        for backend in ("triton", "cpp"):
            if states[backend] != "live":
                reason = states[backend].removeprefix(f"{name} ")
                reasons.setdefault(f"{backend:<8}{reason}", []).append(name)
    lines += [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
    return "\n".join(lines)


def _optional_lines(packages: dict[str, dict[str, str | None]]) -> list[str]:
    width = max(map(len, packages)) + 2
    return [
        f"optional    {name:<{width}}"
        f"{about['version'] or 'not installed: ' + str(about['install'])} ({about['purpose']})"
        for name, about in packages.items()
    ]

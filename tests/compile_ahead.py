"""Compiles the kernels for a family of GPUs, without one, and reports what each kernel uses.

    python tests/compile_ahead.py sm_90 [--all] [--only NAME] [--json]

Exits with 1 if a kernel spills registers or needs more than a block of the GPU has. Needs torch and
triton alone. The launchers run on tensors without memory, so the compiled kernels are those that
they would start, with the same plans and specialisations. --all adds shapes and types to the core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_MEMORY = 512  # columns, of sm_100
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
AUDIO_VIDEO = [512, 196]  # tokens of a ViT-B's two modalities; 12 heads of 64


def family(target: str) -> str:
    """The family that the target's plans are made for."""
    capability = TARGETS[target].arch
    return _kernels("launch_plan").family(capability // 10) if target[:2] == "sm" else target


def _kernels(name: str):
    """Imports a module of kernels/, whether or not the package is installed."""
    package = types.ModuleType("kernels_ahead")
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules.setdefault("kernels_ahead", package)
    return importlib.import_module(f"kernels_ahead.{name}")


def _packed(batch, heads, spans, d, dtype):
    """q and k [B, H, T, d] as views of a packed qkv product."""
    qkv = torch.empty(batch, sum(spans), 3, heads, d, dtype=dtype, device="meta")
    return qkv.permute(2, 0, 3, 1, 4)[:2]


def _float(*shape):
    return torch.empty(shape, device="meta")


def attention(batch, heads, spans, d, dtype, moments=False, each=False):
    """attention_bootstrap, and score_moments if asked for, of the head mean or of each head."""
    loss, ops = _kernels("attention_bootstrap"), _kernels("score_moments")
    q, k = _packed(batch, heads, spans, d, dtype)
    options = spans, d**-0.5, each
    _, mean, std = loss.attention_bootstrap(q, k, *options, False)
    loss.attention_bootstrap_backward(_float(batch), q, k, mean, std, *options, False)
    if moments:
        ops.score_moments(q, k, *options)
        ops.score_moments_backward(mean, std, q, k, std, *options)


def head(n, classes, dtype, weighted=False):
    """adaptation_head and the entropies."""
    head, rows = _kernels("adaptation_head"), _kernels("entropies")
    logits = torch.empty(n, classes, dtype=dtype, device="meta")
    weight = _float(n) if weighted else None
    k = max(1, classes // 11)
    head.adaptation_head(logits, k, 1.0, 1.0, weighted, 1e-6, weight)
    rows.principal_entropy_backward(_float(n), logits, k, 1e-6)
    rows.entropy(logits)


def maps(n, height, width, classes, dtype=FP32):
    """total_variation and reliability_ensemble."""
    ops = _kernels("total_variation")
    x = torch.empty(n, height, width, dtype=dtype, device="meta")
    ops.total_variation(x)
    ops.total_variation_backward(_float(n), x)
    ops.reliability_ensemble(x, torch.empty(n, classes, dtype=dtype, device="meta"), 1.0)


def blocks(tokens, width, hidden, residual=FP32, half=BF16):
    """What lies between the products of a frozen block, of one that passes gradients on, and of one
    whose LayerNorm is tuned."""
    norms, activations = _kernels("residual_layer_norm"), _kernels("gelu")
    x = torch.empty(8, tokens, width, dtype=residual, device="meta")
    y = torch.empty(8, tokens, width, dtype=half, device="meta")
    weight = torch.empty(width, dtype=residual, device="meta")
    for branch in (None, y):
        total, n, stats = norms.residual_layer_norm(x, branch, weight, weight, 1e-5, half)
        total = x if branch is None else total
        for other, affine in ((total, False), (total, True), (None, False)):
            outputs = half, True, branch is not None, affine
            norms.residual_layer_norm_backward(n, other, total, stats, weight, *outputs)
    before = torch.empty(8, tokens, hidden, dtype=half, device="meta")
    for name in ("gelu", "quick_gelu"):
        getattr(activations, name)(before)
        getattr(activations, f"{name}_backward")(before, before)
    bias = torch.empty(hidden, dtype=half, device="meta")
    activations.gelu(before, bias)
    activations.gelu_backward(before, before, bias)


def flat(batch, classes, d, dtype=FP32, shared=True):
    """flat_attention of 8 heads, whose queries the batch may share."""
    ops = _kernels("flat_attention")
    k, v = torch.empty(2, batch, 8, classes, d, dtype=dtype, device="meta")
    q = k[:1] if shared else k
    saved = ops.flat_attention(q, k, v, 1.0)
    ops.flat_attention_backward(v, q, k, v, *saved, 1.0)


def prefix(batch, sequences, prefix, d, dtype=FP32, last=False):
    """shared_prefix_attention of 8 heads and of sequences of four tokens, 16 in a tile."""
    ops = _kernels("shared_prefix_attention")
    rows, tokens = 3 * 8 * d, 4 * sequences
    q, k, v = torch.empty(batch, tokens, rows, dtype=dtype, device="meta").chunk(3, dim=-1)
    shared = torch.empty(batch, prefix, rows, dtype=dtype, device="meta").chunk(3, dim=-1)[1:]
    q = torch.empty(batch, sequences, 8 * d, dtype=dtype, device="meta") if last else q
    starts, tiles = (
        torch.empty(n + 1, dtype=torch.int32, device="meta") for n in (sequences, sequences // 16)
    )
    layout = starts, tiles, 4, 8, d**-0.5
    out, lse = ops.shared_prefix_attention(q, k, v, *shared, *layout)
    ops.shared_prefix_attention_backward(out, q, k, v, *shared, out, lse, *layout)


def float8(n, width, dtype=BF16):
    """scaled_rows with each activation, and scaled_layer_norm."""
    rows, norm = _kernels("scaled_rows"), _kernels("scaled_layer_norm")
    x = torch.empty(n, width, dtype=dtype, device="meta")
    for activation in ("", "gelu", "quick_gelu"):
        rows.scaled_rows(x, activation)
    residual, affine = _float(n, width), (_float(width), _float(width))
    for branch in (x, None):
        norm.scaled_layer_norm(residual, branch, *affine, 1e-5)


#: targets whose instructions convert to e4m3; elsewhere these rows are made by PyTorch's calls
FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")


CORE = {
    "attention-bf16-32": (attention, 32, 12, AUDIO_VIDEO, 64, BF16),
    "attention-fp32-32": (attention, 32, 12, AUDIO_VIDEO, 64, FP32),
    "each-bf16": (attention, 32, 12, AUDIO_VIDEO, 64, BF16, False, True),
    "head-bf16-309": (head, 128, 309, BF16),
    "head-bf16-100000": (head, 64, 100_000, BF16),
    "maps-grid": (maps, 64, 14, 14, 100),
    "maps-pixel": (maps, 64, 224, 224, 1000),
    "blocks-bf16": (blocks, 708, 768, 3072),
    "flat-fp32": (flat, 6, 1000, 64),
    "prefix-fp32": (prefix, 6, 1024, 5, 64),
    "float8-768": (float8, 5664, 768),
}
CLASSES = ((8, 50), (128, 309), (64, 1000), (64, 4096), (64, 100_000))
ALL = {
    **CORE,
    "attention-bf16-8": (attention, 8, 12, AUDIO_VIDEO, 64, BF16),
    "attention-bf16-128": (attention, 128, 12, AUDIO_VIDEO, 64, BF16),
    "attention-fp16-32": (attention, 32, 12, AUDIO_VIDEO, 64, HALF),
    "attention-fp16-8": (attention, 8, 12, AUDIO_VIDEO, 64, HALF, True),
    "attention-fp32-8": (attention, 8, 12, AUDIO_VIDEO, 64, FP32),
    "attention-bf16-80": (attention, 32, 16, AUDIO_VIDEO, 80, BF16),
    "attention-bf16-three": (attention, 32, 12, [512, 196, 77], 64, BF16, True),
    "each-fp16": (attention, 32, 12, AUDIO_VIDEO, 64, HALF, True, True),
    "each-fp32": (attention, 32, 12, AUDIO_VIDEO, 64, FP32, False, True),
    "each-bf16-three": (attention, 32, 12, [512, 196, 77], 64, BF16, True, True),
    **{f"head-bf16-{c}-weighted": (head, n, c, BF16, True) for n, c in CLASSES},
    **{f"head-bf16-{c}": (head, n, c, BF16) for n, c in CLASSES},
    **{f"head-fp32-{c}": (head, n, c, FP32) for n, c in CLASSES},
    "head-fp16-1000": (head, 64, 1000, HALF),
    "maps-grid-fp16": (maps, 64, 14, 14, 100, HALF),
    "maps-grid-wide": (maps, 64, 16, 16, 1000),
    "maps-pixel-bf16": (maps, 64, 224, 224, 1000, BF16),
    **{f"flat-fp32-{d}": (flat, 6, 1000, d, FP32, False) for d in (16, 80, 128)},
    **{f"flat-bf16-{d}": (flat, 6, 1000, d, BF16) for d in (64, 128)},
    "flat-fp16": (flat, 6, 1000, 64, HALF),
    "blocks-fp16": (blocks, 197, 768, 3072, FP32, HALF),
    "blocks-fp32": (blocks, 708, 768, 3072, FP32, FP32),
    "blocks-bf16-alone": (blocks, 77, 512, 2048, BF16, BF16),
    **{f"blocks-bf16-{d}": (blocks, 577, d, 4 * d) for d in (32, 1024, 1280, 4096)},
    **{f"prefix-fp32-{d}": (prefix, 6, 1024, 5, d) for d in (16, 20)},
    **{f"prefix-fp32-{p}-before": (prefix, 6, 1024, p, 64) for p in (0, 1, 20, 40)},
    "prefix-fp32-last": (prefix, 6, 1024, 20, 64, FP32, True),
    **{f"prefix-bf16-{d}": (prefix, 6, 1024, 5, d, BF16) for d in (20, 64, 80, 128)},
    **{f"prefix-bf16-{p}-before": (prefix, 6, 1024, p, 64, BF16) for p in (20, 40)},
    "prefix-bf16-128-40-before": (prefix, 6, 1024, 40, 128, BF16),
    "prefix-bf16-last": (prefix, 6, 1024, 20, 64, BF16, True),
    "prefix-bf16-128-last": (prefix, 6, 1024, 40, 128, BF16, True),
    "prefix-fp16": (prefix, 6, 1024, 5, 64, HALF),
    **{f"float8-{d}": (float8, 5664, d) for d in (48, 512, 1024, 3072, 4096, 16384)},
    "float8-fp32-768": (float8, 5664, 768, FP32),
    "prefix-fp16-20-before": (prefix, 6, 1024, 20, 64, HALF),
    "prefix-fp16-last": (prefix, 6, 1024, 5, 64, HALF, True),
}


class Offline:
    """A Triton driver that only names the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def is_active(self):
        return True


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", out))
    return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"])}


def _amd_usage(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    return {
        "registers": field("vgpr_count"),
        "spilled": field("vgpr_spill_count") + field("private_segment_fixed_size"),
    }


def usage(kernel) -> dict[str, int]:
    """Uses of a compiled kernel: registers, spilled and shared bytes, columns of tensor memory."""
    if "cubin" in kernel.asm:
        registers = _cubin_usage(kernel.asm["cubin"])
    else:
        registers = _amd_usage(kernel.asm["amdgcn"])
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    return registers | {"shared": kernel.metadata.shared, "tensor_memory": columns}


def compile_all(target: str, cases: dict) -> list[dict]:
    """Compiles the kernels of some cases, each once; a row for each kernel."""
    triton.runtime.driver.set_active(Offline(TARGETS[target]))
    launch, seen, rows, case = _kernels("launch"), set(), [], ""

    def record(kernel, plan, *args):
        start = time.perf_counter()
        options = launch.options(plan, target.startswith("sm"))
        compiled = kernel.warmup(*args, grid=plan.grid, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        seconds = time.perf_counter() - start
        blocks = {n: v for n, v in plan.constants.items() if re.fullmatch("B[A-Z]", n)}
        rows.append(
            {
                "case": case, "kernel": kernel.__name__, "blocks": blocks, "warps": plan.warps,
                "stages": plan.stages, **usage(compiled), "seconds": round(seconds, 1),
            }
        )  # fmt: skip

    launch.run, launch.architecture = record, lambda x: family(target)
    for case, (build, *sizes) in cases.items():  # noqa: B007 - record reads case
        if build is not float8 or target in FLOAT8:
            build(*sizes)
    return rows


def problems(target: str, rows: list[dict]) -> list[str]:
    """What kernels use beyond what the target has, and what they spill."""
    limit = _kernels("launch_plan").SHARED_MEMORY[family(target)]
    lanes = TARGETS[target].warp_size
    messages = []
    for row in rows:
        name = f"{target} {row['case']} {row['kernel']} {row['blocks']}"
        if row["spilled"]:
            messages.append(f"{name}: {row['spilled']} bytes of registers spilled")
        if row["shared"] > limit:
            shared = f"{row['shared']} bytes of shared memory"
            messages.append(f"{name}: {shared}, a block has {limit}")
        if row["tensor_memory"] > TENSOR_MEMORY:  # such a kernel is compiled to nothing
            columns = row["tensor_memory"]
            memory = f"{columns} columns of tensor memory"
            messages.append(f"{name}: {memory}, an SM has {TENSOR_MEMORY}")
        # registers of an SM of NVIDIA's, and of each of the four SIMDs of a CU of AMD's
        nvidia = target.startswith("sm")
        threads = row["warps"] * lanes // (1 if nvidia else 4)
        if row["registers"] * threads > (65536 if nvidia else 32768):
            messages.append(f"{name}: {row['registers']} registers a thread")
    return messages


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all", action="store_true", help="every shape and type, not the core")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = {n: c for n, c in (ALL if options.all else CORE).items() if options.only in n}
    rows = compile_all(options.target, chosen)
    messages = problems(options.target, rows)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": rows, "problems": messages}))
    else:
        print(f"Triton {triton.__version__}, {options.target}: {len(rows)} kernels")
        for row in rows:
            print(*row.values())
        print(*messages, sep="\n")
    sys.exit(bool(messages))

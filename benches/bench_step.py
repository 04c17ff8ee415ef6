"""A whole adaptation step against the official formulation, written out here in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
import time

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

import fasttta
import fasttta.trace
from fasttta.data import FeatureCache
from fasttta.data.feature_keys import model_key
from fasttta.models import CAVMAE
from fasttta.ops import byte_sums, processor
from fasttta.ops.adaptation_head import adaptation_head_reference
from fasttta.ops.attention_bootstrap import gaussian_kl
from fasttta.ops.entropies import entropy_reference
from fasttta.ops.scaled_rows import emulated

CUDA = torch.cuda.is_available()
# A bench has the same id on every processor, so that results of one can be compared on another.
PRECISIONS = ("bf16", "fp32", "fp8")


def _lacks(precision: str) -> str | None:
    """Why a precision is not timed here: its products are emulated, slower than fp32."""
    if precision == "fp8":
        return emulated(torch.device("cuda" if CUDA else "cpu"))
    has_bf16 = CUDA or processor.bf16_vectors() or processor.bf16_tiles()
    return None if precision == "fp32" or has_bf16 else "this processor has no products in bf16"


# of the largest logit: measured 3e-7 on the CPU (Adam turns the sign of a gradient that is noise
# into a full update)
FP32_TOLERANCE = 1e-4
# ours is 3.5e-3 off in logits and loss (ViT-B, one sample and four, EPYC with avx512_bf16)
BF16_TOLERANCE = 5e-2
# 4.7e-2 off in logits and 6.7e-2 in the loss (ViT-B of random weights, one sample, emulated)
FP8_TOLERANCE = 0.2
# name -> method, options, samples in a batch; the published settings on a GPU
SETTINGS = {
    "k50": ("abpem", {"k": 8, "window": 4}, 8),
    "vgg": ("abpem", {"k": 28, "window": 4}, 32),
    "no queue": ("abpem", {"k": 8, "window": 1}, 64),
    "latency": ("abpem", {"k": 8, "window": 1}, 1),
    "read": ("read", {}, 64),
    "tent": ("tent", {}, 64),
}
if not CUDA:
    SETTINGS = {
        "queue of 4": ("abpem", {"k": 8, "window": 4}, 4),
        "no queue": ("abpem", {"k": 8, "window": 1}, 4),
        "latency": ("abpem", {"k": 8, "window": 1}, 1),
        "read": ("read", {}, 4),
        "tent": ("tent", {}, 4),
    }
ENGINES = ("graph", "eager") if CUDA else ("eager",)


class OfficialStep:
    """READ, ABPEM or TENT as their code computes them.

    Attention is materialised in every block; ABPEM's statistics are those of the head-mean of the
    raw scores, T x T a sample; autograd and torch.optim.Adam; the prediction of READ and ABPEM
    from a second pass through the fusion block. Encoders run once a step (the official READ runs
    them again for the prediction: that would count in our favour).
    """

    def __init__(self, model: CAVMAE, method: fasttta.methods.Method, precision: str) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.method, self.precision = method, precision
        tuned = {slot.parameter for slot in method.tuned(model).values()}
        self.parameters = [p for name, p in self.model.named_parameters() if name in tuned]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters, lr=method.lr)
        self.queue: list[Tensor] = []

    def _block(self, block, x: Tensor, split: bool = False) -> tuple[Tensor, Tensor]:
        b, t, dim = x.shape
        attn, h = block.attn, block.norm1(x)
        if split:
            rows = zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True)
            qkv = torch.cat([nnf.linear(h, weight, bias) for weight, bias in rows], dim=-1)
        else:
            qkv = attn.qkv(h)
        qkv = qkv.reshape(b, t, 3, attn.heads, dim // attn.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * attn.scale  # [B, H, T, T]
        x = x + attn.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, dim))
        return x + block.mlp.fc2(nnf.gelu(block.mlp.fc1(block.norm2(x)))), scores

    def _encode(self, audio: Tensor, video: Tensor) -> Tensor:
        model, tokens = self.model, []
        for x, embed, position, modality, blocks in (
            (audio.unsqueeze(1).transpose(2, 3), model.patch_embed_a, model.pos_embed_a,
             model.modality_a, model.blocks_a),
            (video, model.patch_embed_v, model.pos_embed_v, model.modality_v, model.blocks_v),
        ):  # fmt: skip
            x = embed.proj(x).flatten(2).transpose(1, 2) + position + modality
            for block in blocks:
                x, _ = self._block(block, x)
            tokens.append(x)
        return torch.cat(tokens, dim=1)

    def _fuse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.model.blocks_u:
            x, scores = self._block(block, x, split=self.method.name != "tent")
        return self.model.mlp_head(self.model.norm(x).mean(dim=1)), scores

    def _gap(self, scores: Tensor) -> Tensor:
        scores = scores.float().mean(dim=1)  # [B, T, T]
        split = self.model.spans[0]
        a, v = slice(None, split), slice(split, None)

        def moments(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
            block = scores[:, rows, columns]
            return block.mean((1, 2)), block.std((1, 2))

        aa, vv = ([x.detach() for x in moments(part, part)] for part in (a, v))
        return gaussian_kl(*moments(v, a), *aa) + gaussian_kl(*moments(a, v), *vv)

    def _update(self, total: Tensor) -> None:
        self.optimizer.zero_grad()
        total.backward()
        total.item()
        self.optimizer.step()

    def __call__(self, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, total loss) of the step."""
        low = self.precision in ("bf16", "fp8")
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=low):
            tokens = self._encode(audio, video)
            if self.method.name == "tent":
                logits, _ = self._fuse(tokens)
                total = entropy_reference(logits).mean()
            elif self.method.name == "read":
                logits, _ = self._fuse(tokens)
                total, *_ = adaptation_head_reference(logits, 1, 1.0, 1.0, True, 0.0)
            else:
                past = self.queue[len(self.queue) - min(len(self.queue), self.method.window - 1) :]
                self.queue = [*past, tokens]
                logits, scores = self._fuse(torch.cat(self.queue))
                total, *_ = adaptation_head_reference(logits, self.method.k, 1.0, 1.0, False, 1e-6)
                total = total + self._gap(scores).mean()
        self._update(total)
        if self.method.name != "tent":
            with torch.no_grad(), torch.autocast(audio.device.type, torch.bfloat16, enabled=low):
                logits, _ = self._fuse(tokens)
        return logits.detach().float(), total.detach()


@pytest.fixture(scope="module")
def model(full, device) -> CAVMAE:
    """ViT-B CAV-MAE of random weights; a tiny one without --benchmark."""
    torch.manual_seed(0)
    if full:
        made = CAVMAE(50)
    else:
        made = CAVMAE(7, dim=12, num_heads=3, audio_tokens=6, video_tokens=4, depth=(1, 2, 1),
                      patch_audio=(4, 2), patch_video=(3, 3))  # fmt: skip
    # the modalities far enough apart for the attention loss to be of the other losses' size
    for embedding in (made.modality_a, made.modality_v):
        torch.nn.init.normal_(embedding)
    return made.eval().to(device)


def _case(setting, model, device, full, precision, engine):
    """The adapted model, the official step, a batch, the method's options."""
    small = precision == "fp8" and (not full or setting == "tent")
    if reason := _lacks(precision) or (small and "nothing of it is in float8"):
        pytest.skip(reason)
    method, options, batch = SETTINGS[setting]
    shapes = ((1024, 128), (3, 224, 224)) if full else ((6, 8), (3, 6, 6))
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(
        torch.randn(batch if full else 3, *s, generator=generator).to(device) for s in shapes
    )
    options = options if full or "k" not in options else {**options, "k": 3}
    adapted = fasttta.adapt(model, method, precision=precision, engine=engine, **options)
    return adapted, OfficialStep(model, adapted.options, precision), inputs, options


def _limits(precision, model, official, run):
    """What measure() compares the outputs of a step with, and how closely.

    In bf16 the noise depends on the processor: the official step under autocast was 0.5 % to 9 % of
    the largest logit off its own fp32 numbers (ViT-B, one sample or four), ours 0.35 %: to compare
    with that step would say nothing. So both are compared with an official step in fp32 that takes
    its turn with them, and ours may not be off by more than ``BF16_TOLERANCE``.

    Args:
        run: what the reference does with an official step.
    """
    if precision == "fp32":
        return {"tolerance": FP32_TOLERANCE, "official": "fp32"}
    exact = OfficialStep(model, official.method, "fp32")
    if precision == "fp8":
        limit = {"tolerance": FP8_TOLERANCE, "official": "bf16 autocast"}
        return limit | {"exact": lambda: run(exact)}
    return {
        "exact": lambda: run(exact),
        "rounding": torch.finfo(torch.bfloat16).eps,
        "most": BF16_TOLERANCE if model.dim == 768 else None,  # tiny models are further off
        "official": "bf16 autocast",
    }


def _flops(model: CAVMAE, samples: int, window: int) -> int:
    """Multiplications and additions of a step's matrix products at least, attention included: the
    encoders and, for the batches of the window, fusion forward and backward, once more forward for
    the prediction."""
    dim, (ta, tv) = model.dim, model.spans

    def block(tokens: int) -> int:
        return 2 * tokens * 12 * dim * dim + 4 * tokens * tokens * dim

    encoders = len(model.blocks_a) * block(ta) + len(model.blocks_v) * block(tv)
    fusion = len(model.blocks_u) * block(ta + tv)
    return samples * (encoders + fusion * (2 * window + 1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(x, marks=[pytest.mark.long] * (x not in ("no queue", "latency")))
        for x in SETTINGS
    ],
)
def bench_step(setting, precision, engine, model, device, full, measure):
    adapted, official, inputs, options = _case(setting, model, device, full, precision, engine)
    window = options.get("window", 1)

    def ours():
        result = adapted.step(*inputs)
        return result.logits, result.losses["total"]

    measure(
        ours,
        lambda: official(*inputs),
        **_limits(precision, model, official, lambda step: step(*inputs)),
        checks=window + 1,  # the last has a full window, and sees the updates of the others
        rounds=200 if CUDA and setting == "latency" else 20 if CUDA or setting == "latency" else 5,
        warmup=3 if CUDA else 0,  # the checks have run both
        queued=False,
        memory=True,
        samples=len(inputs[0]),
        shape=f"batch {len(inputs[0])}",
        headline=True,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        flops=_flops(model, len(inputs[0]), window),
        # what a step must read at least: the weights and the inputs, once
        bytes=sum(x.nbytes for x in (*inputs, *model.parameters())),
        breakdown=breakdown(_case(setting, model, device, full, precision, "eager")[0], inputs),
    )


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.parametrize("setting", list(SETTINGS)[:3])
def bench_compiled_step(setting, model, device, full, measure):
    """What torch.compile makes of the official step's passes, against the step as it is."""
    precision = "bf16" if CUDA else "fp32"
    _, official, inputs, options = _case(setting, model, device, full, precision, "eager")
    compiled = OfficialStep(model, official.method, precision)
    mode = "reduce-overhead" if CUDA else "default"
    encode, compiled._fuse = (
        torch.compile(x, mode=mode) for x in (compiled._encode, compiled._fuse)
    )
    # replayed graphs overwrite their results, and the queue keeps these
    compiled._encode = lambda *inputs: encode(*inputs).clone()
    measure(
        lambda: compiled(*inputs),
        lambda: official(*inputs),
        **_limits(precision, model, official, lambda step: step(*inputs)),
        checks=options["window"] + 1,
        rounds=20 if CUDA else 3,
        warmup=3 if CUDA else 0,
        queued=False,
        memory=True,
        samples=len(inputs[0]),
        shape=f"batch {len(inputs[0])}",
        mode=mode,
    )


@pytest.mark.long
@pytest.mark.parametrize("precision", PRECISIONS)
def bench_stream(precision, model, device, full, measure):
    """Four batches whose samples are encoded together, against the official steps on them."""
    adapted, official, inputs, _ = _case("no queue", model, device, full, precision, ENGINES[0])
    batches = [tuple(x.roll(i, 0) for x in inputs) for i in range(4)]
    size = 4 * len(inputs[0]) if CUDA else len(inputs[0])

    def ours():
        results = list(adapted.stream(batches, encode_batch=size))
        return results[-1].logits, results[-1].losses["total"]

    def theirs(step):
        return [step(*batch) for batch in batches][-1]

    measure(
        ours,
        lambda: theirs(official),
        **_limits(precision, model, official, theirs),
        rounds=10 if CUDA else 1,
        warmup=1 if CUDA else 0,
        queued=False,
        samples=4 * len(inputs[0]),
        shape=f"4 batches of {len(inputs[0])}",
        headline=CUDA,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        flops=4 * _flops(model, len(inputs[0]), 1),
        bytes=sum(x.nbytes for x in (*inputs, *inputs, *inputs, *inputs, *model.parameters())),
    )


def bench_cached_features(model, device, full, measure, tmp_path):
    """What a second method on a cached stream spends on features, against encoding them."""
    adapted, _, inputs, _ = _case("read", model, device, full, "fp32", "eager")
    first, batches = FeatureCache(tmp_path), [inputs]
    list(adapted.stream(batches, cache=first))
    second = FeatureCache(tmp_path).of(adapted._hidden[1], adapted.precision)
    prepared = adapted._step.prepare(inputs)

    def nothing(inputs):
        raise AssertionError("everything was to be found in the cache")

    measure(
        lambda: (second.features(second.keys(prepared, None), prepared, nothing),),
        lambda: (adapted._step.encode(prepared),),
        tolerance=0.0,
        rounds=5,
        queued=False,
        samples=len(inputs[0]),
        shape=f"batch {len(inputs[0])}, keys of the samples' bytes",
    )


def bench_model_key(model, device, full, measure):
    """What a cache reads of the weights for every group of batches, against encoding 8 samples."""
    adapted, _, inputs, _ = _case("read", model, device, full, "fp32", "eager")
    working, weights = adapted._hidden[1], list(adapted._hidden[1].parameters())
    prepared = adapted._step.prepare(tuple(torch.cat((x, x))[: 8 if full else 2] for x in inputs))

    def plain() -> tuple[Tensor, ...]:
        groups = byte_sums._groups(map(byte_sums._bytes_of, weights))
        return (torch.cat([byte_sums._sums(words) for words in groups]).cpu(),)  # as ours

    def ours() -> tuple[Tensor, ...]:
        data = bytearray(byte_sums.byte_sums(weights))
        return (torch.frombuffer(data, dtype=torch.int64).view(-1, 2),)

    measure(
        lambda: (model_key(working, adapted.precision, "fp32"),),
        parts=[(1, lambda: (adapted._step.encode(prepared),))],
        check=(ours, plain),
        tolerance=0.0,
        rounds=5,
        queued=False,
        shape=f"all weights, against a batch of {len(prepared[0])}",
        dtype=torch.float32,
        bytes=sum(x.nbytes for x in weights),
    )


def breakdown(adapted: fasttta.Adapted, inputs: tuple[Tensor, ...]) -> str:
    """Milliseconds of the ranges of its second eager step, each measured to its end (on a GPU with
    waiting, so their sum is more than an undisturbed step's time; "fuse" is part of others)."""
    seconds: dict[str, float] = {}
    device = inputs[0].device

    @contextlib.contextmanager
    def timed(name: str):
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasttta.trace, "span", timed)
        adapted.step(*inputs)
        seconds.clear()
        adapted.step(*inputs)
    text = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in seconds.items())
    print(f"\nms: {text}")
    return text


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

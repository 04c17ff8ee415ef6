"""A whole adaptation step against the official formulation, written out here in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

import fasttta
from fasttta.models import CAVMAE
from fasttta.ops import reference

CUDA = torch.cuda.is_available()
PRECISIONS = ("bf16", "fp32") if CUDA else ("fp32",)
# of the largest logit: fp32 measured 3e-7 on the CPU (Adam turns the sign of a gradient that is
# noise into a full update); two bf16 computations of ViT-B differ by about 0.01
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


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

    def _block(self, block, x: Tensor) -> tuple[Tensor, Tensor]:
        b, t, dim = x.shape
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.heads, dim // attn.heads)
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
            x, scores = self._block(block, x)
        return self.model.mlp_head(self.model.norm(x).mean(dim=1)), scores

    def _gap(self, scores: Tensor) -> Tensor:
        scores = reference.wide(scores).mean(dim=1)  # [B, T, T]
        split = self.model.spans[0]
        a, v = slice(None, split), slice(split, None)

        def moments(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
            block = scores[:, rows, columns]
            return block.mean((1, 2)), block.std((1, 2))

        aa, vv = ([x.detach() for x in moments(part, part)] for part in (a, v))
        return reference.gaussian_kl(*moments(v, a), *aa) + reference.gaussian_kl(
            *moments(a, v), *vv
        )

    def _update(self, total: Tensor) -> None:
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def __call__(self, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, total loss) of the step."""
        low = self.precision == "bf16"
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=low):
            tokens = self._encode(audio, video)
            if self.method.name == "tent":
                logits, _ = self._fuse(tokens)
                total = reference.entropy(logits).mean()
            elif self.method.name == "read":
                logits, _ = self._fuse(tokens)
                total, *_ = reference.adaptation_head(logits, 1, 1.0, 1.0, True, 0.0)
            else:
                past = self.queue[len(self.queue) - min(len(self.queue), self.method.window - 1) :]
                self.queue = [*past, tokens]
                logits, scores = self._fuse(torch.cat(self.queue))
                total, *_ = reference.adaptation_head(logits, self.method.k, 1.0, 1.0, False, 1e-6)
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["abpem", "read", "tent"])
def bench_step(method, precision, model, device, full, measure):
    batch = (8 if CUDA else 4) if full else 3
    generator = torch.Generator().manual_seed(1)
    shapes = ((1024, 128), (3, 224, 224)) if full else ((6, 8), (3, 6, 6))
    audio, video = (torch.randn(batch, *s, generator=generator).to(device) for s in shapes)
    options = {"k": 8 if full else 3, "window": 4 if CUDA else 1} if method == "abpem" else {}
    adapted = fasttta.adapt(model, method, precision=precision, **options)
    official = OfficialStep(model, adapted.options, precision)

    def ours():
        result = adapted.step(audio, video)
        return result.logits, result.losses["total"]

    def theirs():
        return official(audio, video)

    measure(
        ours,
        theirs,
        tolerance=TOLERANCES[precision],
        checks=4 if CUDA else 2,  # the second sees the first's update; the fourth a full window
        rounds=20 if CUDA else 2,
        warmup=3 if CUDA else 0,  # the checks have run both
        queued=False,
        memory=CUDA,  # on the CPU not worth another two steps
        samples=batch,
        shape=f"batch {batch}",
        window=options.get("window", 1),
        # what a step must read at least: the weights and the inputs, once
        bytes=sum(x.nbytes for x in (audio, video, *model.parameters())),
    )

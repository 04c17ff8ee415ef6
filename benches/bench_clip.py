"""Methods for single images on a CLIP of ViT-B/16's size against the official loop, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import fasttta
from fasttta.data import Views
from fasttta.functional import entropy, marginal_entropy
from fasttta.methods.view_ensemble import similarity_weights
from fasttta.models import CLIP
from fasttta.models.clip.text import Prompts
from fasttta.models.clip.vision_transformer import (
    EPS,
    layernorm_inner,
    normalise_map,
    rollout_code,
    token_weights,
)

CUDA = torch.cuda.is_available()
VIEWS = 64 if CUDA else 16
# name tokens, mean and largest: Pets, FGVC Aircraft, SUN397, ImageNet
NAMES = {37: (2.16, 4), 100: (5.24, 8), 397: (1.98, 5), 1000: (2.17, 12)}
PROMPT = 4
CHUNK = 37  # classes that the reference's text tower is timed on
# of the largest output: AdamW turns a gradient that is rounding noise into a full step
TOLERANCE = 5e-3
# the same in bf16, unless the official loop under autocast is further off: of the official loop in
# fp32 ours was 0.8 % off in logits and 6.6 % in attention, that one 1.6 % and 6.8 % (EPYC)
BF16_ROUNDING = 2**-5


def class_ids(classes: int, full: bool) -> Tensor:
    """Token ids [C, L]: SOT, four words, a name of the list's usual length, full stop, EOT."""
    generator = torch.Generator().manual_seed(classes)
    mean, most = NAMES[classes]
    vocabulary, length = (49408, 77) if full else (100, 16)
    sizes = 1 + torch.poisson(torch.full((classes,), mean - 1), generator=generator)
    ids = torch.zeros(classes, length, dtype=torch.int64)
    for row, size in zip(ids, sizes.clamp(max=most).long().tolist(), strict=True):
        name = torch.randint(20, vocabulary - 2, (size,), generator=generator).tolist()
        words = [vocabulary - 2, *range(5, 5 + PROMPT), *name, 10, vocabulary - 1]
        row[: len(words)] = torch.tensor(words)
    return ids


def plain_block(block: nn.Module, x: Tensor, causal: bool = False) -> Tensor:
    """A transformer block in PyTorch's own calls: nn.MultiheadAttention's, QuickGELU's formula."""
    attn, mlp = block.attn, block.mlp
    qkv = nnf.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    y = nnf.scaled_dot_product_attention(
        *map(attn.split, qkv), is_causal=causal, scale=attn.scale
    ).transpose(1, 2).flatten(2)  # fmt: skip
    x = x + nnf.linear(y, attn.out_proj.weight, attn.out_proj.bias)
    return x + plain_mlp(mlp, block.ln_2(x))


def plain_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    x = nnf.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    return nnf.linear(x * torch.sigmoid(1.702 * x), mlp.c_proj.weight, mlp.c_proj.bias)


class OfficialLoop:
    """A-TPT (or TPT) as its code computes it: the text tower on all classes, on 40 (77) tokens
    each, again for every view's attention; views one at a time there, and encoded three times.

    Two things differ, so that there is something to compare with: the last block's token weights
    are those of float64 (the official ones are rounding noise in float32), and a view is never its
    own neighbour in the ensemble.

    Args:
        precision: "bf16": everything under autocast.
    """

    def __init__(
        self, model: CLIP, ids: Tensor, method: fasttta.methods.Method, precision: str = "fp32"
    ) -> None:
        self.model, self.method, self.precision = model, method, precision
        length = 77 if method.name == "tpt" else min(40, model.context_length)
        self.ids = ids[:, :length].to(model.positional_embedding.device)
        self.start = nnf.embedding(self.ids[0, 1 : 1 + PROMPT], model.token_embedding.weight)
        self.scale = model.logit_scale.exp()

    def text(self, prompt: Tensor, classes: int | None = None) -> Tensor:
        """Normalised features [C, E] (of the first classes)."""
        model, ids = self.model, self.ids[:classes]
        x = nnf.embedding(ids, model.token_embedding.weight)
        context = prompt.expand(len(ids), -1, -1)
        x = torch.cat((x[:, :1], context, x[:, 1 + PROMPT :]), 1)
        x = x + model.positional_embedding[: ids.shape[1]]
        for block in model.transformer.resblocks:
            x = plain_block(block, x, causal=True)
        x = (
            model.ln_final(x)[torch.arange(len(ids), device=x.device), ids.argmax(1)]
            @ model.text_projection
        )
        return nnf.normalize(x, dim=-1)

    def text_gradient(self, classes: int | None = None) -> tuple[Tensor, Tensor]:
        """Features and their gradient to the prompt, for a fixed cotangent."""
        prompt = self.start.clone().requires_grad_()
        with torch.enable_grad():
            features = self.text(prompt, classes)
            (gradient,) = torch.autograd.grad(features, prompt, cotangent_of(features))
        return features.detach(), gradient

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """Normalised features [n, E]; every token goes through the whole last block."""
        visual = self.model.visual
        x = visual.embed(self.model._normalised(pixels))
        for block in visual.transformer.resblocks:
            x = plain_block(block, x)
        return nnf.normalize(visual.finish(x[:, 0]), dim=-1)

    def attention(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Refined attention of one view [1, 3, R, R] -> [1, G, G]."""
        visual, taken = self.model.visual, []
        with torch.enable_grad():
            x = visual.embed(self.model._normalised(pixels)).requires_grad_()
            for block in visual.transformer.resblocks:
                n = block.ln_1(x)
                q, k, v = map(block.attn.split, block.attn.project(n))
                p = (q @ k.transpose(-1, -2) * block.attn.scale).softmax(-1)
                taken = [*taken[-1:], (x, n, p)]
                x = x + block.attn.combine(p @ v)
                x = x + plain_mlp(block.mlp, block.ln_2(x))
            features = nnf.normalize(visual.finish(x[:, 0]), dim=-1)
            score = (self.scale * features @ text.T).amax()
            (x0, _, p0), (x1, n1, p1) = taken
            g0, g1, gn = torch.autograd.grad(score, (x0, x1, n1))
        with torch.no_grad():
            norm = visual.transformer.resblocks[-1].ln_1
            inner = layernorm_inner(x1, norm.eps, norm.weight, gn)
            inner[:, 0] = (x1[:, 0] * g1[:, 0]).sum(-1)
            weights = [token_weights(y, EPS) for y in ((x0 * g0).sum(-1), inner)]
            rows = rollout_code(p0.mean(1), p1.mean(1), *weights)
            return normalise_map(rows, 0.99).view(1, visual.grid, visual.grid)

    def mixed(self, base: Tensor, mix: Tensor, grid: Tensor) -> Tensor:
        """One view mixed by its map [1, G, G]."""
        large = nnf.interpolate(grid[None], base.shape[-2:], mode="bilinear")[:, 0]
        high = large > torch.quantile(large, 1 - self.method.high)
        low = (large <= torch.quantile(large, self.method.low)) & ~high
        share = self.method.mix_high * high + self.method.mix_low * low
        return share * base + (1 - share) * mix

    def autocast(self) -> torch.autocast:
        device = self.ids.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")

    def __call__(self, views: Views) -> tuple[Tensor, ...]:
        """Logits of an image; for A-TPT also the views' attention."""
        with self.autocast():
            return tuple(x.float() for x in self._episode(views))

    def _episode(self, views: Views) -> tuple[Tensor, ...]:
        method, maps = self.method, []
        pixels = views.augmix
        if method.name == "a-tpt":
            pixels = [views.base[:1]]
            for i in range(1, len(views)):
                with torch.no_grad():
                    text = self.text(self.start)
                maps.append(self.attention(views.base[i : i + 1], text))
                pixels.append(self.mixed(views.base[i : i + 1], views.mix[i : i + 1], maps[-1]))
            pixels = torch.cat(pixels)
            with torch.no_grad():  # zero-shot, for the record
                self.image(pixels[:1]) @ self.text(self.start).T
            self.image(pixels)
        prompt = torch.nn.Parameter(self.start.clone())
        optimizer = torch.optim.AdamW([prompt], lr=method.lr)
        features = self.image(pixels)
        with torch.enable_grad():
            logits = self.scale * features @ self.text(prompt).T
            chosen = logits[entropy(logits).argsort()[: method.selected_count(len(views))]]
            if method.name == "tpt":
                loss = marginal_entropy(chosen[None])[0]
            else:
                loss = entropy(chosen).mean()
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            features = self.image(pixels[:1] if method.name == "tpt" else pixels)
            logits = self.scale * features @ self.text(prompt).T
            if method.name == "tpt":
                return (logits,)
            weights = similarity_weights(features[None], 20, 0.01)
            return weights @ logits, torch.cat(maps)

    def parts(self, views: Views) -> list[tuple[float, object]]:
        """What ``self(views)`` does, as (how often, one of it): the text tower on a chunk of the
        classes, counted for the others in proportion (all at once take more time a class, and 13.9
        MB of activations), images four at a time."""
        few = min(len(self.ids), CHUNK)

        def low(part):
            def run():
                with self.autocast():
                    return part()

            return run

        with self.autocast():
            taken = self._parts(views, few)
        return [(count, low(part)) for count, part in taken]

    def _parts(self, views: Views, few: int) -> list[tuple[float, object]]:
        text = self.text(self.start, few).detach()
        four, share, n = views.base[:4], len(self.ids) / few, len(views)

        @torch.no_grad()
        def forward():
            return (self.text(self.start, few),)

        parts = [(share, lambda: self.text_gradient(few))]
        if self.method.name == "tpt":
            return [*parts, (share, forward), ((n + 1) / len(four), lambda: (self.image(four),))]
        return [
            *parts,
            (share * (n + 1), forward),  # each view's but the anchor's, zero-shot, tuned
            (n - 1, lambda: (self.attention(views.base[1:2], text),)),
            ((3 * n + 1) / len(four), lambda: (self.image(four),)),
        ]


METHOD = {"ensemble": "similarity", "select": 0.25}


def cotangent_of(features: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(features.shape, generator=generator).to(features)


def smooth(n: int, size: int, seed: int) -> Tensor:
    """Images with something to see, each of its own contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    return nnf.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def views_of(n: int, size: int, device: torch.device) -> Views:
    base, mix = smooth(n, size, 1), smooth(n, size, 2)
    mix[0] = base[0]
    return Views(base, mix, torch.linspace(1, 0.1, n)).to(device)


@pytest.fixture(scope="module")
def model(full, device) -> CLIP:
    """CLIP of ViT-B/16's size and random weights; a tiny one without --benchmark."""
    torch.manual_seed(0)
    vision = {"resolution": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12, "hidden": 3072}
    text = {"dim": 512, "depth": 12, "heads": 8, "hidden": 2048, "context_length": 77,
            "vocabulary": 49408}  # fmt: skip
    if not full:
        vision = {"resolution": 24, "patch": 8, "dim": 24, "depth": 3, "heads": 3, "hidden": 40}
        text = {"dim": 20, "depth": 3, "heads": 2, "hidden": 36, "context_length": 16,
                "vocabulary": 100}  # fmt: skip
    made = CLIP(512 if full else 12, vision, text)
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            std = 0.3 if "embedding" in name else parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    made.logit_scale.data.fill_(100.0).log_()
    return made.eval().requires_grad_(False).to(device)


def _text_flops(model: CLIP, prompts: Prompts) -> int:
    """Multiplications and additions of the text tower's forward: prefix and suffixes, each once."""
    tokens = prompts.prefix + sum(len(chunk.tokens) for chunk in prompts.chunks)
    return 24 * tokens * len(model.transformer.resblocks) * model.positional_embedding.shape[1] ** 2


def _image_flops(model: CLIP, views: int) -> int:
    visual = model.visual
    tokens, dim = visual.positional_embedding.shape
    block = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    return views * block * len(visual.transformer.resblocks)


def _episodes():
    """(method, classes, precision); those in fp32 have the ids of stored results."""
    gpu = pytest.mark.skipif(not CUDA, reason="measured on a GPU")
    for method, classes in (*(("a-tpt", n) for n in NAMES), ("tpt", 37)):
        long = [pytest.mark.long] * (method == "tpt" or classes > 37)
        yield pytest.param(method, classes, "fp32", marks=long, id=f"{method}-{classes}")
        yield pytest.param(
            method, classes, "bf16", marks=[*long, gpu], id=f"{method}-{classes}-bf16"
        )


@pytest.mark.parametrize(("method", "classes", "precision"), list(_episodes()))
def bench_clip_episode(method, classes, precision, model, device, full, measure):
    """A whole image, not the first (what only the class list decides is at hand). The reference is
    timed in parts; outputs are compared on fewer views and classes, where it is run whole."""
    options = METHOD if method == "a-tpt" else {"select": 0.25}
    options = {**options, "views": VIEWS, "precision": precision}
    ids, views = class_ids(classes, full), views_of(VIEWS if full else 5, model.resolution, device)
    small = views_of(4, model.resolution, device)
    adapted, few = (fasttta.adapt(model, method, classes=x, **options) for x in (ids, ids[:8]))
    official, official_few = (
        OfficialLoop(model, x, adapted.options, precision) for x in (ids, ids[:8])
    )

    def ours(adapted, views):
        result = adapted.step(views=views)
        return (result.logits, *([result.stats["attention"][1:]] if method == "a-tpt" else []))

    prompts = model.prompts(ids, PROMPT)
    passes = 2 if method == "a-tpt" else 1
    limits = {"tolerance": TOLERANCE, "official": "fp32"}
    if precision == "bf16":
        exact = OfficialLoop(model, ids[:8], adapted.options)
        limits = {
            "exact": lambda: exact(small), "rounding": BF16_ROUNDING, "official": "bf16 autocast"
        }  # fmt: skip
    measure(
        lambda: ours(adapted, views),
        parts=official.parts(views),
        check=(lambda: ours(few, small), lambda: official_few(small)),
        **limits,
        rounds=10 if CUDA else 1,
        warmup=1 if CUDA else 0,
        queued=False,
        memory=True,
        samples=1,
        shape=f"ViT-B/16, {len(views)} views, reference from its timed parts",
        engine=adapted.engine,
        headline=True,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        bytes=(2 if precision == "bf16" else 4) * sum(x.numel() for x in model.parameters()),
        flops=passes * _image_flops(model, len(views)) + 4 * _text_flops(model, prompts),
    )


@pytest.mark.parametrize(
    "classes", [pytest.param(n, marks=[pytest.mark.long] * (n > 37)) for n in NAMES]
)
def bench_clip_text(classes, model, device, full, measure):
    """Text features and their gradient to the prompt, 40 tokens a class in the reference."""
    ids = class_ids(classes, full)
    official = OfficialLoop(model, ids, fasttta.methods.ATPT())
    few = model.prompts(ids[:8], PROMPT)

    def ours(prompts):
        at = prompts.linearise(prompts.initial[None])
        with torch.enable_grad():
            leaf = at.features.detach().requires_grad_()
            unit = nnf.normalize(leaf, dim=-1)
            (cotangent,) = torch.autograd.grad(unit, leaf, cotangent_of(unit[0])[None])
        return unit[0].detach(), at.pullback(cotangent)[0]

    prompts = model.prompts(ids, PROMPT)
    chunk = min(len(ids), CHUNK)
    measure(
        lambda: ours(prompts),
        parts=[(len(ids) / chunk, lambda: official.text_gradient(chunk))],
        check=(lambda: ours(few), lambda: official.text_gradient(8)),
        tolerance=1e-4,
        rounds=20 if CUDA else 3 if classes < 100 else 1,
        warmup=1 if CUDA else 0,  # the check has run both
        memory=True,
        shape="width 512, 12 blocks" + (", reference on 37 classes" if classes > 37 else ""),
        headline=classes in (37, 1000),
        dtype=torch.float32,
        bytes=4 * sum(x.numel() for x in model.transformer.parameters()),
        # forward, again in the backward pass, which takes as much to the inputs
        flops=3 * _text_flops(model, prompts),
    )


@pytest.mark.parametrize("views", [64 if CUDA else 4])
def bench_clip_attention(views, model, device, full, measure):
    """Attention maps of views, the reference one at a time (with the text at hand)."""
    given = views_of(views if full else 3, model.resolution, device).base
    official = OfficialLoop(model, class_ids(37, full), fasttta.methods.ATPT())
    with torch.no_grad():
        text = official.text(official.start)

    def theirs():
        return (torch.cat([official.attention(view[None], text) for view in given]),)

    measure(
        lambda: (model.attention_maps(given, text).grid,),
        theirs,
        tolerance=1e-3,
        rounds=10 if CUDA else 2,
        warmup=1 if CUDA else 0,
        memory=True,
        shape="ViT-B/16",
        headline=False,
        dtype=torch.float32,
        bytes=4 * sum(x.numel() for x in model.visual.parameters()),
        flops=_image_flops(model, len(given)),
    )

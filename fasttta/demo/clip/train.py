"""Trains the demo's CLIP on scenes and captions; part of ``python -m fasttta.demo.clip.build``."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import CLIP
from .captions import CONTEXT, DIGITS, INKS, PAPERS, TEMPLATES, VOCABULARY, tokenize
from .scenes import RESOLUTION, Scenes, render

# heads of 64 channels, as OpenAI's, so that the checkpoint's shapes say everything
VISION = {"resolution": RESOLUTION, "patch": 4, "dim": 64, "depth": 3, "heads": 1, "hidden": 128}
TEXT = {"dim": 64, "depth": 2, "heads": 1, "hidden": 128, "context_length": CONTEXT,
        "vocabulary": VOCABULARY}  # fmt: skip
DIGITS_ONLY = [text for text in TEMPLATES if "{ink}" not in text and "{paper}" not in text]
LARGEST_SCALE = math.log(100)  # as OpenAI's


def new_model(seed: int) -> CLIP:
    """The demo's architecture at its random start."""
    generator = torch.Generator().manual_seed(seed)
    model = CLIP(64, VISION, TEXT).train().requires_grad_(True)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "embedding" in name:  # OpenAI's 0.01 and 0.02 take many times the steps here
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


def encode_text(model: CLIP, ids: Tensor) -> Tensor:
    """As ``model.encode_text``, with gradients to the embeddings too: [n, L] -> [n, E]."""
    x = F.embedding(ids, model.token_embedding.weight) + model.positional_embedding[: ids.shape[1]]
    for block in model.transformer.resblocks:
        x = block(x, causal=True)
    x = x[torch.arange(len(ids)), ids.argmax(1)]
    return model.ln_final(x) @ model.text_projection


def captions(scenes: Scenes, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """A caption for each scene, and of which scenes each is true: bool [n, n] (scene, caption)."""
    inks, papers = list(INKS), list(PAPERS)
    chosen = torch.randint(len(TEMPLATES), (len(scenes.digits),), generator=generator).tolist()
    texts = [
        TEMPLATES[t].format(digit=DIGITS[d], ink=inks[i], paper=papers[p])
        for t, d, i, p in zip(chosen, *(x.tolist() for x in scenes[1:]), strict=True)
    ]
    true = scenes.digits[:, None] == scenes.digits
    for word, values in (("{ink}", scenes.ink), ("{paper}", scenes.paper)):
        said = torch.tensor([word in TEMPLATES[t] for t in chosen])
        true &= (values[:, None] == values) | ~said
    return texts, true


def crops(pixels: Tensor, generator: torch.Generator, low: float, mirrored: float) -> Tensor:
    """Random crops of an area from ``low`` to 1 and log-uniform aspect, a share of them mirrored,
    back at full size: what the views of test-time methods look like."""
    n = len(pixels)
    u = torch.rand(n, 5, generator=generator)
    areas, aspect = low + (1.0 - low) * u[:, 0], (4 / 3) ** (2 * u[:, 1] - 1)
    size = torch.stack(((areas * aspect).sqrt(), (areas / aspect).sqrt()), 1).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = size[:, 0] * torch.where(u[:, 4] < mirrored, -1, 1)
    theta[:, 1, 1] = size[:, 1]
    theta[:, :, 2] = (2 * u[:, 2:4] - 1) * (1 - size)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def loss(model: CLIP, scenes: Scenes, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """CLIP's loss where several captions may be true of an image (the cross-entropy to the uniform
    distribution over the true ones, both ways), and each image's own against captions of all ten
    digits, without which this little data takes several times as long."""
    texts, true = captions(scenes, generator)
    template = DIGITS_ONLY[int(torch.randint(len(DIGITS_ONLY), (), generator=generator))]
    texts += [template.format(digit=name) for name in DIGITS]
    image = F.normalize(model._encode(pixels), dim=-1)
    text = F.normalize(encode_text(model, tokenize(texts)), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    logits, of_digits = logits.split((len(true), len(DIGITS)), dim=1)
    target = true.float()
    parts = [
        F.cross_entropy(x, t / t.sum(1, keepdim=True))
        for x, t in ((logits, target), (logits.T, target.T))
    ]
    return sum(parts) / 2 + F.cross_entropy(of_digits, scenes.digits)


def train(
    images: Tensor,
    digits: Tensor,
    *,
    seed: int,
    epochs: int = 160,
    batch: int = 64,
    lr: float = 2e-3,
    low: float = 0.3,
) -> CLIP:
    """A CLIP trained on scenes of digits, rendered anew in every epoch, and their captions.

    Args:
        images, digits: [n, 8, 8] in [0, 1] and [n].
        seed: of weights, scenes, captions and order; the same result with the same torch.
        epochs, batch, lr: AdamW with a one-cycle schedule up to lr, weight decay 0.05 but
            for vectors.
        low: smallest area of the crops, reached (as is the share of mirrored ones, a half) in
            equal steps over the second quarter of the epochs: whole digits are learnt first.
    """
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(seed)
    model = new_model(seed)
    steps = epochs * (len(images) // batch)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed}, {"params": others, "weight_decay": 0.0}
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for epoch in range(epochs):
        start, total, ease = time.perf_counter(), 0.0, min(1.0, max(0.0, 2 - 4 * epoch / epochs))
        cut = {"low": ease + (1 - ease) * low, "mirrored": (1 - ease) / 2}
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(batch)[: len(images) // batch]:
            scenes = render(images[index], digits[index], generator)
            value = loss(model, scenes, crops(scenes.pixels, generator, **cut), generator)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=LARGEST_SCALE)
            total += value.item()
        seconds, mean = time.perf_counter() - start, total / (len(images) // batch)
        print(f"epoch {epoch + 1}/{epochs}  loss {mean:.4f}  {seconds:.1f} s", flush=True)
    return model.eval().requires_grad_(False)

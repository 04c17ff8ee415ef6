"""RAda's head, forward and backward, against the official computation, written out here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fasttta.models import RationalHead

SCALE = 100.0  # exp(logit_scale) of CLIP
# classes, images, width: ImageNet with CLIP ViT-B/16, and a data set of the usual size
CASES = {"1000 classes": (1000, 2, 512), "100 classes": (100, 8, 512)}


class OfficialHead(torch.nn.Module):
    """The head as its code computes it: every query for every class and image, three K x K softmax
    maps a head, their mean times the values."""

    def __init__(self, head: RationalHead) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)

    def forward(self, image: Tensor, text: Tensor, scale: float) -> Tensor:
        head = self.head
        f, h = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
        rational = f.unsqueeze(1) * h  # [B, K, D]
        b, k, dim = rational.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(b, k, head.heads, dim // head.heads).transpose(1, 2)

        root = scale**0.5
        queries = (
            head.q_proj1((root * f).unsqueeze(1).expand(b, k, dim).contiguous()),
            head.q_proj2((root * h).unsqueeze(0).expand(b, k, dim).contiguous()),
            head.q_proj3(scale * rational),
        )
        keys, values = heads(head.k_proj(scale * rational)), heads(head.v_proj(scale * rational))
        maps = []
        for q in queries:
            scores = heads(q) @ keys.transpose(-2, -1) / (dim // head.heads) ** 0.5
            flat = (scores.flatten(-2) / head.temperature).softmax(dim=-1)
            maps.append(k * flat.view_as(scores))
        out = (sum(maps) / 3) @ values
        mask = (torch.ones_like(rational) + head.out_proj(out.transpose(1, 2).flatten(2))).relu()
        return scale * (mask * rational).sum(dim=-1)


def _flops(classes: int, images: int, dim: int) -> int:
    """Of the matrix products, at least: keys, values, queries of R and the output, forward and
    their weights' gradients; three products of K x K x D forward, twice that backward."""
    linear = 2 * classes * dim * dim * images
    pairs = 2 * classes * classes * dim * images
    return 4 * linear + 5 * linear + 3 * pairs + 6 * pairs


@pytest.mark.parametrize("case", list(CASES))
def bench_rational_head(case, device, full, measure, threads):
    classes, images, dim = CASES[case] if full else (13, 3, 16)
    torch.manual_seed(0)
    head = RationalHead(dim)
    torch.nn.init.normal_(head.out_proj.weight, std=0.02)
    torch.nn.init.normal_(head.out_proj.bias, std=0.02)
    head = head.to(device)
    official = OfficialHead(head)
    image = torch.randn(images, dim, device=device)
    text = torch.randn(classes, dim, device=device)
    along = torch.randn(images, classes, device=device) / classes

    def run(module, parameters, *inputs):
        logits = module(*inputs, SCALE)
        grads = torch.autograd.grad(logits, parameters, along.to(logits))
        return logits.detach(), *grads

    exact = OfficialHead(head.double())
    expected = run(exact, list(exact.parameters()), image.double(), text.double())
    head.float()
    ours, theirs = list(head.parameters()), list(official.parameters())
    # the keys' bias moves all scores of a row alike: its gradient is rounding around 0 in the
    # part of the queries that all rows share; compared as all others, of the largest value
    measure(
        lambda: run(head, ours, image, text),
        lambda: run(official, theirs, image, text),
        exact=expected,
        tolerance=1e-3,
        memory=True,
        threads=threads,
        shape=f"{images}x{classes}x{dim}",
        headline=case == "1000 classes",
        samples=images,
        dtype=torch.float32,
        flops=_flops(classes, images, dim),
        # features and weights once, their gradients once
        bytes=4 * (images * dim + classes * dim + 2 * sum(p.numel() for p in ours)),
    )

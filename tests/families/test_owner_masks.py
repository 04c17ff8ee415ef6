"""Masks: ABPEM refuses every batch in which one hides tokens, other methods stay right."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import same
from torch import nn

import fasttta

SPANS = {"text": (0, 5), "image": (5, 9)}


class Attention(nn.Module):
    """Attention under a mask [B, T] (1: a token that counts) as models of many kinds have it."""

    def __init__(self, how, dim=12, heads=3):
        super().__init__()
        self.how, self.num_heads = how, heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (
            f(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        keep = mask.bool()[:, None, None, :]
        lowest = {"-1e4": -1e4, "-100": -100.0, "inf": -torch.inf}.get(
            self.how.rpartition(" ")[2], torch.finfo(x.dtype).min
        )
        bias = torch.zeros_like(keep, dtype=x.dtype).masked_fill(~keep, lowest)
        if self.how == "sdpa bool":
            y = F.scaled_dot_product_attention(q, k, v, keep.expand(-1, 1, x.shape[1], -1))
        elif self.how.startswith("sdpa additive"):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            if self.how.startswith("filled"):
                scores = scores.masked_fill(~keep, max(lowest, torch.finfo(scores.dtype).min))
            else:
                scores = scores + bias
            y = {"method": lambda s: s.softmax(-1), "torch": lambda s: torch.softmax(s, -1)}.get(
                self.how.split()[0], lambda s: F.softmax(s, dim=-1, dtype=torch.float64).to(s)
            )(scores) @ v
        return y.transpose(1, 2).flatten(2)


KINDS = ("sdpa bool", "sdpa additive", "sdpa additive inf", "eager", "eager -1e4", "eager inf",
         "eager -100", "filled", "filled -1e4", "method inf", "torch inf")  # fmt: skip


class Model(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.pixels = nn.Linear(4, 12), nn.Linear(6, 12)
        self.how, self.norm = how, nn.LayerNorm(12)
        if how.startswith("multihead"):
            self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        elif how == "layer":
            self.fusion = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
        else:
            self.attn = Attention(how)
        self.head = nn.Linear(12, 5)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)

    def forward(self, text, image, mask):
        x = torch.cat((self.words(text), self.pixels(image)), dim=1)
        full = torch.cat((mask, mask.new_ones(len(mask), 4)), dim=1)
        if self.how == "layer":
            x = self.fusion(x, src_key_padding_mask=~full.bool())
        elif self.how.startswith("multihead"):
            y = self.norm(x)
            options = {"key_padding_mask": ~full.bool()}
            if self.how.endswith("additive"):
                options["key_padding_mask"] = torch.zeros_like(full, dtype=x.dtype).masked_fill(
                    ~full.bool(), -torch.inf
                )
            x = x + self.attn(y, y, y, need_weights=self.how.endswith("weights"), **options)[0]
        else:
            x = x + self.attn(self.norm(x), full)
        return self.head((x * full[..., None].to(x)).sum(1) / full.sum(1, keepdim=True))


ALL = (*KINDS, "multihead", "multihead weights", "multihead additive", "layer")


def spec(how):
    fusion = "fusion.self_attn" if how == "layer" else "attn"
    qkv = None if how.startswith(("multihead", "layer")) else ("query", "key", "value")
    return fasttta.ModelSpec(fusion, SPANS, qkv)


def batch(hidden=None, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    text, image = torch.randn(n, 5, 4, generator=g), torch.randn(n, 4, 6, generator=g)
    mask = torch.ones(n, 5, dtype=torch.int64)
    if hidden is not None:
        mask[hidden, 3:] = 0
    return text, image, mask


def adapted_to(how, method="abpem", **options):
    options |= {"k": 2, "window": 2} if method == "abpem" else {}
    return fasttta.adapt(Model(how).eval(), method, spec=spec(how), lr=1e-2, **options)


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_is_never_counted(how, hidden, precision):
    """In the first batch or a later one, in any sample; nothing is learnt from it, and what comes
    after is what it had been without."""
    if how == "eager -100" and precision == "bf16":
        pytest.skip("a score of -100 hides no token for certain in 8 bits")
    first = adapted_to(how, precision=precision)
    with pytest.raises(ValueError, match="mask"):
        first.step(*batch(hidden))
    later, plain = adapted_to(how, precision=precision), adapted_to(how, precision=precision)
    assert same(later.step(*batch()), plain.step(*batch()))
    before = {name: x.clone() for name, x in later.tuned.items()}
    for call in (later, later.step, lambda *b: list(later.stream([b]))):
        with pytest.raises(ValueError, match="mask that hides|scores that attn computes"):
            call(*batch(hidden, seed=1))
    assert all(torch.equal(x, before[name]) for name, x in later.tuned.items())
    assert same(later.step(*batch(seed=2)), plain.step(*batch(seed=2)))


@pytest.mark.parametrize("how", ALL)
def test_masks_that_hide_nothing_pass(how):
    adapted = adapted_to(how)
    for seed in range(3):
        inputs = batch(seed=seed)
        with torch.no_grad():
            expected = adapted.unwrap(merge=True)(*inputs)
        result = adapted.step(*inputs)
        assert torch.allclose(result.logits_before, expected, atol=1e-5)
        assert int(result.n_used) == (4 if seed == 0 else 8)


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("method", ["read", "tent", "source"])
def test_other_methods_are_right_under_later_masks(how, method):
    adapted = adapted_to(how, method)
    adapted.step(*batch())
    merged = adapted.unwrap(merge=True)
    inputs = batch(2, seed=1)
    with torch.no_grad():
        expected = merged(*inputs)
    assert torch.allclose(adapted.step(*inputs).logits_before, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["sdpa bool", "eager", "multihead"])
def test_what_lies_under_a_mask_does_not_count(how):
    """Statistics of source data are refused too."""
    with pytest.raises(ValueError, match="mask"):
        fasttta.collect_stats(Model(how).eval(), [batch(), batch(3)], n=8, spec=spec(how))


def test_causal_and_biased_attention():
    class Causal(Attention):
        def forward(self, x, mask):
            q, k, v = (
                f(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for f in (self.query, self.key, self.value)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=bool((mask == 0).any()))
            return y.transpose(1, 2).flatten(2)

    model = Model("eager")
    model.attn = Causal("eager")
    adapted = fasttta.adapt(model.eval(), "abpem", spec=spec("eager"), k=2)
    adapted.step(*batch())
    with pytest.raises(ValueError, match="mask that hides"):
        adapted.step(*batch(2))


def test_scores_that_cannot_be_seen():
    class Exponentials(Attention):
        def forward(self, x, mask):
            q, k, v = (
                f(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for f in (self.query, self.key, self.value)
            )
            p = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).exp() * mask[:, None, None, :]
            return (p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)

    model = Model("eager")
    model.attn = Exponentials("eager")
    with pytest.raises(ValueError, match="so that masks cannot be told"):
        fasttta.adapt(model.eval(), "abpem", spec=spec("eager"), k=2).step(*batch())
    fasttta.adapt(model.eval(), "read", spec=spec("eager")).step(*batch(2))


class Cross(nn.Module):
    """Images attend to text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.pixels, self.attn = nn.Linear(4, 12), nn.Linear(6, 12), CrossAttention()
        self.head = nn.Linear(12, 5)

    def forward(self, text, image):
        return self.head(self.attn(self.pixels(image), self.words(text)).mean(1))


class CrossAttention(Attention):
    def __init__(self):
        super().__init__("eager")

    def forward(self, x, y):
        q, k, v = (
            f(z).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for f, z in ((self.query, x), (self.key, y), (self.value, y))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_cross_attention():
    """No self-attention blocks for ABPEM; READ and TENT do not ask for them."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 4, 4, generator=g), torch.randn(3, 4, 6, generator=g)
    cross = fasttta.ModelSpec("attn", {"a": (0, 2), "b": (2, 4)})
    model = Cross().eval()
    adapted = fasttta.adapt(model, "abpem", spec=cross, k=2)
    before = {name: x.clone() for name, x in adapted.tuned.items()}
    with pytest.raises(ValueError, match="queries and keys of different tokens"):
        adapted.step(*inputs)
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())
    read = fasttta.adapt(model, "read", spec=cross)
    assert torch.allclose(read.step(*inputs).logits_before, model(*inputs), atol=1e-6)


def test_visual_bert():
    sys.modules.setdefault("torchvision", None)
    transformers = pytest.importorskip("transformers")
    config = transformers.VisualBertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=200, visual_embedding_dim=20, num_labels=5, attn_implementation="eager",
    )  # fmt: skip

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.m = transformers.VisualBertForQuestionAnswering(config)

        def forward(self, ids, image, ids_mask, image_mask):
            return self.m(
                input_ids=ids, visual_embeds=image, attention_mask=ids_mask,
                visual_attention_mask=image_mask,
            ).logits  # fmt: skip

    model = Wrapper().eval()
    fusion = "m.visual_bert.encoder.layer.0.attention.self"
    bert = fasttta.ModelSpec(fusion, {"text": (0, 8), "image": (8, 14)})
    ids, image = torch.randint(3, 190, (4, 8)), torch.randn(4, 6, 20)
    ones, padded, seen = torch.ones(4, 8).long(), torch.ones(4, 8).long(), torch.ones(4, 6).long()
    padded[2, 5:] = 0
    with pytest.raises(ValueError, match="mask that hides"):
        fasttta.adapt(model, "abpem", spec=bert, k=2).step(ids, image, padded, seen)
    adapted = fasttta.adapt(model, "abpem", spec=bert, k=2)
    expected = model(ids, image, ones, seen)
    assert torch.allclose(adapted.step(ids, image, ones, seen).logits_before, expected, atol=1e-5)
    with pytest.raises(ValueError, match="mask that hides"):
        adapted.step(ids, image, padded, seen)
    source = fasttta.adapt(model, "source", spec=bert)
    expected = model(ids, image, padded, seen)
    assert torch.allclose(source.step(ids, image, padded, seen).logits, expected, atol=1e-5)

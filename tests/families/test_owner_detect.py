"""ModelSpec.detect and inspect: right spans or an error, and nothing proposed that is refused."""

from __future__ import annotations

import pytest
import torch
from clips import EOT, tiny_ids, tiny_views
from fusions import Joint, Packed, Three, build
from lookalikes import HFCLIP
from torch import nn

import fasttta
from fasttta import ModelSpec
from fasttta.commands import inspect as inspection


class Text(nn.Module):
    """Token ids and pixels in one sequence, with learned positions and token types."""

    def __init__(self, oddity=""):
        super().__init__()
        torch.manual_seed(0)
        self.oddity = oddity
        self.words, self.positions = nn.Embedding(50, 12), nn.Embedding(30, 12)
        self.types = nn.Embedding(2, 12)
        self.pixels, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.attn, self.head = Packed(12, 2), nn.Linear(12, 5)

    def forward(self, ids, pixels):
        t = self.words(ids) + self.positions(torch.arange(ids.shape[1])) + self.types.weight[0]
        p = self.pixels(pixels) + self.types.weight[1]
        if self.oddity == "shuffled":  # as ViLT's patches are
            p = p[:, torch.randperm(p.shape[1])]
        if self.oddity == "scattered":
            order = torch.randperm(t.shape[1] + p.shape[1])
            x = torch.cat((t, p), 1)[:, order]
        else:
            x = torch.cat((t, p), 1)
        x = x + self.attn(self.norm(x))
        return self.head(x.mean(1))


def pixels(n=4):
    return torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(0))


SPANS = [(0, 8), (8, 13)]


def test_common_beginnings_and_padding():
    """[CLS] a photo of a ... [PAD] [PAD]: what is the same in all samples belongs to the text."""
    ids = torch.tensor([[1, 5, 6, 9, 2, 0, 0, 0], [1, 5, 6, 11, 2, 0, 0, 0],
                        [1, 5, 6, 3, 2, 0, 0, 0], [1, 5, 6, 17, 2, 0, 0, 0]])  # fmt: skip
    spec = ModelSpec.detect(Text().eval(), ids, pixels())
    assert list(spec.spans.values()) == SPANS
    padded = pixels()
    padded[:, 3:] = 0
    spec = ModelSpec.detect(Text().eval(), ids, padded)
    assert list(spec.spans.values()) == SPANS


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", ["4x8:int64", "2x8:int64", "8x8:int64"])
def test_ids_of_the_command_line(seed, shape):
    torch.manual_seed(seed)
    model = Text().eval()
    torch.manual_seed(seed)
    spec = inspection.detect(model, [shape, f"{shape[0]}x5x6"])
    assert list(spec.spans.values()) == SPANS


def test_ids_are_in_range():
    for low in (50, 30, 3):
        model = Text().eval()
        model.words = nn.Embedding(low, 12)
        inputs = inspection._in_range(model, [torch.zeros(64, 8, dtype=torch.int64), pixels(64)])
        assert inputs[0].max() < low
        assert inputs[0].max() >= min(low, 30) // 2


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    state, model = torch.get_rng_state(), Text("shuffled").eval()
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    torch.set_rng_state(state)
    ModelSpec.detect(model, ids, pixels())
    assert torch.equal(torch.rand(2), expected)


def test_random_order():
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    spec = ModelSpec.detect(Text("shuffled").eval(), ids, pixels())
    assert list(spec.spans.values()) == SPANS
    with pytest.raises(ValueError, match="attends over other tokens in each run.*at random"):
        ModelSpec.detect(Text("scattered").eval(), ids, pixels())


class Masked(Packed):
    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool)
        mask[..., 2] = False
        out = nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Rotated(Packed):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Masked, "under a mask"), (Rotated, "scores that attn computes differ")],
)
def test_what_every_method_refuses_is_not_proposed(kind, words):
    model = build("three")
    model.attn = kind(12, 2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"is attn, with spans .*'audio': \(0, 4\).*{words}"):
        ModelSpec.detect(model, *Three.batch(4), logits=1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(not m._forward_hooks and "forward" not in vars(m) for m in model.modules())


def test_tokens_of_no_input_are_reported():
    with pytest.warns(UserWarning, match=r"tokens 0:1 of .*self_attn changed with no input"):
        spec = ModelSpec.detect(build("joint"), *Joint.batch(4))
    assert list(spec.spans.values()) == [(1, 7), (7, 11)]


def test_inputs_by_keyword():
    class Keywords(Three):
        def forward(self, *, audio, video, depth):
            return super().forward(audio, video, depth)

    with pytest.raises(ValueError, match=r"by keyword only \(audio, video, depth\).*wrap it in a"):
        fasttta.adapt(Keywords(), "read", spec=Three.spec)


def test_projections_that_are_used_without_a_call():
    """timm's BEiT and EVA-02: F.linear with the module's weight."""

    class Functional(Packed):
        def forward(self, x):
            qkv = nn.functional.linear(x, self.qkv.weight)
            qkv = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(*qkv)
            return self.proj(out.transpose(1, 2).flatten(2))

    model = build("three")
    model.attn.__class__ = Functional
    with pytest.raises(ValueError, match="attn.qkv was not called .* without calling it"):
        fasttta.adapt(model, "abpem", k=2, spec=Three.spec)(*Three.batch(3))
    plain = fasttta.adapt(build("three"), "read", spec=Three.spec, lr=1e-2)
    read = fasttta.adapt(model, "read", spec=Three.spec, lr=1e-2)
    assert torch.allclose(read.step(*Three.batch(3)).logits, plain.step(*Three.batch(3)).logits,
                          atol=1e-6)  # fmt: skip


def test_inspect_of_parametrised_projections():
    model = build("three")
    nn.utils.parametrizations.weight_norm(model.attn.qkv)
    entries = inspection.describe(model, Three.spec)["methods"]
    assert "remove_parametrizations" in entries["read"]["impossible"]
    assert entries["tent"]["tuned"] > 0


@pytest.mark.parametrize("model_type", ["clip", "metaclip_2"])
def test_end_tokens_of_metaclip_2(model_type):
    """Its released weights have eos_token_id 2 and read at the first such token; CLIP's have 2,
    too, and read at the largest id."""

    class MetaCLIP(HFCLIP):
        def get_text_features(self, input_ids):
            if self.config.model_type == "metaclip_2":
                self.config.text_config.eos_token_id = 3  # reads at the first, as of any other
                input_ids = torch.where(input_ids == 2, 3, input_ids)
                out = super().get_text_features(input_ids)
                self.config.text_config.eos_token_id = 2
                return out
            return super().get_text_features(input_ids)

    model = MetaCLIP(eos=2)
    model.config.model_type = model_type
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[3] = (
            model.text_model.embeddings.token_embedding.weight[2]
        )
    ids = tiny_ids()
    if model_type == "metaclip_2":
        ids = torch.where(ids == EOT, 2, ids)
    adapted = fasttta.adapt(model, "source", classes=ids)
    assert adapted(views=tiny_views()).isfinite().all()

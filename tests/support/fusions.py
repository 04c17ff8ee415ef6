"""Small fusion transformers that are not CAV-MAE, as users write them, each with its ModelSpec."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

import fasttta


class Joint(nn.Module):
    """Convolutional stems, a class token and joint self-attention with nn.MultiheadAttention."""

    def __init__(self, dim=16, heads=4, classes=6):
        super().__init__()
        self.audio = nn.Sequential(nn.Conv1d(5, dim, 2, 2), nn.GELU())
        self.video = nn.Conv2d(3, dim, 3, 3)
        self.video_norm = nn.LayerNorm(dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 11, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, batch_first=True, norm_first=True, activation="gelu"
        )
        self.fusion = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, audio, video):
        a = self.audio(audio.transpose(1, 2)).transpose(1, 2)
        v = self.video_norm(self.video(video).flatten(2).transpose(1, 2))
        x = torch.cat((self.token.expand(len(a), -1, -1), a, v), dim=1)
        return self.head(self.fusion(x + self.position)[:, 0])

    spec = fasttta.ModelSpec(
        fusion="fusion.layers.0.self_attn",
        spans={"audio": (1, 7), "video": (7, 11)},
    )

    @staticmethod
    def batch(n, seed=0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        return (
            torch.randn(n, 12, 5, generator=g, dtype=dtype),
            torch.randn(n, 3, 6, 6, generator=g, dtype=dtype),
        )


@dataclass
class Output(OrderedDict):
    """Like a Hugging Face ModelOutput: fields, keys and attributes are one."""

    logits: torch.Tensor = None
    pooled: torch.Tensor = None
    attentions: tuple = None

    def __post_init__(self):
        for key in ("logits", "pooled", "attentions"):
            if getattr(self, key) is not None:
                super().__setitem__(key, getattr(self, key))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class SelfAttention(nn.Module):
    """Attention with three projections; returns its output and the scores."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, hidden_states):
        q, k, v = (
            proj(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for proj in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return (scores @ v).transpose(1, 2).flatten(2), scores


class Layer(nn.Module):
    """A transformer block around ``SelfAttention``; returns tokens and scores."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.output = nn.Linear(dim, dim)
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y, scores = self.attention(self.before(x))
        x = x + self.output(y)
        return x + self.mlp(self.after(x)), scores


class HuggingFaceStyle(nn.Module):
    """Separate projections, token ids and pixels in, a ModelOutput out, buffers."""

    def __init__(self, dim=12, heads=3, classes=5):
        super().__init__()
        self.embeddings = nn.Embedding(20, dim)
        self.register_buffer("position_ids", torch.arange(4).unsqueeze(0))
        self.register_buffer("bias", torch.randn(1, 1, dim))
        self.positions = nn.Embedding(4, dim)
        self.pixels = nn.Conv2d(3, dim, 2, 2)
        self.text_encoder = nn.ModuleList([Layer(dim, heads)])
        self.layers = nn.ModuleList([Layer(dim, heads), Layer(dim, heads)])
        self.classifier = nn.Linear(dim, classes)

    def forward(self, input_ids, pixel_values, return_dict=True):
        t = self.embeddings(input_ids) + self.positions(self.position_ids)
        for layer in self.text_encoder:
            t, _ = layer(t)
        p = self.pixels(pixel_values).flatten(2).transpose(1, 2) + self.bias
        x, attentions = torch.cat((t, p), dim=1), ()
        for layer in self.layers:
            x, scores = layer(x)
            attentions += (scores,)
        pooled = x.mean(dim=1)
        return Output(self.classifier(pooled), pooled, attentions)

    spec = fasttta.ModelSpec(
        fusion=["layers.0.attention", "layers.1.attention"],
        spans={"text": (0, 4), "image": (4, 13)},
        qkv=("query", "key", "value"),
        logits="logits",
    )

    @staticmethod
    def batch(n, seed=0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        return (
            torch.randint(0, 20, (n, 4), generator=g),
            torch.randn(n, 3, 6, 6, generator=g, dtype=dtype),
        )


class Packed(nn.Module):
    """Attention with one packed projection of q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = (
            heads,
            nn.Linear(dim, 3 * dim, bias=False),
            nn.Linear(dim, dim),
        )

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*qkv)
        return self.proj(out.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """What it returns is changed in place by the model: results given again must be copies."""

    def __init__(self, inputs, dim):
        super().__init__()
        self.inner, self.norm = nn.Linear(inputs, dim), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.inner(x))


class Three(nn.Module):
    """Audio, video and depth; a packed bias-free qkv; one encoder used twice; a tuple out."""

    def __init__(self, dim=12, heads=2, classes=4):
        super().__init__()
        self.audio_encoder, self.image_encoder = Encoder(5, dim), Encoder(7, dim)
        self.norm, self.attn = nn.LayerNorm(dim), Packed(dim, heads)
        self.modality = nn.Parameter(torch.randn(3, dim))
        self.out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, audio, video, depth):
        parts = [self.audio_encoder(audio), self.image_encoder(video), self.image_encoder(depth)]
        for part, modality in zip(parts, self.modality, strict=True):
            part.add_(modality)
        x = torch.cat(parts, dim=1)
        x = x + self.attn(self.norm(x))
        pooled = self.out(x).mean(dim=1)
        return pooled, self.head(pooled)

    spec = fasttta.ModelSpec(
        fusion="attn",
        spans={"audio": (0, 4), "video": (4, 7), "depth": (7, 9)},
        qkv="qkv",
        logits=1,
    )

    @staticmethod
    def batch(n, seed=0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(n, *size, generator=g, dtype=dtype) for size in ((4, 5), (3, 7), (2, 7))
        )


FUSIONS = {"joint": Joint, "hugging-face": HuggingFaceStyle, "three": Three}


def build(name, seed=0, dtype=torch.float32):
    """The model of a name, with random weights large enough to matter."""
    torch.manual_seed(seed)
    model = FUSIONS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model.eval().to(dtype)


def logits_of(output):
    """The logits in what a fusion model of this file returns."""
    if isinstance(output, torch.Tensor):
        return output
    return output[1] if isinstance(output, tuple) else output.logits

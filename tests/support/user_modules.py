"""Stand-ins of users' own CAV-MAE modules, and of a layer that peft has wrapped."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

SPLIT = {"cav-mae": (), "read": ("q", "k", "v"), "abpem": ("qa", "ka", "va", "qv", "kv", "vv")}


class Attention(nn.Module):
    """Attention of a fusion or encoder block as those repositories have it: ``forward_eval``
    computes with split projections, which become views of the packed weight on its first call
    over more than 512 tokens; ``forward`` never uses them."""

    def __init__(self, dim, heads, split=()):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.first_batch = True
        for name in split:
            twin = {"qv": "qa", "kv": "ka", "vv": "va"}.get(name)  # one object under two names
            setattr(self, name, getattr(self, twin) if twin else nn.Linear(dim, dim))
        self.split = split

    def forward(self, x, split=False):
        b, t, dim = x.shape
        if split and self.split and t > 512:
            names = self.split[:3]
            if self.first_batch:
                for i, name in enumerate(names):
                    linear, rows = getattr(self, name), slice(i * dim, (i + 1) * dim)
                    linear.weight.data = self.qkv.weight.data[rows]
                    linear.bias.data = self.qkv.bias.data[rows]
                self.first_batch = False
            qkv = torch.cat([getattr(self, name)(x) for name in names], dim=-1)
        else:
            qkv = self.qkv(x)
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, dim)), scores


class MLP(nn.Module):
    """The two linear layers of a block."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A block with the norms of each modality."""

    def __init__(self, dim, heads, split=()):
        super().__init__()
        for name in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            setattr(self, name, nn.LayerNorm(dim))
        self.attn, self.mlp = Attention(dim, heads, split), MLP(dim)

    def forward(self, x, split=False):
        y, scores = self.attn(self.norm1(x), split)
        x = x + y
        return x + self.mlp(self.norm2(x)), scores


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, channels, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class CAVMAEFT(nn.Module):
    """A stand-in of a user's class: same parts and names, none of fasttta's code."""

    def __init__(self, flavour, classes, dim, heads, tokens, depth, patches, channels=3):
        super().__init__()
        self.flavour = flavour
        self.patch_embed_a = PatchEmbed(1, patches[0], dim)
        self.patch_embed_v = PatchEmbed(channels, patches[1], dim)
        for m, n in zip("av", tokens, strict=True):
            setattr(self, f"modality_{m}", nn.Parameter(torch.zeros(1, 1, dim)))
            setattr(self, f"pos_embed_{m}", nn.Parameter(torch.zeros(1, n, dim)))
        for m, n in zip("avu", depth, strict=True):
            split = SPLIT[flavour] if m == "u" else ()
            setattr(self, f"blocks_{m}", nn.ModuleList(Block(dim, heads, split) for _ in range(n)))
        self.norm_a, self.norm_v, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, a, v, mode):
        return self.run(a, v, mode, False)[0]

    def run(self, a, v, mode, split):
        assert mode == "multimodal"
        a = self.patch_embed_a(a.unsqueeze(1).transpose(2, 3)) + self.pos_embed_a + self.modality_a
        v = self.patch_embed_v(v) + self.pos_embed_v + self.modality_v
        for block in self.blocks_a:
            a, _ = block(a)
        for block in self.blocks_v:
            v, _ = block(v)
        x = torch.cat((a, v), dim=1)
        for block in self.blocks_u:
            x, scores = block(x, split)
        return self.mlp_head(self.norm(x).mean(1)), scores


class Read(CAVMAEFT):
    """The module of READ's code: predicts in ``forward_eval``."""

    def forward_eval(self, a, v, mode):
        return self.run(a, v, mode, True)


class Abpem(CAVMAEFT):
    """The module of ABPEM's code: ``forward_eval`` takes its arguments too."""

    def forward_eval(self, a, v, mode, args):
        assert args.use_cache is False
        return self.run(a, v, mode, True)


CLASSES = {"cav-mae": CAVMAEFT, "read": Read, "abpem": Abpem}


def user_logits(module, batch):
    """As the module's own code predicts."""
    if module.flavour == "cav-mae":
        return module(*batch, "multimodal")
    args = [SimpleNamespace(use_cache=False)] if module.flavour == "abpem" else []
    return module.forward_eval(*batch, "multimodal", *args)[0]


def user_module(flavour, model, heads):
    """The stand-in with a CAVMAE's weights, its split projections still random."""
    patches = tuple(e.proj.kernel_size for e in (model.patch_embed_a, model.patch_embed_v))
    depth = tuple(len(b) for b in (model.blocks_a, model.blocks_v, model.blocks_u))
    module = CLASSES[flavour](
        flavour, model.num_classes, model.dim, heads, model.spans, depth, patches
    )
    missing, unexpected = module.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(".attn." in name for name in missing)
    return module.to(next(model.parameters()).dtype).eval()


class Lora(nn.Module):
    """A layer around a layer, as peft has it."""

    def __init__(self, base_layer, merged=False):
        super().__init__()
        self.base_layer, self.merged = base_layer, merged
        self.lora_A, self.lora_B = (
            nn.Linear(base_layer.in_features, 2, bias=False),
            nn.Linear(2, base_layer.out_features, bias=False),
        )

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

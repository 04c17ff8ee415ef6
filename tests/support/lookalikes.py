"""Small modules of the structure of Hugging Face's CLIPModel and open_clip's CLIP, written from
their parameter names; they compute in their own way."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> nn.Module:
    return QuickGELU() if name == "quick_gelu" else nn.GELU()


class HFAttention(nn.Module):
    """Hugging Face's CLIPAttention: four projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class HFLayer(nn.Module):
    """Hugging Face's CLIPEncoderLayer."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = HFAttention(dim, heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = _activation(activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class HFCLIP(nn.Module):
    """``version`` 5 returns output objects where 4 returned tensors; ``eos`` 2: features at the
    largest id, else at the first ``eos``."""

    def __init__(self, activation="quick_gelu", version=5, eos=2, eps=1e-5, seed=0) -> None:
        super().__init__()
        self.version, text, vision, e = version, (20, 2, 36, 3), (24, 3, 40, 3), 12
        towers = []
        for dim, heads, hidden, depth in (text, vision):
            tower = nn.Module()
            tower.embeddings, tower.encoder = nn.Module(), nn.Module()
            tower.encoder.layers = nn.ModuleList(
                HFLayer(dim, heads, hidden, activation, eps) for _ in range(depth)
            )
            towers.append(tower)
        self.text_model, self.vision_model = towers
        t, v = self.text_model, self.vision_model
        t.embeddings.token_embedding = nn.Embedding(100, text[0])
        t.embeddings.position_embedding = nn.Embedding(16, text[0])
        t.final_layer_norm = nn.LayerNorm(text[0], eps)
        v.embeddings.class_embedding = nn.Parameter(torch.zeros(vision[0]))
        v.embeddings.patch_embedding = nn.Conv2d(3, vision[0], 8, 8, bias=False)
        v.embeddings.position_embedding = nn.Embedding(10, vision[0])
        v.pre_layrnorm = nn.LayerNorm(vision[0], eps)
        v.post_layernorm = nn.LayerNorm(vision[0], eps)
        self.visual_projection = nn.Linear(vision[0], e, bias=False)
        self.text_projection = nn.Linear(text[0], e, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.config = SimpleNamespace(
            text_config=SimpleNamespace(
                hidden_act=activation, num_attention_heads=2, layer_norm_eps=eps, eos_token_id=eos
            ),
            vision_config=SimpleNamespace(
                hidden_act=activation, num_attention_heads=3, layer_norm_eps=eps
            ),
        )
        _fill(self, seed)

    def _out(self, x: Tensor):
        return x if self.version == 4 else SimpleNamespace(pooler_output=x)

    def get_image_features(self, pixel_values: Tensor):
        v = self.vision_model
        x = v.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((v.embeddings.class_embedding.expand(len(x), 1, -1), x), 1)
        x = v.pre_layrnorm(x + v.embeddings.position_embedding.weight)
        for layer in v.encoder.layers:
            x = layer(x)
        return self._out(self.visual_projection(v.post_layernorm(x[:, 0])))

    def get_text_features(self, input_ids: Tensor):
        t, eos = self.text_model, self.config.text_config.eos_token_id
        n = input_ids.shape[1]
        x = t.embeddings.token_embedding(input_ids) + t.embeddings.position_embedding.weight[:n]
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        for layer in t.encoder.layers:
            x = layer(x, mask)
        end = input_ids.argmax(1) if eos == 2 else (input_ids == eos).int().argmax(1)
        x = t.final_layer_norm(x)[torch.arange(len(x)), end]
        return self._out(self.text_projection(x))


class OpenBlock(nn.Module):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, hidden))
        self.mlp.add_module("gelu", _activation(activation))
        self.mlp.add_module("c_proj", nn.Linear(hidden, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def _transformer(dim: int, heads: int, hidden: int, depth: int, activation: str) -> nn.Module:
    module = nn.Module()
    module.resblocks = nn.ModuleList(
        OpenBlock(dim, heads, hidden, activation) for _ in range(depth)
    )
    return module


class OpenVision(nn.Module):
    """open_clip's VisionTransformer."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(24))
        self.positional_embedding = nn.Parameter(torch.zeros(10, 24))
        self.ln_pre, self.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        self.transformer = _transformer(24, 3, 40, 3, activation)
        self.proj = nn.Parameter(torch.zeros(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenText(nn.Module):
    """open_clip's text tower, as a module of its own."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(100, 20)
        self.positional_embedding = nn.Parameter(torch.zeros(16, 20))
        self.transformer = _transformer(20, 2, 36, 3, activation)
        self.ln_final = nn.LayerNorm(20)
        self.text_projection = nn.Parameter(torch.zeros(20, 12))
        mask = torch.full((16, 16), -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, self.attn_mask)
        x = self.ln_final(x)[torch.arange(len(x)), ids.argmax(1)]
        return x @ self.text_projection


class OpenCLIP(OpenText):
    """open_clip's CLIP (and OpenAI's): the text tower's parts lie in the model itself."""

    def __init__(self, activation: str = "gelu", seed: int = 0) -> None:
        super().__init__(activation)
        self.visual = OpenVision(activation)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        _fill(self, seed)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual(x)


class CutBlock(OpenBlock):
    """Tokens first; the causal mask is the block's own."""

    def __init__(self, dim: int, heads: int, hidden: int, mask: Tensor | None) -> None:
        super().__init__(dim, heads, hidden, "quick_gelu")
        self.attn, self.attn_mask = nn.MultiheadAttention(dim, heads), mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.attn_mask is not None:
            self.attn_mask = self.attn_mask.to(x)
        return super().forward(x, self.attn_mask)


class CutCLIP(OpenCLIP):
    """As the code of TPT's line has it: the causal mask is cut to ``length`` of 16 tokens, so that
    ``encode_text`` fails on any ids."""

    def __init__(self, length: int = 13, seed: int = 0) -> None:
        super().__init__("quick_gelu", seed)
        mask = torch.full((length, length), -torch.inf).triu(1)
        blocks = [CutBlock(20, 2, 36, mask) for _ in range(3)]
        self.transformer = nn.Sequential()
        self.transformer.add_module("resblocks", nn.Sequential(*blocks))
        self.attn_mask = None
        _fill(self, seed)

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


class ClipTestTimeTuning(nn.Module):
    """The wrapper of TPT's line around such a CLIP: a prompt in place of the classes' first tokens;
    no token embeddings but those of its classes."""

    def __init__(self, clip: CutCLIP, ids: Tensor, n_ctx: int) -> None:
        super().__init__()
        length = len(clip.transformer.resblocks[0].attn_mask)
        self.image_encoder, self.logit_scale = clip.visual, clip.logit_scale.data
        self.text_encoder, self.prompt_learner = nn.Module(), nn.Module()
        for name in ("transformer", "ln_final", "text_projection"):
            setattr(self.text_encoder, name, getattr(clip, name))
        self.positions = clip.positional_embedding.detach()[:length]
        embedded, learner = clip.token_embedding(ids).detach(), self.prompt_learner
        learner.tokenized_prompts, learner.n_ctx = ids, n_ctx
        learner.ctx = nn.Parameter(embedded[0, 1 : 1 + n_ctx].clone())
        learner.register_buffer("token_prefix", embedded[:, :1])
        learner.register_buffer("token_suffix", embedded[:, 1 + n_ctx :])

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of normalised pixels."""
        learner, tower = self.prompt_learner, self.text_encoder
        prompt = learner.ctx.expand(len(learner.token_prefix), -1, -1)
        x = torch.cat((learner.token_prefix, prompt, learner.token_suffix), 1) + self.positions
        x = tower.ln_final(tower.transformer(x.transpose(0, 1)).transpose(0, 1))
        text = x[torch.arange(len(x)), learner.tokenized_prompts.argmax(1)] @ tower.text_projection
        image, text = (F.normalize(y, dim=-1) for y in (self.image_encoder(pixels), text))
        return self.logit_scale.exp() * image @ text.T


class CustomTextCLIP(nn.Module):
    """open_clip's CustomTextCLIP: the text tower is a part; pixels normalised in its own way."""

    def __init__(self, activation: str = "gelu", seed: int = 0) -> None:
        super().__init__()
        self.visual, self.text = OpenVision(activation), OpenText(activation)
        self.visual.image_mean, self.visual.image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        _fill(self, seed)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual(x)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text.encode_text(ids)


def _fill(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name != "logit_scale":
            nn.init.normal_(parameter, std=0.3)
    module.eval()


class PromptVA(nn.Module):
    """BriMPR's holder of a CAV-MAE: prompts before each encoder block's tokens, which are dropped
    behind it, where ``prompt=True`` asks for them."""

    def __init__(self, model: nn.Module, audio: int, video: int, seed: int = 0) -> None:
        super().__init__()
        self.va_model, self.num_prompts_a, self.num_prompts_v = model, audio, video
        generator, dim = torch.Generator().manual_seed(seed), model.norm.weight.shape[0]
        for name, count, blocks in (("a", audio, model.blocks_a), ("v", video, model.blocks_v)):
            drawn = torch.rand(len(blocks), count, dim, generator=generator)
            setattr(self, f"prompts_{name}", nn.Parameter((2 * drawn - 1) * 1e-4))

    def tuned(self, seed: int = 1) -> PromptVA:
        """With prompts as after many steps."""
        generator = torch.Generator().manual_seed(seed)
        for prompts in (self.prompts_a, self.prompts_v):
            prompts.data = torch.randn(prompts.shape, generator=generator) / 2
        return self

    def forward(self, a: Tensor, v: Tensor, mode: str, prompt: bool = False):
        if not prompt:
            return self.va_model(a, v, mode)
        m, streams = self.va_model, []
        for x, blocks, prompts in (
            (m.embed_audio(a), m.blocks_a, self.prompts_a),
            (m.embed_video(v), m.blocks_v, self.prompts_v),
        ):
            for block, own in zip(blocks, prompts, strict=True):
                x = torch.cat((own.expand(len(x), -1, -1), x), dim=1)
                x = block(x)[0][:, own.shape[0] :]
            streams.append(x)
        x = torch.cat(streams, dim=1)
        for block in m.blocks_u:
            x, attention = block(x)
        return m.mlp_head(m.norm(x).mean(dim=1)), attention

"""Dual encoders that are no CLIP, by the names of their parts: none has a forward."""

from __future__ import annotations

import torch
from lookalikes import HFCLIP
from torch import nn


def tower(**parts: nn.Module) -> nn.Module:
    """A module with these modules under dotted names (``a__b`` for ``a.b``)."""
    module = nn.Module()
    for path, part in parts.items():
        *folders, leaf = path.split("__")
        where = module
        for folder in folders:
            if folder not in where._modules:
                where.add_module(folder, nn.Module())
            where = where._modules[folder]
        where.add_module(leaf, part)
    return module


def _scalar() -> nn.Parameter:
    return nn.Parameter(torch.zeros(()))


class Siglip(nn.Module):
    """Names of Hugging Face's SiglipModel."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = tower(embeddings__token_embedding=nn.Embedding(9, 4),
                                 head=nn.Linear(4, 4))  # fmt: skip
        self.vision_model = tower(embeddings__patch_embedding=nn.Conv2d(3, 4, 2, 2))
        self.vision_model.head = tower(attention=nn.MultiheadAttention(4, 1))
        self.vision_model.head.probe = nn.Parameter(torch.zeros(1, 1, 4))
        self.logit_scale, self.logit_bias = _scalar(), _scalar()


class Align(nn.Module):
    """Names of Hugging Face's AlignModel."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = tower(embeddings__word_embeddings=nn.Embedding(9, 4))
        self.vision_model = tower(encoder__blocks__0__depthwise_conv=nn.Conv2d(3, 4, 2))
        self.text_projection = nn.Linear(4, 4)
        self.temperature = _scalar()


class OpenSiglip(nn.Module):
    """Names of open_clip's CustomTextCLIP for SigLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = tower(trunk=nn.Linear(4, 4))
        self.text = tower(token_embedding=nn.Embedding(9, 4), transformer=nn.Module(),
                           ln_final=nn.LayerNorm(4))  # fmt: skip
        self.text.transformer.resblocks = nn.ModuleList([nn.Module()])
        self.logit_scale, self.logit_bias = _scalar(), _scalar()


class ChineseCLIP(nn.Module):
    """Names of Hugging Face's ChineseCLIPModel: CLIP's image tower and a BERT."""

    def __init__(self) -> None:
        super().__init__()
        clip = HFCLIP()
        self.vision_model, self.config = clip.vision_model, clip.config
        self.text_model = tower(embeddings__word_embeddings=nn.Embedding(9, 20))
        self.visual_projection, self.text_projection = nn.Linear(24, 12), nn.Linear(20, 12)
        self.logit_scale = _scalar()


class Other(nn.Module):
    """Two towers of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = nn.Linear(4, 4), nn.Linear(4, 4)

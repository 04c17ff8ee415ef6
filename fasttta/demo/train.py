"""Trains the demo's CAV-MAE on clean digits; part of ``python -m fasttta.demo.build``."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import CAVMAE

MODES = ("multimodal", "audioonly", "videoonly")


def new_model() -> CAVMAE:
    """CAV-MAE for 64 x 32 log-mel features and 32 x 32 grey images, at its random start."""
    model = CAVMAE(
        10,
        dim=64,
        num_heads=4,
        audio_tokens=32,
        video_tokens=16,
        depth=(2, 2, 1),
        patch_audio=(8, 8),
        patch_video=(8, 8),
        video_channels=1,
    )
    for embedding in (model.pos_embed_a, model.pos_embed_v, model.modality_a, model.modality_v):
        nn.init.trunc_normal_(embedding, std=0.02)
    return model


def pair(labels: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """For each of labels [n] the index of a random one of others [m] that is equal to it."""
    key = torch.rand(len(labels), len(others), generator=generator)
    return (key * (labels[:, None] == others)).argmax(dim=1)


def all_logits(model: CAVMAE, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the three ``MODES``; equal to three calls, but each encoder runs once."""
    tokens_a, tokens_v = model.encode_audio(audio), model.encode_video(video)
    joint = model.fuse(torch.cat((tokens_a, tokens_v), dim=1))
    only_a = model.mlp_head(model.pool(tokens_a, "a")[0])
    only_v = model.mlp_head(model.pool(tokens_v, "v")[0])
    return joint, only_a, only_v


def train(
    audio: Tensor,
    audio_labels: Tensor,
    video: Tensor,
    video_labels: Tensor,
    *,
    seed: int,
    epochs: int = 12,
    batch: int = 64,
    lr: float = 2e-3,
) -> CAVMAE:
    """A model trained with cross-entropy, on both modalities and half as much on each alone.

    Every epoch sees each utterance once, with a random image of the same digit, and nothing that
    is corrupted: label-free adaptation must meet the corruptions as something new.

    Args:
        audio, audio_labels: utterances [U, 64, 32], normalised, and their digits [U].
        video, video_labels: images [I, 1, 32, 32], normalised, and their digits [I].
        seed: of the weights, the pairs and their order; the result is the same for the same torch.
        epochs, batch, lr: AdamW with a one-cycle schedule up to lr, weight decay 0.05.
    """
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model().train()
    steps = epochs * -(-len(audio) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        partner = pair(audio_labels, video_labels, generator)
        for index in torch.randperm(len(audio), generator=generator).split(batch):
            labels = audio_labels[index]
            logits = all_logits(model, audio[index], video[partner[index]])
            joint, only_a, only_v = (F.cross_entropy(x, labels) for x in logits)
            loss = joint + (only_a + only_v) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(audio):.4f}  {seconds:.1f} s")
    return model.eval()

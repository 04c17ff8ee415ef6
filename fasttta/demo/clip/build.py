"""Rebuilds the CLIP of ``fasttta demo clip``: ``python -m fasttta.demo.clip.build``.

Trains on the handwritten digits that ``fasttta.demo.build`` trains on. Needs the extra
``fasttta[build-demo]``; takes minutes.
"""

from __future__ import annotations

import time

import torch
from safetensors.torch import save

from ..build import SEED, TRAIN_IMAGES
from .scenes import MODEL_PATH, load_clip, test_scenes
from .train import train


@torch.no_grad()
def clean_accuracy(n: int = 597, seed: int = SEED) -> float:
    """Percent of the test digits that the stored model names, zero-shot, each in one scene."""
    scenes = test_scenes(n, seed)
    return 100 * (load_clip()(scenes.pixels).argmax(1) == scenes.digits).double().mean().item()


def main() -> None:
    """Trains the demo's CLIP again and writes it; takes ten minutes."""
    import sklearn
    from sklearn.datasets import load_digits

    start = time.perf_counter()
    torch.set_num_threads(1)  # sums, and so the weights, must not depend on the number of cores
    digits = load_digits()
    images = torch.from_numpy(digits.images[:TRAIN_IMAGES]).float() / 16
    labels = torch.from_numpy(digits.target[:TRAIN_IMAGES]).long()
    model = train(images, labels, seed=SEED)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    MODEL_PATH.write_bytes(save(weights))
    versions = f"torch {torch.__version__.split('+')[0]}, scikit-learn {sklearn.__version__}"
    provenance = f"seed {SEED}; {versions}; clean test accuracy {clean_accuracy():.1f} %"
    # again, now that the stored file was measured
    MODEL_PATH.write_bytes(save(weights, {"provenance": provenance}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{provenance}; {parameters} parameters, {MODEL_PATH.stat().st_size / 1e6:.2f} MB")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()

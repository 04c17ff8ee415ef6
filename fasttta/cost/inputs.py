"""What a step needs besides a model: inputs of the right shapes, with values on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import CAVMAE
from ..protocols import Promptable
from ..source_stats import SourceStats
from ..views import Views

_WORDS = 4  # of the prompt "a photo of a"


def class_ids(classes: int, context: int, vocabulary: int) -> Tensor:
    """Token ids [C, L] on the host: SOT, a prompt of four, a name of 1 to 4 tokens, stop, EOT."""
    with torch.device("cpu"):
        ids = torch.zeros(classes, context, dtype=torch.int64)
        for n in range(classes):
            name = [10 + (7 * n + i) % (vocabulary - 20) for i in range(1 + n % 4)]
            words = [vocabulary - 2, *range(1, 1 + _WORDS), *name, 5, vocabulary - 1]
            ids[n, : len(words)] = torch.tensor(words[:context])
    return ids


def views(count: int, resolution: int, device: torch.device) -> Views:
    """Views of one image on a device, without values there."""
    shape = count, 3, resolution, resolution
    base, mix = (torch.empty(shape, device=device) for _ in range(2))
    return Views(base, mix, torch.empty(count, device=device))


def source_stats(model: Promptable) -> SourceStats:
    """Statistics of the shapes that BriMPR needs, on the host."""
    with torch.device("cpu"):
        pairs = {n: (torch.ones(s), torch.zeros(s)) for n, s in model.feature_shapes().items()}
    return SourceStats(audio=pairs["audio"], video=pairs["video"], joint=pairs["joint"])


def fusion_shapes(model: CAVMAE) -> list[tuple[str, str]]:
    """Shapes, ``1x1024x128``, and types of one sample's inputs to a CAV-MAE; of an official one
    the official ones."""
    frequency, time = model.patch_embed_a.proj.kernel_size
    rows, columns = model.patch_embed_v.proj.kernel_size
    audio, video = model.spans
    bands = max(n for n in range(1, 9) if audio % n == 0)  # 128 mel bins in patches of 16
    side = max(n for n in range(1, int(video**0.5) + 1) if video % n == 0)
    channels = model.patch_embed_v.proj.in_channels
    return [
        (f"1x{audio // bands * time}x{bands * frequency}", ""),
        (f"1x{channels}x{side * rows}x{video // side * columns}", ""),
    ]

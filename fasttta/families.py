"""Which of the models that fasttta knows a user's module is."""

from __future__ import annotations

from torch import nn

from .models import CAVMAE
from .protocols import FusionModel

_CAVMAE_PARTS = ("patch_embed_a", "patch_embed_v", "blocks_a", "blocks_v", "blocks_u", "norm")


def recognise(model: nn.Module) -> FusionModel:
    """The model as methods see it.

    Raises:
        TypeError: it is none of the known models; says what was looked for and found.
    """
    if isinstance(model, CAVMAE):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    inner = getattr(model, "module", model)
    children = [name for name, _ in inner.named_children()]
    message = (
        f"{type(model).__name__} is not a model that fasttta knows; looked for "
        f"fasttta.models.CAVMAE, found children {', '.join(children[:8]) or 'none'}"
    )
    if all(hasattr(inner, part) for part in _CAVMAE_PARTS):
        message += (
            ". It has the parts of a CAV-MAE: convert it with "
            "fasttta.models.CAVMAE.from_checkpoint(model.state_dict(), num_heads=...)"
        )
    raise TypeError(message)

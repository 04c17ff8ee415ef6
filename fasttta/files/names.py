"""Names of tensors, without what wrappers of a module put before and into them."""

from __future__ import annotations

import re

# DataParallel, DDP, torch.compile, BriMPR's PromptVA, and scripts that hold a model in an attribute
_BEFORE = re.compile(r"(?:(?:module|_orig_mod|model|net|va_model)\.)+")
# what is put around a part of a model: torch.compile, FSDP, checkpointing
_WITHIN = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A parameter's name in the bare model."""
    name = _WITHIN.sub("", name)
    match = _BEFORE.match(name)
    return name[match.end() :] if match else name

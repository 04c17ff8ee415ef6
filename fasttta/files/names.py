"""Names of tensors without the prefixes and inner parts that wrappers of a module add."""

from __future__ import annotations

import re

# prefixes: of DataParallel, DDP, torch.compile, BriMPR's PromptVA, scripts with a model attribute
_BEFORE = re.compile(r"(?:(?:module|_orig_mod|model|net|va_model)\.)+")
# inner parts, from wrappers around a part of a model: torch.compile, FSDP, checkpointing
_WITHIN = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A parameter's name in the bare model."""
    name = _WITHIN.sub("", name)
    match = _BEFORE.match(name)
    return name[match.end() :] if match else name

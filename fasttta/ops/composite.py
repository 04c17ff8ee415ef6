"""The default implementation of every operation, by name: PyTorch calls, analytic backward."""

from .attention_bootstrap import attention_bootstrap, attention_bootstrap_backward
from .entropies import (
    adaptation_head,
    balance_entropy,
    entropy,
    entropy_backward,
    principal_entropy,
    principal_entropy_backward,
)
from .flat_attention import flat_attention, flat_attention_backward
from .score_moments import score_moments, score_moments_backward
from .shared_prefix_attention import shared_prefix_attention, shared_prefix_attention_backward
from .total_variation import reliability_ensemble, total_variation, total_variation_backward

__all__ = [
    "adaptation_head",
    "attention_bootstrap",
    "attention_bootstrap_backward",
    "balance_entropy",
    "entropy",
    "entropy_backward",
    "flat_attention",
    "flat_attention_backward",
    "principal_entropy",
    "principal_entropy_backward",
    "reliability_ensemble",
    "score_moments",
    "score_moments_backward",
    "shared_prefix_attention",
    "shared_prefix_attention_backward",
    "total_variation",
    "total_variation_backward",
]

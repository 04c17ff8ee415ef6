"""From waveforms and images to what models take, and what their encoders made of it on disk."""

from ..views import Views
from . import attack
from .feature_cache import Batch, FeatureCache
from .filterbank import cavmae_audio, fbank
from .frames import cavmae_frame
from .wav import load_wav

__all__ = [
    "Batch",
    "FeatureCache",
    "Views",
    "attack",
    "cavmae_audio",
    "cavmae_frame",
    "fbank",
    "load_wav",
]

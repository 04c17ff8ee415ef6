"""From waveforms and images to a model's inputs, and what its encoders made of them on disk."""

from .feature_cache import Batch, FeatureCache
from .filterbank import cavmae_audio, fbank, load_wav
from .frames import cavmae_frame

__all__ = ["Batch", "FeatureCache", "cavmae_audio", "cavmae_frame", "fbank", "load_wav"]

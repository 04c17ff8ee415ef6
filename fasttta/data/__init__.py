"""From waveforms and images to what models take: inputs of CAV-MAE, views for CLIP."""

from ..views import Views
from . import attack
from .filterbank import cavmae_audio, fbank, load_wav
from .frames import cavmae_frame

__all__ = ["Views", "attack", "cavmae_audio", "cavmae_frame", "fbank", "load_wav"]

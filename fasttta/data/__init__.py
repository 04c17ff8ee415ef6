"""From waveforms and images to the inputs that CAV-MAE was trained on."""

from .filterbank import cavmae_audio, fbank, load_wav
from .frames import cavmae_frame

__all__ = ["cavmae_audio", "cavmae_frame", "fbank", "load_wav"]

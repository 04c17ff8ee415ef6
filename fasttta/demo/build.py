"""Rebuilds the demo's assets: ``python -m fasttta.demo.build``.

Real handwritten digits (scikit-learn's copy of the UCI set) are paired with the same digit spoken
by espeak-ng. Needs the extra ``fasttta[build-demo]`` and the program espeak-ng; takes minutes.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..adapted.collect import collect_stats
from ..data import fbank
from ..source_stats import SourceStats
from .digits import DATA_PATH, MODEL_PATH, STATISTICS_PATH, enlarge, load_model, stream
from .train import MODES, pair, train

SEED = 2026
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ACCENTS = [
    "en-gb",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
]
TEST_SPEAKERS, TEST_TAKES, TRAIN_TAKES = 30, 2, 3  # takes: of each digit by each speaker
TRAIN_IMAGES = 1200  # the first ones, in the data set's own order
SAMPLES = 63 * 160 + 400  # 64 frames of 25 ms every 10 ms at 16 kHz
# Features outside of this range are clipped. A fixed noise floor stands for a real recording's;
# espeak-ng's silence is digital zero, -15.9.
LOWEST, HIGHEST = -10.0, 6.0
SCALE = (HIGHEST - LOWEST) / 255


class Take(NamedTuple):
    """One utterance to be spoken; pitch and range in espeak-ng's 0 to 99 and percent."""

    digit: int
    speaker: str
    accent: str
    words_per_minute: int
    pitch: int
    pitch_range: int
    gain: float
    onset: float  # share of the free time that passes before the word


def find_espeak() -> str:
    """The path of the program espeak-ng; exits with what to type where there is none."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit("no program espeak-ng on PATH; install it: apt-get install espeak-ng")
    return program


def ask(program: str, *arguments: str) -> str:
    """What a program prints."""
    return subprocess.run((program, *arguments), capture_output=True, check=True, text=True).stdout


def list_speakers(program: str) -> list[str]:
    """Voice variants by file name, without ``fast``, a test of the program's speed."""
    listing = ask(program, "--voices=variant")
    return sorted(set(re.findall(r"!v/(.+?)\s*(?:\(|$)", listing, re.MULTILINE)) - {"fast"})


def split_speakers(speakers: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """(train, test); relatives such as klatt, klatt2, ... or whisper, whisperf stay on one side."""
    families: dict[str, list[str]] = {}
    for name in sorted(speakers):  # a name comes after those that begin it
        elder = next((e for e in families if len(e) >= 4 and name.startswith(e)), name)
        families.setdefault(elder, []).append(name)
    shuffled = list(families.values())
    rng.shuffle(shuffled)
    test: list[str] = []
    for family in shuffled:
        if len(test) + len(family) <= TEST_SPEAKERS:
            test += family
    return sorted(set(speakers) - set(test)), sorted(test)


def plan(speakers: list[str], takes: int, rng: random.Random) -> list[Take]:
    """Every digit by every speaker, ``takes`` times each, in random accent, pitch and speed."""
    return [
        Take(
            digit=digit,
            speaker=speaker,
            accent=rng.choice(ACCENTS),
            words_per_minute=rng.randint(130, 230),
            pitch=rng.randint(20, 80),
            pitch_range=rng.randint(20, 80),
            gain=10 ** rng.uniform(-0.5, 0.0),
            onset=rng.random(),
        )
        for speaker in speakers
        for digit in range(10)
        for _ in range(takes)
    ]


def speak(program: str, take: Take) -> Tensor:
    """The utterance at 16 kHz [SAMPLES], in [-1, 1]; what is too long loses its end."""
    from scipy.signal import resample_poly

    command = [program, "-m", "-z", "--stdout", "-v", f"{take.accent}+{take.speaker}"]
    command += ["-s", str(take.words_per_minute), "-p", str(take.pitch)]
    text = f'<prosody range="{take.pitch_range}%">{WORDS[take.digit]}</prosody>'
    wav = subprocess.run([*command, text], capture_output=True, check=True).stdout
    rate = int.from_bytes(wav[24:28], "little")
    # a WAV that is written to a pipe has no lengths in its header of 44 bytes
    wave = np.frombuffer(wav[44:], "<i2").astype(np.float32) / 2**15
    wave = resample_poly(wave, 16000, rate)[:SAMPLES] * take.gain
    start = int(take.onset * (SAMPLES - len(wave)))
    return torch.from_numpy(np.pad(wave, (start, SAMPLES - len(wave) - start)))


def features(program: str, takes: list[Take]) -> Tensor:
    """Log-mel features [n, 64 frames, 32 bins] in steps of SCALE above LOWEST, uint8."""
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:  # the work is in other processes
        waves = list(pool.map(lambda take: speak(program, take), takes))
    log_mel = torch.stack([fbank(wave, 16000, mel_bins=32) for wave in waves])
    above = (log_mel > HIGHEST).float().mean()
    seconds = time.perf_counter() - start
    print(
        f"{len(takes)} utterances in {seconds:.1f} s, {above:.2%} of the features above the range"
    )
    return ((log_mel - LOWEST) / SCALE).round().clamp(0, 255).byte()


def moments(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all values."""
    return x.mean().item(), x.std().item()


def statistics(
    audio: Tensor, audio_labels: Tensor, video: Tensor, video_labels: Tensor, n: int = 32
) -> SourceStats:
    """Statistics of the stored model over n random pairs of a digit seen and heard."""
    generator = torch.Generator().manual_seed(SEED)
    seen = torch.randperm(len(video), generator=generator)[:n]
    heard = pair(video_labels[seen], audio_labels, generator)
    return collect_stats(load_model(), [(audio[heard], video[seen])], n)


def clean_accuracy() -> dict[str, float]:
    """Percent correct of the stored model on the stored data, by mode."""
    model, batches = load_model(), stream("clean")
    with torch.inference_mode():
        hits = {m: sum((model(a, v, m).argmax(1) == y).sum() for a, v, y in batches) for m in MODES}
    return {mode: 100 * int(n) / sum(len(y) for _, _, y in batches) for mode, n in hits.items()}


def main() -> None:
    """Writes the demo's data, model and statistics again; takes three minutes."""
    import sklearn
    from sklearn.datasets import load_digits

    start = time.perf_counter()
    torch.set_num_threads(1)  # sums, and so the weights, must not depend on the number of cores
    program = find_espeak()
    rng = random.Random(SEED)
    train_speakers, test_speakers = split_speakers(list_speakers(program), rng)
    print(f"{len(train_speakers)} speakers to train on, {len(test_speakers)} to test")
    train_takes, test_takes = (
        plan(train_speakers, TRAIN_TAKES, rng),
        plan(test_speakers, TEST_TAKES, rng),
    )
    train_audio = features(program, train_takes) * SCALE + LOWEST
    test_audio = features(program, test_takes)

    digits = load_digits()
    images = torch.from_numpy(digits.images).byte()
    image_labels = torch.from_numpy(digits.target)
    train_video = enlarge(images[:TRAIN_IMAGES] / 16)
    audio_norm, video_norm = moments(train_audio), moments(train_video)
    np.savez_compressed(
        DATA_PATH,
        images=images[TRAIN_IMAGES:].numpy(),
        image_labels=image_labels[TRAIN_IMAGES:].byte().numpy(),
        audio=test_audio.numpy(),
        audio_labels=np.array([take.digit for take in test_takes], np.uint8),
        speakers=np.array([test_speakers.index(take.speaker) for take in test_takes], np.uint8),
        speaker_names=np.array(test_speakers),
        audio_scale=SCALE,
        audio_offset=LOWEST,
        audio_mean=audio_norm[0],
        audio_std=audio_norm[1],
        video_mean=video_norm[0],
        video_std=video_norm[1],
    )

    training_set = (
        (train_audio - audio_norm[0]) / audio_norm[1],
        torch.tensor([take.digit for take in train_takes]),
        (train_video - video_norm[0]) / video_norm[1],
        image_labels[:TRAIN_IMAGES],
    )
    model = train(*training_set, seed=SEED)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    MODEL_PATH.write_bytes(save(weights))
    accuracy = ", ".join(f"{mode} {value:.1f} %" for mode, value in clean_accuracy().items())
    espeak = re.search(r"\d+(\.\d+)+", ask(program, "--version"))
    assert espeak is not None  # it ran, so that it has a version
    versions = f"torch {torch.__version__.split('+')[0]}, scikit-learn {sklearn.__version__}"
    provenance = f"seed {SEED}; {versions}, espeak-ng {espeak[0]}; clean test accuracy: {accuracy}"
    metadata = {
        "provenance": provenance,
        "train_speakers": ", ".join(train_speakers),
        "test_speakers": ", ".join(test_speakers),
    }
    MODEL_PATH.write_bytes(save(weights, metadata))  # again, now that the stored file was measured
    statistics(*training_set).save(STATISTICS_PATH)
    print(provenance)
    for path in (MODEL_PATH, DATA_PATH, STATISTICS_PATH):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()

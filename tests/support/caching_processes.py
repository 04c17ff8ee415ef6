"""Run by data/test_feature_shards.py: processes that cache features, killed or at the same time.

python caching_processes.py FOLDER; one import of torch, then forks.
"""

import builtins
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

import fasttta
from fasttta.data import FeatureCache, feature_shards
from fasttta.models import CAVMAE

warnings.simplefilter("error")  # a damaged shard, say
torch.set_num_threads(1)
torch.manual_seed(0)
MODEL = CAVMAE(
    7, dim=12, num_heads=3, audio_tokens=6, video_tokens=4, depth=(1, 1, 1),
    patch_audio=(4, 2), patch_video=(3, 3),
).eval()  # fmt: skip
BATCHES = [(torch.randn(4, 6, 8), torch.randn(4, 3, 6, 6)) for _ in range(12)]
SAMPLES = 48
EXPECTED = [r.logits for r in fasttta.adapt(MODEL, "source").stream(BATCHES)]

encoded = []
_encode = CAVMAE.encode


def counted(self, *inputs):
    """``encode`` that notes how many samples it was given."""
    encoded.append(len(inputs[0]))
    return _encode(self, *inputs)


CAVMAE.encode = counted


def run(folder, order=range(12), pause=0.0):
    """Caches the stream, two samples a shard; how many samples had to be encoded."""
    encoded.clear()
    adapted, cache = fasttta.adapt(MODEL, "source"), FeatureCache(folder, shard_mb=0.0009)
    for i, result in zip(
        order, adapted.stream([BATCHES[i] for i in order], cache=cache), strict=True
    ):
        assert torch.allclose(result.logits, EXPECTED[i], atol=1e-5)
        time.sleep(pause)
    return sum(encoded)


def start(work):
    """Forks a process that does the work; returns its id. It exits with 1 if the work raises."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return pid


def names(folder, suffix=".safetensors"):
    """The names of the files with a suffix in a folder."""
    return {path.name for path in Path(folder).glob(f"*{suffix}")}


def samples(folder):
    """Names of the rows in all shards, and how often each was written."""
    keys = []
    for name in names(folder):
        with safe_open(Path(folder, name), "pt") as file:
            keys += file.keys()
    return keys


def die():
    """Kills this process as the system would."""
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """An open file of which the process writes half before it is killed."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()


def die_writing(count):
    """Kills this process in the middle of the ``count``-th file that it writes."""
    left = [count]

    def opened(path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115
        left[0] -= mode == "xb"
        return HalfWritten(file) if mode == "xb" and not left[0] else file

    feature_shards.open = opened


def die_calling(name, count, after):
    """The count-th call of a function of os is the last thing that the process does."""
    plain, left = getattr(os, name), [count]

    def call(*args):
        left[0] -= 1
        if not left[0] and not after:
            die()
        value = plain(*args)
        if not left[0]:
            die()
        return value

    setattr(os, name, call)


MOMENTS = (
    lambda: die_writing(1),
    lambda: die_writing(3),
    # two fsync a shard: of the file, then of the folder
    lambda: die_calling("fsync", 1, after=False),
    lambda: die_calling("fsync", 3, after=True),
    lambda: die_calling("fsync", 4, after=True),
    lambda: die_calling("replace", 2, after=False),
    lambda: die_calling("replace", 2, after=True),
    lambda: die_calling("unlink", 1, after=False),
    *[None] * 4,  # whenever it is
)


def killed(folder):
    """Kills a run at every moment in turn; the next run goes on with what is there."""
    for i, moment in enumerate(MOMENTS):
        before = names(folder)

        def work(moment=moment):
            if moment is not None:
                moment()
            run(folder, pause=0.05)

        pid = start(work)
        if moment is None:
            time.sleep(random.Random(i).uniform(0.02, 0.2))
            before |= names(folder)  # written while it ran
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), (i, status)
        assert before <= names(folder), i
    kept = samples(folder)
    assert 10 < len(kept) < SAMPLES, kept
    assert len(set(kept)) == len(kept)  # what was found was not written again
    assert len(names(folder, ".part")) >= 4  # those killed between open and replace
    assert run(folder) == SAMPLES - len(kept)
    assert run(folder) == 0


def together(folder):
    """Four processes fill one folder at once, each in an order of its own."""
    begin = time.time() + 0.3

    def work(seed):
        time.sleep(max(0.0, begin - time.time()))
        run(folder, random.Random(seed).sample(range(12), 12))

    pids = [start(lambda seed=seed: work(seed)) for seed in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert len(set(samples(folder))) == SAMPLES
    assert run(folder) == 0


if __name__ == "__main__":
    for test in (killed, together):
        test(Path(sys.argv[1], test.__name__))
        print(test.__name__)

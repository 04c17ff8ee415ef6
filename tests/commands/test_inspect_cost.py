"""``fasttta inspect --cost``: a step of the user's model, counted in a process of its own."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch

from fasttta.commands.cost import GPUS
from fasttta.cost import roofline, shim
from fasttta.ops import first_use, native_build, native_cache

MODELS = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path.endswith("support")]!r}
import torch

def fusion():
    from fasttta.models import CAVMAE
    return CAVMAE(7, dim=12, num_heads=3, audio_tokens=6, video_tokens=4, depth=(1, 2, 1),
                  patch_audio=(4, 2), patch_video=(3, 3))

def clip():
    from clips import tiny_clip
    return tiny_clip()

def users():
    from cases import tiny_model
    from user_modules import user_module
    return user_module("abpem", tiny_model(), 3)

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.audio, self.video = torch.nn.Linear(5, 12), torch.nn.Linear(6, 12)
        self.fusion = torch.nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = torch.nn.Linear(12, 4)

    def forward(self, audio, video):
        x = torch.cat((self.audio(audio), self.video(video)), 1)
        x = x + self.fusion(x, x, x)[0]
        return self.head(x.mean(1))
"""


@pytest.fixture
def inspect(tmp_path):
    (tmp_path / "own_models.py").write_text(MODELS)

    def run(model: str, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fasttta", "inspect", f"own_models:{model}", "--cost"]
        return subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("fusion", ("--method", "read", "--engine", "graph"), ("read", "bf16", "graph")),
        ("users", ("--method", "read"), ("read", "bf16", None)),
        ("clip", ("--precision", "fp32", "--classes", "9"), ("a-tpt", "fp32", None)),
        ("Own", ("--input", "4x8x5", "--input", "4x9x6", "--batch", "3"), ("abpem", "bf16", None)),
    ],
)
def test_a_step_is_counted(inspect, model, options, expected):
    run = inspect(model, "--json", "--gpu", "b200", *options)
    assert run.returncode == 0, run.stderr
    counted = json.loads(run.stdout)
    method, precision, engine = expected
    assert (counted["method"], counted["precision"]) == (method, precision)
    assert engine in (None, counted["engine"])
    assert counted["gpu"] == "NVIDIA B200"
    assert counted["launches"] > 100
    assert 0 < counted["seconds"] < counted["predicted"] <= counted["predicted_slow_host"]
    assert sum(x["launches"] for x in counted["kinds"].values()) == counted["launches"]
    assert counted["kinds"]["matrix products"]["flops"] > 0
    assert counted["findings"] == []


def test_the_text_says_that_the_time_is_an_estimate(inspect):
    run = inspect("fusion", "--method", "tent")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("tent, bf16, ")
    assert "estimate for NVIDIA H200" in run.stdout
    assert "not measured" in run.stdout


def test_an_error_is_one_line(inspect):
    run = inspect("fusion", "--method", "a-tpt")
    assert run.returncode == 2
    assert run.stderr.startswith("fasttta: 'a-tpt' adapts vision-language models")
    assert len(run.stderr.splitlines()) == 1


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    with pytest.raises(OSError, match="there is no compiler.*apt install g"):
        shim.build()


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    failing = tmp_path / "broken compiler"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "an error" >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTTTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(OSError, match="broken compiler fails to build it: an error"):
        shim.build()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    """It is the user's, but its file system is read-only: the shim is kept elsewhere, as the
    kernels are."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    locked = native_cache.locked

    def read_only(path):
        if path.parent != private:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return locked(path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shim, "_compile", lambda compiler, source, path: path.write_text("shim"))
    monkeypatch.setattr(native_cache, "locked", read_only)
    monkeypatch.setattr(native_cache, "private_folder", lambda: private)
    monkeypatch.setenv("FASTTTA_CACHE", str(tmp_path / "cache"))
    with first_use.recording() as told:
        path = shim.build()
    assert path.parent == private
    assert path.read_text() == "shim"
    assert [(x.kind, x.name) for x in told] == [("library", str(path))]
    monkeypatch.setattr(native_cache, "private_folder", lambda: 1 / 0)
    monkeypatch.setattr(native_cache, "locked", lambda path: locked(tmp_path / "no" / "folder"))
    with pytest.raises(FileNotFoundError):
        shim.build()


def test_with_a_gpu_no_shim_is_built(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert shim.build() is None


def test_the_command_line_names_every_gpu():
    assert tuple(roofline.GPUS) == GPUS

"""Class names to token ids."""

from __future__ import annotations

import gzip
from types import SimpleNamespace

import pytest
import torch
from places import SHARED

from fasttta.families.class_names import clip_bpe, token_ids

MERGES = SHARED / "data/clip_bpe/bpe_simple_vocab_16e6.txt.gz"


def test_tokenizers_of_every_kind():
    """A tensor as open_clip's, input_ids as Hugging Face's, lists of any length."""
    rows = [[98, 5, 6, 99], [98, 5, 99]]
    padded = torch.tensor([[98, 5, 6, 99], [98, 5, 99, 0]])
    seen = []

    def lists(texts):
        seen.extend(texts)
        return rows

    for tokenizer in (
        lists, lambda texts: padded.int(), lambda texts: {"input_ids": rows},
        lambda texts: {"input_ids": padded},
    ):  # fmt: skip
        tokens = token_ids(["pit_bull", "cat"], "a pet photo of a", tokenizer=tokenizer)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, padded)
    assert seen == ["a pet photo of a pit bull.", "a pet photo of a cat."]
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert torch.equal(token_ids(ids), ids)


def test_merges_of_an_installed_package(tmp_path, monkeypatch):
    from fasttta.families import class_names as classes

    (tmp_path / classes._MERGES).write_bytes(b"")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(classes.importlib.util, "find_spec", lambda name: spec)
    assert classes._installed_merges() == tmp_path / classes._MERGES


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    path = tmp_path / "merges.txt"
    path.write_text("#version\na b\n")
    with pytest.raises(ImportError, match=r"pip install fasttta\[clip\]"):
        token_ids(["cat"], tokenizer=path)


def test_a_small_merges_file(tmp_path):
    pytest.importorskip("tokenizers")
    text = "#version\nc a\nca t</w>\n"
    (tmp_path / "merges.txt").write_text(text)
    with gzip.open(tmp_path / "merges.txt.gz", "wt") as file:
        file.write(text)
    for name in ("merges.txt", "merges.txt.gz"):
        (row,) = clip_bpe(tmp_path / name)(["Cat"])
        assert row == [514, 513, 515]  # 512 bytes and their word ends, two merges, SOT and EOT
    (tmp_path / "empty.txt").write_text("#version\n")
    with pytest.raises(ValueError, match="holds no merges"):
        clip_bpe(tmp_path / "empty.txt")


@pytest.mark.skipif(not MERGES.is_file(), reason="no merges file here")
def test_clip_tokens():
    """Token ids that OpenAI's tokeniser gives."""
    pytest.importorskip("tokenizers")
    encode = clip_bpe(MERGES)
    for text, expected in (
        ("a photo of a", [320, 1125, 539, 320]),
        (".", [269]),
        ("a satellite-map photo of a", [320, 10316, 268, 3923, 1125, 539, 320]),
        ("  A   PHOTO\n of &amp;amp; a", [320, 1125, 539, 261, 320]),
        ("", []),
    ):
        assert encode([text])[0] == [49406, *expected, 49407], text
    digits = encode(["boeing 737-200"])[0]
    assert len(digits) == 2 + 1 + 3 + 1 + 3  # digits one by one
    assert len(encode(["naïve Ünïcode 日本語 🙂"])[0]) > 4
    assert max(max(row) for row in encode(["zebra", "日本"])) <= 49407

"""Prompts as templates, and what tokenizers may return."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import clips
import numpy as np
import pytest
import torch

import fasttta
from fasttta import methods
from fasttta.families.class_names import token_ids

METHODS = [*clips.METHODS, "rada"]
NAMES = ["cat", "pit_bull"]


class Tokenizer:
    """Words as numbers; remembers what it was asked."""

    def __init__(self):
        self.texts, self.words = [], {}

    def __call__(self, texts):
        self.texts += texts
        rows = []
        for text in texts:
            words = text.replace(".", " .").replace(",", " ,").split()
            ids = [self.words.setdefault(word, 5 + len(self.words)) for word in words]
            rows.append([clips.SOT, *ids, clips.EOT])
        return rows


def _adapt(method, prompt, **options):
    tokenizer = Tokenizer()
    options = {**clips.METHODS.get(method, {"heads": 2, "views": 4}), **options}
    adapted = fasttta.adapt(
        clips.tiny_clip(), method, classes=NAMES, prompt=prompt, tokenizer=tokenizer, **options
    )
    return adapted, tokenizer.texts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a photo of a {}.", ["a photo of a cat.", "a photo of a pit bull."]),
        ("a photo of a {}", ["a photo of a cat", "a photo of a pit bull"]),
        ("a_photo of {}, a_pet.", ["a photo of cat, a pet.", "a photo of pit bull, a pet."]),
        ("a photo of a", ["a photo of a cat.", "a photo of a pit bull."]),
    ],
)
def test_templates(method, prompt, texts):
    adapted, seen = _adapt(method, prompt)
    assert seen == texts
    assert adapted.step(clips.image(0)).logits.shape == (1, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "prompt",
    ["a {name}.", "a {0}.", "a {} or a {}.", "a {{}}.", "a {!r}.", "a } {", "a {", "}", "{ }"],
)
def test_other_braces(method, prompt):
    with pytest.raises(ValueError, match=r"prompt=.*: needed .*one \{\} in its place"):
        _adapt(method, prompt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompt", ["", "  ", None, 3])
def test_no_words(method, prompt):
    with pytest.raises((ValueError, TypeError), match="prompt"):
        _adapt(method, prompt)


def test_the_name_may_come_first():
    for method in ("mta", "ttc", "source", "rada"):
        adapted, texts = _adapt(method, "{} in a photo.")
        assert texts == ["cat in a photo.", "pit bull in a photo."]
        adapted.step(clips.image(0))
    for method in clips.TUNING:
        for prompt in ("{} in a photo.", "{}", " {}."):
            with pytest.raises(ValueError, match=f"prompt=.*'{method}' tunes the words before"):
                _adapt(method, prompt)


@pytest.mark.parametrize("method", clips.TUNING)
def test_words_behind_the_name_stay_fixed(method):
    """Four words are tuned, and the result is that of the ids with as many."""
    adapted, _ = _adapt(method, "a photo of a {}, a pet.")
    assert adapted.tuned["prompt"].shape == (4, 20)
    tokenizer = Tokenizer()
    ids = token_ids(NAMES, "a photo of a {}, a pet.", tokenizer=tokenizer)
    by_ids = fasttta.adapt(
        clips.tiny_clip(), method, classes=ids, prompt_length=4, **clips.METHODS[method]
    )
    image = clips.image(3)
    clips.same(adapted.step(image), by_ids.step(image))
    # only the end differs, which is a token of its own
    plain = token_ids(NAMES, "a photo of a {}.", tokenizer=tokenizer)
    assert torch.equal(plain[:, :6], ids[:, :6])


def test_a_template_with_a_full_stop_is_the_plain_prompt():
    image = clips.image(1)
    for method in ("tpt", "source"):
        a, b = (_adapt(method, x)[0] for x in ("a photo of a", "a photo of a {}."))
        clips.same(a.step(image), b.step(image))
        assert a.options.tuned_length == b.options.tuned_length if method == "tpt" else True


def test_names_may_have_braces():
    tokenizer = Tokenizer()
    token_ids(["{x}", "{}"], "a {}.", tokenizer=tokenizer)
    assert tokenizer.texts == ["a {x}.", "a {}."]


def test_ids_take_no_prompt():
    """Documented: with token ids neither prompt nor tokenizer is looked at."""
    adapted = clips.adapt(clips.tiny_clip(), "mta", prompt="a {}.")
    expected = clips.adapt(clips.tiny_clip(), "mta")
    assert torch.equal(adapted.predict(clips.image(0)), expected.predict(clips.image(0)))


def test_saved_templates(tmp_path):
    adapted, _ = _adapt("tpt", "a photo of a {}, a pet.")
    adapted.save(tmp_path)
    loaded = fasttta.load(clips.tiny_clip(), tmp_path)
    assert loaded.options.prompt == "a photo of a {}, a pet."
    clips.same(adapted.step(clips.image(0)), loaded.step(clips.image(0)))


ROWS = [[98, 5, 99], [98, 5, 6, 99]]
PADDED = torch.tensor([[98, 5, 99, 0], [98, 5, 6, 99]])


@pytest.mark.parametrize(
    "returned",
    [
        ROWS, tuple(map(tuple, ROWS)), PADDED, PADDED.to(torch.int32), PADDED.numpy(),
        [torch.tensor(row) for row in ROWS], [np.array(row) for row in ROWS],
        {"input_ids": PADDED, "attention_mask": PADDED > 0}, UserDict(input_ids=ROWS),
        SimpleNamespace(input_ids=PADDED), [SimpleNamespace(ids=row) for row in ROWS],
        [torch.tensor(row, dtype=torch.int32) for row in ROWS],
    ],
)  # fmt: skip
def test_what_tokenizers_return(returned):
    ids = token_ids(NAMES, tokenizer=lambda texts: returned)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, PADDED)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (ROWS[:1], ValueError, "returned 1 rows for 2 texts"),
        ([*ROWS, ROWS[0]], ValueError, "returned 3 rows for 2 texts"),
        (PADDED[:1], ValueError, "returned 1 rows for 2 texts"),
        (PADDED[0], ValueError, "returned 4 rows for 2 texts"),
        (PADDED[:, None], ValueError, r"a row of shape \[1, 4\]"),
        (PADDED.float(), TypeError, "returned torch.float32; needed integers"),
        (PADDED > 0, TypeError, "returned torch.bool"),
        ([[98, 5.5, 99], [98, 99]], TypeError, r"the row \[98, 5.5, 99\]"),
        ([[98, "cat", 99], [98, 99]], TypeError, "the row"),
        (["98 5 99", "98 99"], TypeError, "the row '98 5 99'"),
        ([[], [98, 99]], ValueError, r"a row of shape \[0\]"),
        ([98, 99], TypeError, "the row 98"),
        ([None, None], TypeError, "the row None"),
        ([], ValueError, "returned 0 rows for 2 texts"),
        (None, TypeError, "tokenizer returned None; needed a row of token ids for each text"),
        ({"ids": ROWS}, TypeError, "tokenizer returned {'ids'"),
        ("98 99", TypeError, "tokenizer returned '98 99'"),
    ],
)
def test_what_tokenizers_may_not_return(returned, error, match):
    with pytest.raises(error, match=match):
        token_ids(NAMES, tokenizer=lambda texts: returned)


def test_at_least_one_view_is_selected():
    """A tenth of 4 views is one; above one the share is rounded down, as official code does."""
    assert [methods.TPT(views=n).selected_count(n) for n in (1, 4, 8, 19, 20, 64)] == [
        1, 1, 1, 1, 2, 6,
    ]  # fmt: skip
    for method in clips.TUNING:
        result = clips.adapt(clips.tiny_clip(), method, views=4, select=0.1).step(clips.image(0))
        assert result.stats["selected"].shape == (1,)

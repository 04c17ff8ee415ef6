"""The captions that the demo's CLIP reads, their words and the tokenizer of these."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "white": (0.95, 0.95, 0.95),
    "yellow": (0.95, 0.85, 0.25),
    "pink": (0.95, 0.6, 0.75),
    "cyan": (0.4, 0.9, 0.9),
}  # red, green, blue in [0, 1]
PAPERS = {
    "black": (0.08, 0.08, 0.08),
    "blue": (0.1, 0.15, 0.5),
    "green": (0.05, 0.35, 0.15),
    "brown": (0.4, 0.22, 0.1),
}
PROMPT = "a photo of the digit"
#: captions of training; what a caption does not mention may be anything
TEMPLATES = (
    PROMPT + " {digit}.",
    "a picture of the digit {digit}.",
    "a drawing of the digit {digit}.",
    "a photo of a {ink} {digit}.",
    "the digit {digit} on {paper}.",
    "a {ink} {digit} on {paper}.",
)
CONTEXT = 12

_WORDS = sorted({*" ".join(TEMPLATES).replace(".", "").split(), *DIGITS, *INKS, *PAPERS} - {
    "{digit}", "{ink}", "{paper}"
})  # fmt: skip
_IDS = {word: i for i, word in enumerate(["", ".", *_WORDS, "<start>", "<end>"])}
VOCABULARY = len(_IDS)


def tokenize(texts: Sequence[str]) -> Tensor:
    """Texts -> ids [n, CONTEXT] int64: start, a token a word or full stop, end, then 0.

    Raises:
        ValueError: a word that the model does not know, or too many of them.
    """
    ids = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        words = re.findall(r"\w+|\S", text.lower())
        unknown = [word for word in words if word not in _IDS]
        if unknown:
            raise ValueError(f"{text!r}: unknown {', '.join(unknown)}; known: {', '.join(_WORDS)}")
        if len(words) + 2 > CONTEXT:
            raise ValueError(f"{text!r} has {len(words)} words; needed at most {CONTEXT - 2}")
        row[: len(words) + 2] = torch.tensor(
            [_IDS["<start>"], *(_IDS[word] for word in words), _IDS["<end>"]]
        )
    return ids

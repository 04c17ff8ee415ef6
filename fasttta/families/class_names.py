"""From class names to token ids."""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.prompt_text import split_prompt
from ..ops.checks import dense

_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_PACKAGES = ("open_clip", "clip")  # packages that contain OpenAI's merges file
_COUNT = 49152 - 256 - 2  # merges of the file that OpenAI's vocabulary uses
_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def token_ids(
    classes: Any,
    prompt: str = "a photo of a",
    context_length: int = 77,
    tokenizer: Callable | str | os.PathLike | None = None,
) -> Tensor:
    """Token ids [C, L] of the classes' prompts, with underscores as spaces.

    Args:
        classes: class names, or token ids [C, L] int64, which are returned unchanged; ``prompt``
            and ``tokenizer`` are then ignored.
        prompt: what precedes the class name and a full stop, or a template with ``{}`` in the
            name's place: ``"a photo of a {}, a type of pet."``
        tokenizer: takes a list of texts to ids [C, L] (a tensor, lists, or an object with
            ``input_ids``, such as open_clip's and Hugging Face's); or the path of CLIP's merges
            file. None: that file in an installed open_clip or clip package.

    Raises:
        TypeError, ValueError: classes are neither names nor ids, or there is no tokenizer, or it
            returns something else than a row of ids a text; a prompt with other braces, or longer
            than the context.
    """
    if isinstance(classes, Tensor):
        classes = dense("classes", classes)
        if classes.dtype != torch.int64 or classes.ndim != 2 or not classes.numel():
            raise TypeError(
                f"classes must be names or int64 token ids [C, L], found {classes.dtype} "
                f"{list(classes.shape)}"
            )
        return classes.detach().cpu()
    if classes is None:
        raise ValueError(
            "classes=None: vision-language models need class names, or token ids [C, L] (int64): "
            'fasttta.adapt(model, classes=["cat", "dog"])'
        )
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise TypeError(f"classes must be a list of names or token ids, found {classes!r:.80}")
    odd = [name for name in classes if not isinstance(name, str) or not name.strip()]
    if not classes:
        raise TypeError("classes is an empty list; needed a list of names")
    if odd:
        raise TypeError(f"classes must be a list of names, found {odd[0]!r:.80} in it")
    before, after = split_prompt(prompt)
    texts = [before + name.replace("_", " ") + after for name in classes]
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        rows = _builtin(tokenizer)(texts)
    elif callable(tokenizer):
        rows = tokenizer(texts)
    else:
        raise TypeError(f"tokenizer must be a callable or a path, found {tokenizer!r:.80}")
    ids = _padded(rows, len(texts))
    ends = ids.argmax(1) + 1
    long = [
        f"{name!r} ({int(end)} tokens)"
        for name, end in zip(classes, ends, strict=True)
        if end > context_length
    ]
    if long:
        raise ValueError(
            f"class names longer than the context of {context_length} tokens, prompt {prompt!r} "
            f"included: {', '.join(long[:3])}; shorten them"
        )
    return ids


def _padded(returned: Any, texts: int) -> Tensor:
    """What a tokenizer returned for ``count`` texts, as int64 [C, L]; short rows are padded with 0.

    Raises:
        TypeError: these are no rows of integers.
        ValueError: they are not as many as the texts, or one is empty.
    """
    rows = returned
    if isinstance(rows, Mapping):
        rows = rows.get("input_ids")
    elif hasattr(rows, "input_ids"):
        rows = rows.input_ids
    if not isinstance(rows, Tensor):
        if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
            raise TypeError(
                f"tokenizer returned {returned!r:.80}; needed a row of token ids for each text, "
                "a tensor [C, L], or an object with input_ids"
            )
        # items of a Hugging Face fast tokenizer's encode_batch have ids
        rows = [torch.as_tensor(_row(row)) for row in rows]
    if len(rows) != texts:
        raise ValueError(
            f"tokenizer returned {len(rows)} rows for {texts} texts; needed one a text"
        )
    shapes = [list(row.shape) for row in rows]
    if any(len(shape) != 1 or not shape[0] for shape in shapes):
        odd = next(shape for shape in shapes if len(shape) != 1 or not shape[0])
        raise ValueError(f"tokenizer returned a row of shape {odd}; needed ids [L], at least one")
    kinds = {row.dtype for row in rows}
    if not kinds <= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}:
        raise TypeError(f"tokenizer returned {', '.join(map(str, kinds))}; needed integers")
    rows = [row.detach().to("cpu", torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _row(row: Any) -> Any:
    """A row that ``torch.as_tensor`` takes."""
    ids = getattr(row, "ids", row)
    integers = isinstance(ids, (Tensor, np.ndarray)) or (
        isinstance(ids, Sequence) and all(isinstance(x, Integral) for x in ids)
    )
    if isinstance(ids, (str, bytes)) or not integers:
        raise TypeError(f"tokenizer returned the row {row!r:.80}; needed integers, its token ids")
    return ids


def _builtin(path: str | os.PathLike | None) -> Callable[[list[str]], list[list[int]]]:
    path = _installed_merges() if path is None else Path(path)
    if path is None:
        raise ValueError(
            "class names need a tokenizer: pass tokenizer=, a callable (open_clip's, Hugging "
            f"Face's) or the path of CLIP's merges file ({_MERGES}); or give classes as token ids "
            "[C, L] (int64)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={os.fspath(path)!r}: no such merges file")
    return clip_bpe(path)


def _installed_merges() -> Path | None:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)  # does not import it
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder, _MERGES)).is_file():
                return path
    return None


def clip_bpe(path: str | os.PathLike) -> Callable[[list[str]], list[list[int]]]:
    """CLIP's byte-level BPE from its merges file (.txt or .txt.gz), through ``tokenizers``.

    Texts are normalised as CLIP does (entities, white space, lower case), except that ftfy's
    repair of broken encodings is left out.

    Raises:
        ImportError: the package ``tokenizers`` is missing.
        ValueError: the file holds no merges.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise ImportError(
            "class names need the package tokenizers: pip install fasttta[clip]; or pass "
            "tokenizer=, a callable, or classes as token ids [C, L] (int64)"
        ) from error
    import gzip

    opened = gzip.open if os.fspath(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + _COUNT]  # the first line is a version
    pairs = [line.split() for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{os.fspath(path)!r} holds no merges, two symbols a line")
    merges = [(left, right) for left, right in pairs]
    symbols = _byte_symbols()
    words = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, _SOT, _EOT])}
    bpe = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=_EOT, continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )  # fmt: skip
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = vocabulary[_SOT], vocabulary[_EOT]

    def encode(texts: list[str]) -> list[list[int]]:
        plain = [html.unescape(html.unescape(text)).strip() for text in texts]
        encodings = bpe.encode_batch(plain, add_special_tokens=False)
        return [[start, *encoding.ids, end] for encoding in encodings]

    return encode


def _byte_symbols() -> list[str]:
    """The printable characters that stand for bytes, in the order of OpenAI's vocabulary: those
    that are printable themselves first, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256 - len(printable))
    return [chr(b) for b in printable] + [chr(256 + i) for i in others]

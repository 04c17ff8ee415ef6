"""Parses prompts: words before the class name, or a template with a place for it."""

from __future__ import annotations

from typing import Any

from .options import require

PLACE = "{}"


def split_prompt(prompt: Any) -> tuple[str, str]:
    """The texts before and after a class name: ``"a photo of a"`` is followed by a space, the
    name and a full stop; in the template ``"a photo of a {}, a pet."`` the name stands at ``{}``
    and nothing is added. Underscores are spaces.

    Raises:
        ValueError: no words, several places, or other braces.
    """
    require(isinstance(prompt, str) and bool(prompt.strip()), "prompt",
            prompt, "words such as \"a photo of a\"")  # fmt: skip
    before, place, after = prompt.partition(PLACE)
    if not place:
        before, after = f"{prompt} ", "."
    if any(brace in before + after for brace in "{}"):
        raise ValueError(
            f"prompt={prompt!r}: needed words that precede the class name, or a template with one "
            '{} in its place, such as "a photo of a {}."; no other braces'
        )
    return before.replace("_", " "), after.replace("_", " ")


def prompt_words(prompt: Any) -> int:
    """Words before the class name, separated by spaces, as official code counts them."""
    before = split_prompt(prompt)[0].strip()
    return len(before.split(" ")) if before else 0

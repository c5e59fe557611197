"""When, and how strongly, a word's attention is edited.

Prompt-to-Prompt, 2022, arXiv 2208.01626. The map of the source is used in a window of the sampling steps, whose bounds
are shares of them and may differ from word to word; after it the target's own map takes over. With T steps and share
s, the table over steps has T + 1 rows and a bound is row int(s (T + 1)); windows of self-attention count int(s T).
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .alignment import find_word, text_length, word_indices


Share = float | tuple[float, float]

LARGEST = torch.finfo(torch.float32).max

# The key of `cross_replace_steps` for all words that it does not name.
DEFAULT_WORDS = "default_"


def checked_share(value: Any, name: str) -> float:
    """Checks a number from 0 to 1."""
    share = checked_finite(value, name)
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={value!r} is not a share between 0 and 1")
    return share


def checked_finite(value: Any, name: str) -> float:
    """Checks a number that float32 can hold."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # NaN is not at most anything, and a huge int is compared without becoming a float.
    if not is_number or not abs(value) <= LARGEST:
        raise ValueError(f"{name}={value!r} is not a finite number")
    return float(value)


def checked_count(value: Any, name: str) -> int:
    """Checks a whole number from 1 to 100 000."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= int(value) <= 100_000:
        raise ValueError(f"{name}={value!r} is not a whole number from 1 to 100000")
    return int(value)


def checked_window(value: Any, name: str) -> tuple[float, float]:
    """Checks shares of the steps: an end, or a start and an end.

    Args:
        value (`float` or `tuple[float, float]`): Shares between 0 and 1.
        name (`str`): The argument, for messages.

    Returns:
        `tuple[float, float]`: Start and end.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"{name}={value!r} is not (start, end) in shares of the steps between 0 and 1")
        start, end = (checked_share(item, name) for item in value)
        if start > end:
            raise ValueError(f"{name}={value!r} ends before it starts; give (start, end)")
        return start, end
    return 0.0, checked_share(value, name)


def window_bounds(window: tuple[float, float], count: int) -> tuple[int, int]:
    """First row of a window and the first one after it, of `count` rows."""
    # 0.29 * 100 is 28.999999999999996: a share that is written as a whole number of rows shall be one.
    start, end = (math.floor(share * count + 1e-9) for share in window)
    return start, end


def word_schedule(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    num_inference_steps: int,
    cross_replace_steps: Share | Mapping[str, Share],
) -> torch.Tensor:
    """In which steps each token of each target has the edited map.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompts (`Sequence[str]`): The source's prompt, then the targets'.
        num_inference_steps (`int`): T, the sampling steps.
        cross_replace_steps (`float`, `tuple` or `dict`):
            Share of the steps, `(start, end)`, or one of both by word, `"default_"` for all others. Without a default
            they are edited in all steps. A word counts in every target that has it.

    Returns:
        `torch.Tensor` of shape `(T + 1, targets, L)`: True where the edited map is used, bool.

    Raises:
        ValueError: If a share is wrong, or a word is in no target.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext.attention import word_schedule

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        prompts = ["a red star", "a blue star"]
        schedule = word_schedule(tokenizer, prompts, 10, {"default_": 0.8, "blue": (0.0, 0.4)})
        assert schedule[:, 0, 1].sum() == 8 and schedule[:, 0, 2].sum() == 4
        ```
    """
    targets = list(prompts)[1:]
    rows = checked_count(num_inference_steps, "num_inference_steps") + 1
    by_word = cross_replace_steps if isinstance(cross_replace_steps, Mapping) else {DEFAULT_WORDS: cross_replace_steps}
    if not by_word:
        raise ValueError("cross_replace_steps={} names no word; give a share of the steps, or {word: share}")
    schedule = torch.zeros(rows, len(targets), text_length(tokenizer), dtype=torch.bool)
    start, end = window_bounds(checked_window(by_word.get(DEFAULT_WORDS, 1.0), "cross_replace_steps"), rows)
    schedule[start:end] = True
    for word, window in by_word.items():
        if word == DEFAULT_WORDS:
            continue
        start, end = window_bounds(checked_window(window, f"cross_replace_steps[{word!r}]"), rows)
        for number, positions in _in_targets(tokenizer, targets, word, f"cross_replace_steps={by_word!r}").items():
            schedule[:, number, positions] = False
            schedule[start:end, number, positions] = True
    return schedule


def equalizer(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    weights: Mapping[str, float] | Sequence[Mapping[str, float]],
) -> torch.Tensor:
    """Factors of the tokens' attention.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompts (`Sequence[str]`): The source's prompt, then the targets'.
        weights (`dict[str, float]` or a list of them):
            Factors by word, for every target that has the word, or one dict for each target. 1 changes nothing, 0
            hides a word, above 1 makes it stronger, below 0 turns it round.

    Returns:
        `torch.Tensor` of shape `(targets, L)`: Factors, 1 for all other tokens, float32.

    Raises:
        ValueError: If a factor is no finite number, or a word is not there.
    """
    targets = list(prompts)[1:]
    factors = torch.ones(len(targets), text_length(tokenizer))
    if isinstance(weights, Mapping):
        if not weights:
            raise ValueError("weights={} names no word; give {word: factor}")
        for word, factor in weights.items():
            weight = checked_finite(factor, f"weights[{word!r}]")
            for number, positions in _in_targets(tokenizer, targets, word, f"weights={weights!r}").items():
                factors[number, positions] = weight
        return factors
    if not isinstance(weights, (list, tuple)) or not all(isinstance(item, Mapping) for item in weights):
        raise ValueError(f"weights={weights!r} is not a dict of factors by word, or a list of them")
    if len(weights) != len(targets):
        raise ValueError(
            f"weights={weights!r} holds {len(weights)} dicts for {len(targets)} targets; give one for each, {{}} for none"
        )
    for number, (target, of_target) in enumerate(zip(targets, weights, strict=True)):
        for word, factor in of_target.items():
            weight = checked_finite(factor, f"weights[{number}][{word!r}]")
            factors[number, _in_targets(tokenizer, [target], word, f"weights={weights!r}")[0]] = weight
    return factors


def _in_targets(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], word: str, argument: str
) -> dict[int, list[int]]:
    """Positions of a word by the target that has it."""
    if not isinstance(word, str) or not word.split():
        raise ValueError(f"{argument} names {word!r}, which is not a word")
    having = [number for number, target in enumerate(targets) if find_word(tokenizer, target, word) is not None]
    if not having:
        there = ", ".join(repr(text) for text in dict.fromkeys(item for target in targets for item in target.split()))
        raise ValueError(f"{argument} names {word!r}, which is in no target; their words are {there or 'none'}")
    return {number: word_indices(tokenizer, targets[number], word) for number in having}

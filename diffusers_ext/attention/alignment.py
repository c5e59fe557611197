"""Which tokens of two prompts belong together.

Prompt-to-Prompt Image Editing with Cross Attention Control, 2022, arXiv 2208.01626. A cross-attention map has a column
for each of the L tokens that the text encoder reads. To carry the map of the source prompt over to a target prompt,
the columns must be brought in the target's order:

    word swap       A <- A_src M            M of shape (L, L), rows that sum to 1: no attention is lost or made
    refinement      A[:, j] <- A_src[:, m(j)]  where token j of the target has a partner m(j) in the source

Words are what whitespace separates. A byte-pair tokenizer never merges across whitespace, so the tokens of a prompt
are those of its words one after the other; nothing here counts characters, which goes wrong at accents, emoji and
double spaces.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase


Alignment = Literal["matched", "official"]
ALIGNMENTS = ("matched", "official")

# More tokens than any text encoder reads: a tokenizer that was saved without a length says 1e30.
_LONGEST = 10_000
_EDGES = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)


class Word(NamedTuple):
    """A word of a prompt and where its tokens are.

    Attributes:
        text (`str`): As written, with the punctuation that touches it.
        tokens (`tuple[int, ...]`): Its token ids.
        start (`int`): Position of the first one in the prompt; the start of text is position 0.
    """

    text: str
    tokens: tuple[int, ...]
    start: int


def text_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a text encoder reads, padding included: the number of columns of a cross-attention map.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.

    Returns:
        `int`: Its `model_max_length`, 77 for CLIP.

    Raises:
        TypeError: If it is no tokenizer.
        ValueError: If it does not say how many.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer={tokenizer!r} is not a tokenizer; give `pipe.tokenizer`")
    length = tokenizer.model_max_length
    if not 2 < length <= _LONGEST:
        raise ValueError(
            f"tokenizer.model_max_length={length} is not the length of a text encoder; set it to what the encoder "
            "reads, 77 for CLIP"
        )
    return int(length)


def prompt_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[Word]:
    """Splits a prompt at whitespace and finds the tokens of each word.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompt (`str`): Any text, also an empty one or one that is too long.

    Returns:
        `list[Word]`: The words that have tokens, also those beyond what the model reads.

    Raises:
        TypeError: If `tokenizer` is no tokenizer.
        ValueError: If `prompt` is not a str, or tokens cannot be told to words.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext.attention import prompt_words

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        words = prompt_words(tokenizer, "a red star")
        assert [word.text for word in words] == ["a", "red", "star"] and words[0].start == 1
        ```
    """
    length = text_length(tokenizer)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r} is not a str")
    words, start = [], 1
    for text in prompt.split():
        tokens = tuple(_tokens_of(tokenizer, text))
        if tokens:
            words.append(Word(text, tokens, start))
            start += len(tokens)
    together = [token for word in words for token in word.tokens]
    read = tokenizer(prompt, truncation=True, max_length=length).input_ids
    if len(read) < 2 or list(read[1:-1]) != together[: length - 2]:
        raise ValueError(
            f"prompt={prompt!r} has tokens that belong to no word; write it with plain spaces, for a tokenizer that "
            "puts one token before the text and one behind it, as CLIP's do"
        )
    return words


def word_indices(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[int]:
    """Positions of the tokens of a word in a prompt.

    Upper and lower case are the same, and punctuation at the edges of a word does not count: `"cat"` is found in `"a
    Cat, asleep"` without the comma's token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompt (`str`): The prompt.
        word (`str`): A word, or several in a row such as `"teddy bear"`. Wherever it stands, all its places count.

    Returns:
        `list[int]`: Positions from 1 to `text_length(tokenizer) - 2`, ascending.

    Raises:
        ValueError: If the prompt does not have the word (the message says what it has), or only beyond what the model
        reads.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext.attention import word_indices

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        assert word_indices(tokenizer, "a red star on a blue background", "star") == [3]
        ```
    """
    words = prompt_words(tokenizer, prompt)
    found = find_word(tokenizer, prompt, word)
    if found is None:
        there = ", ".join(repr(item.text) for item in words) or "none"
        raise ValueError(f"word {word!r} is not in the prompt {prompt!r}; its words are {there}")
    read = [position for position in found if position < text_length(tokenizer) - 1]
    if not read:
        raise ValueError(
            f"word {word!r} stands beyond the {text_length(tokenizer) - 2} tokens that the model reads of {prompt!r}; "
            "put it further to the front"
        )
    return read


def find_word(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[int] | None:
    """As [`word_indices`], but None where the prompt does not have the word, and all positions where it has."""
    if not isinstance(word, str) or not word.split():
        raise ValueError(f"word={word!r} is not a word of the prompt")
    words = prompt_words(tokenizer, prompt)
    wanted = [_bare(item) for item in word.split()]
    bare = [_bare(item.text) for item in words]
    positions: set[int] = set()
    for first in range(len(words) - len(wanted) + 1):
        if bare[first : first + len(wanted)] == wanted:
            for item in words[first : first + len(wanted)]:
                positions.update(_positions_without_punctuation(tokenizer, item))
    return sorted(positions) or None


def replacement_mapper(
    tokenizer: PreTrainedTokenizerBase, source: str, target: str, alignment: Alignment = "matched"
) -> torch.Tensor:
    """The matrix that carries a map over where words are swapped one for one.

    Words of as many tokens are mapped token by token; else each token of the old word is spread evenly over those of
    the new one. Padding keeps its place, and what finds no place goes to the end of the target's text, so that rows
    sum to 1.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        source (`str`): Prompt of the source picture.
        target (`str`): Prompt of the edit, with as many words.
        alignment (`str`, *optional*, defaults to `"matched"`):
            `"official"` repeats the authors' code, which from the last swapped word on maps position to position. If
            that word changed its number of tokens, the words after it are then mapped to their neighbours and rows sum
            to 0 or 2.

    Returns:
        `torch.Tensor` of shape `(L, L)`: M with source tokens in rows and target tokens in columns, float32.

    Raises:
        ValueError: If the prompts differ in their number of words.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment={alignment!r} is not one of {', '.join(ALIGNMENTS)}")
    old, new = prompt_words(tokenizer, source), prompt_words(tokenizer, target)
    if len(old) != len(new):
        raise ValueError(
            f"prompts have {len(old)} and {len(new)} words: {source!r} and {target!r}; AttentionReplace swaps words one "
            "for one, use AttentionRefine for prompts of different lengths"
        )
    length = text_length(tokenizer)
    pairs = [(_positions(was, length), _positions(now, length), was, now) for was, now in zip(old, new, strict=True)]
    mapper = torch.zeros(length, length)
    if alignment == "official":
        swapped = [(was, now) for was, now, word, other in pairs if word.tokens != other.tokens]
        return _official_mapper(mapper, swapped)
    mapper[0, 0] = 1
    for was, now, _, _ in pairs:
        _map_word(mapper, was, now)
    end_of_source, end_of_target = _end(old, length), _end(new, length)
    mapper[end_of_source, end_of_target] = 1
    padding = torch.arange(max(end_of_source, end_of_target) + 1, length)
    mapper[padding, padding] = 1
    mapper[mapper.sum(1) == 0, end_of_target] = 1
    return mapper


def align_tokens(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """Aligns two sequences by Needleman and Wunsch, with scores 0 for a gap, 1 for equal tokens, -1 for others.

    Two gaps are better than a pair of unequal tokens, so only equal ones are ever aligned. Among alignments of the
    same score the authors' choice is taken, which seen from the end leaves tokens of the target out first.

    Args:
        source (`Sequence[int]`): Token ids.
        target (`Sequence[int]`): Token ids.

    Returns:
        `list[int]`: For each token of the target the position of its partner in the source, or -1.

    Example:
        ```python
        from diffusers_ext.attention import align_tokens

        assert align_tokens([7, 8, 9], [7, 5, 9]) == [0, -1, 2]
        ```
    """
    rows, columns = len(source), len(target)
    score = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            pair = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], pair)
    partners = [-1] * columns
    i, j = rows, columns
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            partners[j] = i
    return partners


def refinement_mapper(
    tokenizer: PreTrainedTokenizerBase, source: str, target: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the columns of a refined prompt come from.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        source (`str`): Prompt of the source picture.
        target (`str`): Prompt of the edit, of any length.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: For each token of the target the position of its partner in the source
        (`(L,)`, int64, -1 where there is none), and whether it has one (`(L,)`, bool). Padding is its own partner.
    """
    length = text_length(tokenizer)
    prompt_words(tokenizer, source), prompt_words(tokenizer, target)
    old, new = (tokenizer(text, truncation=True, max_length=length).input_ids for text in (source, target))
    partners = align_tokens(old, new)
    mapper = torch.tensor(partners + list(range(len(partners), length)))
    return mapper, mapper >= 0


def checked_prompts(prompts: Any) -> list[str]:
    """Checks the prompts of a controller: the source's and at least one target's."""
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts={prompts!r} is not a list of str; give [source prompt, target prompt, ...]")
    if len(texts) < 2:
        raise ValueError(f"prompts={prompts!r} holds {len(texts)} prompts; give [source prompt, target prompt, ...]")
    return texts


def _tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _parts(word: str) -> tuple[str, ...]:
    """Punctuation before a word, the word, punctuation behind it."""
    match = _EDGES.match(word)
    return match.groups() if match else ("", word, "")


def _bare(word: str) -> str:
    return (_parts(word)[1] or word).lower()


def _positions(word: Word, length: int) -> list[int]:
    """Positions of a word's tokens, as far as the model reads them."""
    return [position for position in range(word.start, word.start + len(word.tokens)) if position < length - 1]


def _positions_without_punctuation(tokenizer: PreTrainedTokenizerBase, word: Word) -> range:
    before, inside, behind = (len(_tokens_of(tokenizer, part)) if part else 0 for part in _parts(word.text))
    if inside == 0 or before + inside + behind != len(word.tokens):
        before, inside = 0, len(word.tokens)
    return range(word.start + before, word.start + before + inside)


def _end(words: Sequence[Word], length: int) -> int:
    """Position of the end-of-text token."""
    return min(words[-1].start + len(words[-1].tokens) if words else 1, length - 1)


def _map_word(mapper: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    if len(old) == len(new):
        mapper[list(old), list(new)] = 1
        return
    for row in old:
        mapper[row, list(new)] = 1 / max(len(new), 1)


def _official_mapper(mapper: torch.Tensor, swapped: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
    length = len(mapper)
    row = column = 0
    for old, new in swapped:
        while old and row < old[0] and column < length:
            mapper[row, column] = 1
            row, column = row + 1, column + 1
        _map_word(mapper, old, new)
        row, column = row + len(old), column + len(new)
    rest = torch.arange(column, min(length, length - row + column))
    mapper[rest, rest] = 1
    return mapper

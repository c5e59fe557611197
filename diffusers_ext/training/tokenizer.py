"""A CLIP tokenizer of one's own: byte-pair encoding learnt on the captions of a training set.

The vocabulary has CLIP's structure (start, end, 256 bytes, 256 bytes that end a word, merges), so that the stock
`CLIPTokenizer` reads it, any text can be encoded, and words of the set are single tokens.
"""

from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer


START, END = "<|startoftext|>", "<|endoftext|>"
MAX_MERGES = 4096


def train_tokenizer(
    sentences: Iterable[str], model_max_length: int = 24, max_merges: int = MAX_MERGES
) -> CLIPTokenizer:
    """Learns merges until every word of `sentences` is one token, or `max_merges` is reached.

    Args:
        sentences: Captions; only their words and how often these occur matter.
        model_max_length: Tokens of a prompt with start and end, 3 or more.
        max_merges: Upper limit of the merges, each of which is one entry of the vocabulary.

    Returns:
        A tokenizer whose start, end and padding ids are 0, 1 and 1.

    Raises:
        ValueError: If there are no words, or `model_max_length` leaves no room for one.

    Example:
        >>> tokenizer = train_tokenizer(["a red apple"])
        >>> len(tokenizer("a red apple").input_ids)  # start, three words, end
        5
    """
    if model_max_length < 3:
        raise ValueError(f"model_max_length={model_max_length} leaves no room between start and end; use 3 or more")
    bytes_ = _byte_symbols()
    symbols = [START, END, *bytes_, *(f"{symbol}</w>" for symbol in bytes_)]
    blank = CLIPTokenizer(vocab=_number(symbols), merges=[])
    counts: Counter[tuple[str, ...]] = Counter()
    for sentence in sentences:
        for word in _words(blank, sentence):
            counts[(*word[:-1], f"{word[-1]}</w>")] += 1
    if not counts:
        raise ValueError("sentences holds no words; give the captions of the training set")
    merges = _learn(counts, max_merges)
    symbols += dict.fromkeys(first + second for first, second in merges)
    return CLIPTokenizer(vocab=_number(symbols), merges=merges, model_max_length=model_max_length)


def _words(tokenizer: CLIPTokenizer, sentence: str) -> list[str]:
    """Words of a sentence in byte symbols, split by the very rules that the tokenizer applies."""
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(sentence))]


def _learn(counts: Counter[tuple[str, ...]], max_merges: int) -> list[tuple[str, str]]:
    """Most frequent neighbours first; equal counts in alphabetical order, so that the result never depends on hashing."""
    words = dict(counts)
    merges: list[tuple[str, str]] = []
    while len(merges) < max_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            joined[_join(word, best)] += count
        words = dict(joined)
    return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            result.append(word[i] + word[i + 1])
            i += 2
        else:
            result.append(word[i])
            i += 1
    return tuple(result)


def _byte_symbols() -> list[str]:
    """One printable character a byte value: GPT-2's table, in the order of the bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _number(symbols: list[str]) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(symbols)}

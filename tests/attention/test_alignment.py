"""Which tokens belong together: the authors' aligner, and what must hold for every pair of prompts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffusers_ext.attention import align_tokens, prompt_words, refinement_mapper, replacement_mapper, word_indices
from diffusers_ext.attention.alignment import text_length
from tests.helpers.golden import golden, golden_path
from tests.helpers.tiny_models import tiny_tokenizer


TOKENIZER = CLIPTokenizer.from_pretrained(golden_path("editing/tiny_sd/tokenizer"))
GOLDEN = golden("editing/prompt_to_prompt.npz")
SOURCE, REPLACE, REFINE = (str(GOLDEN[name]) for name in ("source_prompt", "target_replace", "target_refine"))
LENGTH = 77

# one token, several tokens, punctuation, accents, an emoji, a word that may be all of the text
WORDS = st.sampled_from(["a", "cat", "zebra", "watercolor", "Red,", "(hat)", "café", "❤️", "grass.", "x" * 60])
PROMPTS = st.lists(WORDS, max_size=8)


def test_the_swap_of_equal_tokens_is_that_of_the_authors():
    assert torch.equal(replacement_mapper(TOKENIZER, SOURCE, REPLACE), GOLDEN.tensor("mapper_replace")[0])


def test_the_official_swap_of_words_of_different_tokens_is_that_of_the_authors():
    prompts = [str(prompt) for prompt in GOLDEN["multitoken_prompts"]]
    expected = GOLDEN.tensor("mapper_replace_multitoken")[0]
    assert torch.equal(replacement_mapper(TOKENIZER, *prompts, alignment="official"), expected)


def test_what_follows_a_word_of_other_length_stays_with_its_own_word():
    source, target = "a zebra in the grass", "a horse in the grass"
    mapper = replacement_mapper(TOKENIZER, source, target)
    for word in ("in", "the", "grass"):
        row, column = (word_indices(TOKENIZER, prompt, word)[0] for prompt in (source, target))
        assert row == column + 1 and mapper[row, column] == 1
        assert replacement_mapper(TOKENIZER, source, target, "official")[row, column] == 0  # the authors' fault
    assert mapper[word_indices(TOKENIZER, source, "zebra")].nonzero()[:, 1].tolist() == [2, 2]
    assert torch.equal(mapper.sum(1), torch.ones(LENGTH))


def test_the_attention_of_one_token_is_spread_evenly_over_several():
    source, target = "a horse", "a watercolor"
    mapper = replacement_mapper(TOKENIZER, source, target)
    columns = word_indices(TOKENIZER, target, "watercolor")
    torch.testing.assert_close(mapper[2, columns], torch.full((len(columns),), 1 / len(columns)))


def test_the_refinement_is_that_of_the_authors():
    mapper, aligned = refinement_mapper(TOKENIZER, SOURCE, REFINE)
    assert torch.equal(mapper, GOLDEN.tensor("mapper_refine")[0])
    assert torch.equal(aligned.float(), GOLDEN.tensor("alphas_refine")[0])


def test_positions_of_words_are_those_of_the_authors():
    assert word_indices(TOKENIZER, "a photo of a zebra", "zebra") == GOLDEN["word_inds_zebra"].tolist()
    assert word_indices(TOKENIZER, "a watercolor", "watercolor") == GOLDEN["word_inds_watercolor"].tolist()


@given(st.lists(st.tuples(WORDS, WORDS), max_size=8))
def test_a_swap_neither_loses_nor_makes_attention(pairs):
    source, target = (" ".join(words) for words in (zip(*pairs, strict=True) if pairs else ((), ())))
    mapper = replacement_mapper(TOKENIZER, source, target)
    assert mapper.shape == (LENGTH, LENGTH) and bool((mapper >= 0).all())
    torch.testing.assert_close(mapper.sum(1), torch.ones(LENGTH))
    assert mapper[0, 0] == 1


@given(PROMPTS)
def test_equal_prompts_map_every_token_to_itself(words):
    prompt = " ".join(words)
    assert torch.equal(replacement_mapper(TOKENIZER, prompt, prompt), torch.eye(LENGTH))
    assert torch.equal(replacement_mapper(TOKENIZER, prompt, prompt, "official"), torch.eye(LENGTH))
    mapper, aligned = refinement_mapper(TOKENIZER, prompt, prompt)
    assert torch.equal(mapper, torch.arange(LENGTH)) and bool(aligned.all())


@given(PROMPTS, PROMPTS)
def test_a_refinement_aligns_equal_tokens_in_order(source, target):
    source, target = " ".join(source), " ".join(target)
    mapper, aligned = refinement_mapper(TOKENIZER, source, target)
    ids = [
        TOKENIZER(text, truncation=True, max_length=LENGTH, padding="max_length").input_ids
        for text in (source, target)
    ]
    texts = len(TOKENIZER(target, truncation=True, max_length=LENGTH).input_ids)
    partners = mapper[:texts][aligned[:texts]].tolist()
    assert partners == sorted(set(partners))
    for position in range(texts):
        if aligned[position]:
            assert ids[0][mapper[position]] == ids[1][position]
    assert bool(aligned[texts:].all()) and torch.equal(mapper[texts:], torch.arange(texts, LENGTH))


@given(st.lists(st.integers(0, 4), max_size=6), st.lists(st.integers(0, 4), max_size=6))
def test_as_many_tokens_are_aligned_as_can_be(source, target):
    def longest(i: int, j: int) -> int:
        if i == len(source) or j == len(target):
            return 0
        skipped = max(longest(i + 1, j), longest(i, j + 1))
        return max(skipped, 1 + longest(i + 1, j + 1)) if source[i] == target[j] else skipped

    partners = align_tokens(source, target)
    assert len(partners) == len(target)
    assert sum(partner >= 0 for partner in partners) == longest(0, 0)


@given(PROMPTS)
def test_words_cover_the_tokens_of_a_prompt_one_after_the_other(words):
    prompt = "  ".join(words)
    found = prompt_words(TOKENIZER, prompt)
    assert [word.text for word in found] == words
    position = 1
    for word in found:
        assert word.start == position
        position += len(word.tokens)
    assert position == len(TOKENIZER(prompt).input_ids) - 1


def test_case_and_punctuation_do_not_matter_and_the_comma_is_left_out():
    assert word_indices(TOKENIZER, "a Cat, asleep", "cat") == [2]
    assert word_indices(TOKENIZER, "a (red) hat", "RED") == [3]
    assert word_indices(TOKENIZER, "a ❤️", "❤️")


def test_a_word_counts_wherever_it_stands_and_several_words_only_in_a_row():
    assert word_indices(TOKENIZER, "a cat and a cat", "a") == word_indices(TOKENIZER, "a cat and a cat", "A")
    assert len(word_indices(TOKENIZER, "a cat, a cat", "cat")) == 2
    assert word_indices(TOKENIZER, "a red cat", "red cat") == [2, 3]
    with pytest.raises(ValueError, match="'cat red'.*'a', 'red', 'cat'"):
        word_indices(TOKENIZER, "a red cat", "cat red")


def test_a_word_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="'cow' is not in the prompt 'a red cat'; its words are 'a', 'red', 'cat'"):
        word_indices(TOKENIZER, "a red cat", "cow")
    with pytest.raises(ValueError, match="its words are none"):
        word_indices(TOKENIZER, "", "cow")


def test_a_prompt_that_is_too_long_is_read_as_far_as_the_model_reads_it():
    prompt = "cat " * 74 + "zebra dog"
    assert word_indices(TOKENIZER, prompt, "zebra") == [75]  # its second token is cut off
    with pytest.raises(ValueError, match="'dog' stands beyond the 75 tokens"):
        word_indices(TOKENIZER, prompt, "dog")
    mapper = replacement_mapper(TOKENIZER, prompt, "cat " * 74 + "horse dog")
    assert mapper[75, 75] == mapper[76, 76] == 1 and torch.equal(mapper.sum(1), torch.ones(LENGTH))


def test_a_prompt_that_fills_the_text_exactly_has_no_padding():
    prompt = " ".join(["cat"] * 75)
    assert torch.equal(replacement_mapper(TOKENIZER, prompt, prompt.replace("cat", "dog")), torch.eye(LENGTH))


def test_prompts_of_different_lengths_cannot_be_swapped():
    with pytest.raises(ValueError, match="2 and 3 words.*AttentionRefine"):
        replacement_mapper(TOKENIZER, "a cat", "a red cat")
    with pytest.raises(ValueError, match="0 and 1 words"):
        replacement_mapper(TOKENIZER, "", "cat")


def test_another_tokenizer_and_text_length_serve_as_well():
    tokenizer = tiny_tokenizer()
    assert text_length(tokenizer) == 16
    assert replacement_mapper(tokenizer, "a cat", "a dog").shape == (16, 16)


def test_a_tokenizer_without_a_length_or_of_another_kind_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="model_max_length=10000.*77"):
        text_length(tokenizer)
    with pytest.raises(TypeError, match="tokenizer=None"):
        text_length(None)


def test_tokens_that_belong_to_no_word_are_refused():
    with pytest.raises(ValueError, match="belong to no word"):
        prompt_words(TOKENIZER, "a\x1ccat")

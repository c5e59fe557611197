import re
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from diffusers_ext.data.words import BACKGROUNDS, OBJECTS, PATTERNS
from diffusers_ext.training.data import EmojiSource
from diffusers_ext.training.text_to_image import new_text_encoder
from diffusers_ext.training.tokenizer import train_tokenizer


CAPTIONS = ["a red apple on a blue background", "a green star on a pink background", "a star"]


def test_every_word_of_the_captions_is_one_token():
    tokenizer = train_tokenizer(CAPTIONS)
    for caption in CAPTIONS:
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_special_tokens_come_first_and_the_end_pads():
    tokenizer = train_tokenizer(CAPTIONS, model_max_length=8)
    ids = tokenizer("a star", padding="max_length").input_ids
    assert (ids[0], ids[3:]) == (0, [1] * 5)
    assert len(tokenizer("a star " * 20, truncation=True).input_ids) == 8


def test_any_text_can_be_encoded_and_read_back():
    tokenizer = train_tokenizer(CAPTIONS)
    text = "zebra é 漢 7 !"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_capitals_and_spaces_make_no_difference():
    tokenizer = train_tokenizer(CAPTIONS)
    assert tokenizer("A  RED Apple").input_ids == tokenizer("a red apple").input_ids


def test_a_saved_tokenizer_is_the_same_in_stock_transformers(tmp_path: Path):
    tokenizer = train_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*CAPTIONS, "an unknown word", ""]:
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == 24
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)


def test_the_vocabulary_does_not_depend_on_the_order_of_the_captions():
    assert train_tokenizer(CAPTIONS).get_vocab() == train_tokenizer(CAPTIONS[::-1]).get_vocab()


def test_merges_can_be_limited():
    assert len(train_tokenizer(CAPTIONS, max_merges=3)) == 2 + 512 + 3


def test_words_of_all_emoji_scenes_are_single_tokens_even_when_few_are_trained_on():
    tokenizer = train_tokenizer(EmojiSource(seed=0, resolution=32, objects=["apple", "star"]).vocabulary())
    for phrase in (*OBJECTS.values(), *BACKGROUNDS, *PATTERNS):
        assert len(tokenizer(phrase).input_ids) == len(re.findall(r"[a-z]+|-", phrase)) + 2, phrase
    longest = "a yellow teddy bear in fluent style on a yellow checkered background"
    assert len(tokenizer(longest).input_ids) == 14


def test_the_text_encoder_reads_the_end_token_where_it_is():
    tokenizer = train_tokenizer(CAPTIONS)
    encoder = new_text_encoder(tokenizer, width=16, layers=1, heads=2).eval()
    batch = tokenizer(
        ["a star", "a red apple on a blue background"], padding="max_length", return_tensors="pt"
    ).input_ids
    output = encoder(batch)
    for row, position in enumerate((3, 8)):
        assert (output.last_hidden_state[row, position] - output.pooler_output[row]).abs().max() < 1e-6


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="sentences holds no words"):
        train_tokenizer(["  "])
    with pytest.raises(ValueError, match="model_max_length=2 leaves no room"):
        train_tokenizer(CAPTIONS, model_max_length=2)
    with pytest.raises(ValueError, match="text_width=10 must be a multiple of the 4"):
        new_text_encoder(train_tokenizer(CAPTIONS), width=10)

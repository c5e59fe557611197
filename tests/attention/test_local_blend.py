"""The mask of a local blend, and when it is laid on."""

import pytest
import torch

from diffusers_ext.attention import AttentionRefine, LocalBlend
from tests.helpers.tiny_models import MAX_LENGTH, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
PROMPTS = ["a b", "a c"]  # tokens: start, a, b or c, end
WORDS = ["b", "c"]


def maps_with(word: int, place: tuple[int, int], size: tuple[int, int], row: int = 1, heads: int = 2) -> torch.Tensor:
    """Maps of two prompts in which one place of one of them attends to one token."""
    maps = torch.zeros(2, heads, size[0] * size[1], MAX_LENGTH)
    maps[row, :, place[0] * size[1] + place[1], word] = 1
    return maps


def blended(
    blend: LocalBlend, maps: torch.Tensor, latents: torch.Tensor, halvings: int, steps: int = 2
) -> torch.Tensor:
    blend.begin(tuple(latents.shape[-2:]), steps)
    for step in range(steps):
        blend.read("up_blocks.1.attentions.0", halvings, maps)
        latents = blend(step, latents)
    return latents


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (10, 6)])
def test_only_around_the_word_may_the_edit_differ(size):
    latents = torch.randn(2, 4, *size)
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, resolution=0.5)
    found = blended(blend, maps_with(2, (2, 1), half), latents, 1)
    expected = torch.zeros(size, dtype=torch.bool)
    expected[2:8, 0:6] = True  # the position and its neighbours, twice as large
    assert torch.equal(blend.mask[1, 0], expected) and not blend.mask[0].any()
    assert torch.equal(found[1, :, expected], latents[1, :, expected])
    assert torch.equal(found[1, :, ~expected], latents[0, :, ~expected]) and torch.equal(found[0], latents[0])


def test_where_the_source_has_the_word_the_edit_may_differ_too():
    blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, resolution=1.0)
    blended(blend, maps_with(2, (5, 5), (8, 8), row=0), torch.randn(2, 4, 8, 8), 0)
    assert torch.equal(blend.mask[0], blend.mask[1]) and blend.mask.sum() == 18


def test_words_to_subtract_are_taken_out_without_widening():
    blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, subtract_words=[[], "a"], resolution=1.0)
    maps = maps_with(2, (3, 3), (8, 8)) + maps_with(1, (3, 4), (8, 8))
    blended(blend, maps, torch.randn(2, 4, 8, 8), 0)
    assert blend.mask[1].sum() == 8 and not blend.mask[1, 0, 3, 4]


def test_attention_below_the_threshold_does_not_count():
    maps = maps_with(2, (1, 1), (8, 8)) + 0.5 * maps_with(2, (6, 6), (8, 8))
    for threshold, places in ((0.4, 18), (0.6, 9), (1.0, 0)):
        blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, threshold=threshold, resolution=1.0)
        blended(blend, maps, torch.randn(2, 4, 8, 8), 0)
        assert blend.mask[1].sum() == places


def test_blending_begins_after_its_share_of_the_steps_and_remembers_earlier_ones():
    blend, latents = LocalBlend(TOKENIZER, PROMPTS, WORDS, start=0.5, resolution=1.0), torch.randn(2, 4, 8, 8)
    blend.begin((8, 8), 4)
    for step in range(4):
        blend.read("down_blocks.0", 0, maps_with(2, (3 * (step == 0), 3), (8, 8)))
        found = blend(step, latents)
        assert torch.equal(found, latents) == (step < 2)
    assert blend.mask[1, 0, 4, 3] and blend.mask[1, 0, 0, 3]  # 1/4 of it came from the first step: 1/3 of the largest
    blend.begin((8, 8), 4)
    assert blend.mask is None
    blend.read("down_blocks.0", 0, maps_with(2, (7, 7), (8, 8)))
    blend(3, latents)
    assert blend.mask[1].sum() == 4  # nothing is left of the run before


def test_layers_are_averaged_read_once_and_the_middle_block_is_left_out():
    blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, start=0.0, threshold=0.5, resolution=1.0)
    blend.begin((8, 8), 1)
    blend.read("mid_block.attentions.0", 0, 9 * maps_with(2, (0, 0), (8, 8)))
    for _ in range(3):  # recomputed: counts once
        blend.read("down_blocks.0", 0, maps_with(2, (1, 1), (8, 8)))
    blend.read("up_blocks.0", 0, 1.5 * maps_with(2, (6, 6), (8, 8)))
    blend(0, torch.randn(2, 4, 8, 8))
    assert blend.mask[1].sum() == 18 and blend.mask[1, 0, 1, 1] and blend.mask[1, 0, 6, 6]


def test_of_the_maps_that_there_are_the_nearest_in_size_are_read():
    for resolution, expected in ((1.0, 0), (0.5, 1), (0.25, 1), (0.1, 1), (0.75, 0)):
        blend = LocalBlend(TOKENIZER, PROMPTS, WORDS, start=0.0, resolution=resolution)
        blend.begin((8, 8), 1)
        blend.read("down_blocks.0", 0, maps_with(2, (1, 1), (8, 8)))
        blend.read("down_blocks.1", 1, maps_with(2, (3, 3), (4, 4)))
        blend(0, torch.randn(2, 4, 8, 8))
        assert bool(blend.mask[1, 0, 7, 7]) == (expected == 1)


def test_a_step_in_which_the_network_did_not_run_is_noticed():
    blend = LocalBlend(TOKENIZER, PROMPTS, WORDS)
    blend.begin((8, 8), 2)
    with pytest.raises(ValueError, match="saw no attention map.*attach"):
        blend(0, torch.randn(2, 4, 8, 8))
    assert AttentionRefine(TOKENIZER, PROMPTS, local_blend=blend).local_blend is blend


def test_a_single_word_stands_for_the_same_in_every_prompt():
    one = LocalBlend(TOKENIZER, ["a b", "c b"], "b")
    assert torch.equal(one._words, LocalBlend(TOKENIZER, ["a b", "c b"], [["b"], "b"])._words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["b", "d"]}, "'d' is not in the prompt 'a c'; its words are 'a', 'c'"),
        ({"words": ["b"]}, "words has 1 entries for 2 prompts"),
        ({"words": [[], []]}, "names no word"),
        ({"words": 5}, "words=5"),
        ({"words": [5, "c"]}, r"words\[0\]=5"),
        ({"words": "b"}, "'b' is not in the prompt 'a c'"),
        ({"subtract_words": ["b", "x"]}, "'x' is not in"),
        ({"start": 2}, "start=2"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"subtract_threshold": -0.5}, "subtract_threshold=-0.5"),
        ({"resolution": 0}, "resolution=0"),
        ({"resolution": 16}, "resolution=16"),
        ({"prompts": ["a b"]}, "holds 1 prompts"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocalBlend(**{"tokenizer": TOKENIZER, "prompts": PROMPTS, "words": WORDS, **options})

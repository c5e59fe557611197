"""Edits of attention maps against closed forms."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.attention import map_sizes, refinement_mapper, replacement_mapper
from diffusers_ext.attention.maps import (
    above_in_either,
    in_window,
    keep_source_outside,
    refine_words,
    replace_words,
    reweight_words,
    soft_mask,
    word_attention,
)
from tests.attention.test_alignment import TOKENIZER


def random_maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 77, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)


SWAPS = [
    ("a cat", "a dog"),
    ("a zebra here", "a cat here"),
    ("a cat here", "a zebra here"),
    ("", ""),
    ("cat", "watercolor"),
]


def test_a_swap_keeps_the_sum_of_every_row():
    source = random_maps(2, 5)
    mapper = torch.stack([replacement_mapper(TOKENIZER, *pair) for pair in SWAPS])
    maps = replace_words(source, mapper)
    assert maps.shape == (len(SWAPS), 2, 5, 77)
    torch.testing.assert_close(maps.sum(-1), torch.ones(len(SWAPS), 2, 5))


def test_a_swap_moves_the_column_of_a_word():
    source = random_maps(2, 5)
    maps = replace_words(source, replacement_mapper(TOKENIZER, "a zebra here", "a cat here")[None])[0]
    torch.testing.assert_close(maps[..., 2], source[..., 2] + source[..., 3])
    assert torch.equal(maps[..., 3], source[..., 4])


def test_equal_prompts_leave_maps_as_they_are_bit_for_bit():
    source = random_maps(2, 5)
    own = source[None].clone()
    for prompt in ("", "a cat", "a zebra, there", "cat " * 90):
        mapper, aligned = refinement_mapper(TOKENIZER, prompt, prompt)
        assert torch.equal(replace_words(source, replacement_mapper(TOKENIZER, prompt, prompt)[None]), own)
        assert torch.equal(refine_words(source, own, mapper[None], aligned[None]), own)
    assert torch.equal(reweight_words(own, torch.ones(1, 77)), own)


def test_a_refinement_takes_shared_columns_from_the_source_and_new_ones_from_the_target():
    source, own = random_maps(2, 5), random_maps(2, 2, 5)[1:]
    mapper, aligned = refinement_mapper(TOKENIZER, "a cat", "a red cat")
    maps = refine_words(source, own, mapper[None], aligned[None])[0]
    assert torch.equal(maps[..., [0, 1, 3]], source[..., [0, 1, 2]])
    assert torch.equal(maps[..., 2], own[0, ..., 2])


def test_factors_multiply_columns_and_rows_are_not_normalised():
    maps, factors = random_maps(1, 2, 5), torch.ones(1, 77)
    factors[0, 3] = 4
    changed = reweight_words(maps, factors)
    assert torch.equal(changed[..., 3], 4 * maps[..., 3]) and torch.equal(changed[..., :3], maps[..., :3])
    torch.testing.assert_close(changed.sum(-1), 1 + 3 * maps[..., 3])


def test_outside_of_its_window_a_token_keeps_its_own_map():
    edited, own = random_maps(1, 2, 5), torch.zeros(1, 2, 5, 77)
    active = torch.zeros(1, 77, dtype=torch.bool)
    active[0, 7] = True
    assert torch.equal(in_window(edited, own, active)[..., 7], edited[..., 7])
    assert not in_window(edited, own, active)[..., 8:].any()


def test_attention_to_words_is_summed_over_tokens_and_averaged_over_heads():
    maps, words = random_maps(2, 3, 5), torch.zeros(2, 77)
    words[0, [2, 3]] = 1
    expected = (maps[0, :, :, 2] + maps[0, :, :, 3]).mean(0)
    torch.testing.assert_close(word_attention(maps, words), torch.stack([expected, torch.zeros(5)]))


@given(st.integers(1, 300), st.integers(1, 300))
def test_sizes_of_maps_are_those_of_the_convolutions_that_halve(height, width):
    sizes = map_sizes(height, width)
    assert sizes[0] == (height, width) and sizes[-1] == (1, 1)
    for (h, w), half in zip(sizes, sizes[1:], strict=False):
        assert half == tuple((size + 2 - 3) // 2 + 1 for size in (h, w))  # kernel 3, padding 1, stride 2
    assert len({h * w for h, w in sizes}) == len(sizes)


def test_a_mask_is_widened_by_one_position_scaled_and_brought_to_one():
    attention = torch.zeros(1, 4, 6)
    attention[0, 1, 4] = 0.2
    narrow, wide = (soft_mask(attention, (8, 12), widen) for widen in (False, True))
    assert narrow.shape == wide.shape == (1, 1, 8, 12)
    assert narrow.sum() == 4 and narrow[0, 0, 2:4, 8:10].eq(1).all()
    assert wide.sum() == 36 and wide[0, 0, 0:6, 6:12].eq(1).all()


def test_where_nothing_is_attended_to_the_mask_is_empty():
    assert not above_in_either(soft_mask(torch.zeros(2, 4, 4), (8, 8), True), 0.0).any()


def test_the_mask_of_the_source_counts_for_every_prompt():
    soft = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.3]]).view(3, 1, 1, 3)
    expected = [[True, False, False], [True, True, False], [True, False, False]]
    assert above_in_either(soft, 0.3)[:, 0, 0].tolist() == expected


def test_outside_of_the_mask_latents_are_those_of_the_source_bit_for_bit():
    latents = torch.randn(3, 4, 5, 7) * torch.tensor([1e-8, 1.0, 1e8]).view(3, 1, 1, 1)
    mask = torch.rand(3, 1, 5, 7) > 0.5
    blended = keep_source_outside(latents, mask)
    everywhere = mask.expand_as(latents)
    assert torch.equal(blended[everywhere], latents[everywhere])
    assert torch.equal(blended[~everywhere], latents[:1].expand_as(latents)[~everywhere])
    assert torch.equal(blended[0], latents[0])

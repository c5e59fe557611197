"""Prompt-to-prompt in the editing benchmark: what is read off captions, and what a setting runs."""

from dataclasses import replace

import pytest
import torch
from editing_methods import METHODS, OURS, PEERS, SETTINGS
from editors import Batch, Editors
from word_methods import BLEND, SCALE, SHARES, WORD_PEERS, WORD_SETTINGS, WordEdit, last_word, parts, sort_of

from diffusers_ext.attention import AttentionRefine, AttentionReplace
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import resolve_model


STEPS, TOKENS = 3, 24
SCENES = EmojiScenes(objects=DEMO_OBJECTS)


@pytest.fixture(scope="module")
def editors() -> Editors:
    return Editors(resolve_model(), STEPS)


def batch(kind: str = "colour", rows: slice = slice(0, 2)) -> Batch:
    pairs = SCENES.edit_pairs(kind, 2, 3)
    return Batch(pairs.source[rows], pairs.source_prompts[rows], pairs.target_prompts[rows], [0, 1][rows])


def test_a_caption_has_a_thing_and_a_place():
    assert parts("a red star on a white dotted background") == ("a red star", "a white dotted background")
    assert parts("a red star") == ("a red star", "")
    assert last_word("a red star") == "star"


@pytest.mark.parametrize("kind, sort", [
    ("colour", "look"), ("object", "thing"), ("background", "place"), ("pattern", "place"),
])  # fmt: skip
def test_what_an_edit_changes_is_read_off_its_captions(kind, sort):
    given = SCENES.edit_pairs(kind, 20, 5)
    assert {sort_of(*pair) for pair in zip(given.source_prompts, given.target_prompts, strict=True)} == {sort}
    assert sort in SHARES


def test_edits_of_the_thing_are_blended_where_it_is_and_edits_of_the_place_elsewhere(editors):
    tokenizer = editors.words.tokenizer
    recoloured = BLEND.of(tokenizer, "a red star on a blue background", "a green star on a blue background")
    assert recoloured.threshold == BLEND.threshold and recoloured._subtracted is None
    assert recoloured._words.nonzero().tolist() == [[0, 3], [1, 3]]
    moved = BLEND.of(tokenizer, "a red star on a blue background", "a red star on a blue dotted background")
    assert moved.threshold == 0 and moved.subtract_threshold == BLEND.subtract_threshold
    assert moved._subtracted.nonzero().tolist() == [[0, 3], [1, 3]]
    assert moved._words.any(1).all()
    # Every place attends a little to every word, so a threshold of 0 leaves the whole picture.
    maps = torch.softmax(torch.randn(2, 4, 256, TOKENS, generator=torch.Generator().manual_seed(0)), dim=-1)
    moved.begin((16, 16), 1)
    moved._start = 0
    moved.read("down_blocks.0", 0, maps)
    moved(0, torch.zeros(2, 4, 16, 16))
    assert torch.equal(moved.mask[1], ~_thing(maps, moved))


def _thing(maps: torch.Tensor, blend) -> torch.Tensor:
    attention = maps.mean(1)[:, :, 3].view(2, 1, 16, 16)
    return (attention / attention.amax((2, 3), keepdim=True) > blend.subtract_threshold).any(0)


def test_prompts_of_as_many_words_are_swapped_and_others_refined(editors):
    edit = WordEdit("direct", SCALE, SHARES)
    swap = edit.controller(
        editors.words.tokenizer, "a red star on a blue background", "a red car on a blue background"
    )
    assert isinstance(swap, AttentionReplace) and swap.local_blend is None
    assert (swap.cross_replace_steps, swap.self_replace_steps[1]) == (SHARES["thing"].cross, SHARES["thing"].own)
    grown = "a red star on a blue striped background"
    assert isinstance(
        edit.controller(editors.words.tokenizer, "a red star on a blue background", grown), AttentionRefine
    )


@torch.no_grad()
def test_direct_inversion_is_the_shared_trajectory_of_ddim(editors):
    given = batch()
    ddim, direct = (editors.inverted(given, method) for method in ("ddim", "direct"))
    assert direct.latents is ddim.latents and direct.config["method"] == "direct"
    alone = editors.words.invert(given.images / 2 + 0.5, given.source, "direct", num_inference_steps=STEPS)
    torch.testing.assert_close(direct.latents, alone.latents, atol=1e-4, rtol=0)
    assert {**alone.config, "settings": None} == {**direct.config, "settings": None}
    assert (direct.null_embeddings, direct.noise_maps, direct.offsets) == (None, None, None)
    assert (alone.null_embeddings, alone.noise_maps, alone.offsets) == (None, None, None)


@pytest.mark.parametrize("setting", WORD_SETTINGS, ids=lambda setting: f"{setting.method}, {setting.knob}")
@torch.no_grad()
def test_every_setting_runs_and_leaves_the_network_as_it_was(editors, setting):
    before = dict(editors.guide.unet.attn_processors)
    kind = ("colour", "object", "background", "pattern")[WORD_SETTINGS.index(setting) % 4]
    if setting.edit.skip >= STEPS:
        setting = replace(setting, edit=replace(setting.edit, skip=1))
    images = setting.edit(editors, batch(kind, slice(0, 1)))
    assert images.shape == (1, 3, 64, 64) and images.abs().max() <= 1 + 1e-5
    assert editors.guide.unet.attn_processors == before


@torch.no_grad()
def test_an_edit_does_not_depend_on_what_else_is_in_the_batch(editors):
    main = next(setting.edit for setting in WORD_SETTINGS if setting.main)
    assert torch.allclose(main(editors, batch())[1], main(editors, batch(rows=slice(1, 2)))[0], atol=2e-3)


def test_peers_are_the_community_algorithms():
    assert set(WORD_PEERS) <= set(PEERS) and not set(WORD_PEERS) & set(OURS)
    assert {setting.method for setting in WORD_SETTINGS} <= set(METHODS)
    few = [setting for setting in SETTINGS if setting.pairs is not None]
    assert all(setting.name.endswith(f"first {setting.pairs} pairs") for setting in few)

import colorsys
import dataclasses

import pytest
import torch

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes, vendor_pairs
from diffusers_ext.data.emoji_scenes import is_held_out
from diffusers_ext.data.words import BACKGROUNDS, FAMILIES


@pytest.fixture(scope="module")
def scenes() -> EmojiScenes:
    return EmojiScenes(objects=DEMO_OBJECTS[:8])


def test_scenes_are_a_pure_function_of_the_seed(scenes):
    first, again, other = scenes.sample(6, seed=3), scenes.sample(6, seed=3), scenes.sample(6, seed=4)
    assert torch.equal(scenes.render(first)[0], scenes.render(again)[0])
    assert not torch.equal(scenes.render(first)[0], scenes.render(other)[0])


def test_a_scene_does_not_depend_on_its_batch(scenes):
    drawn = scenes.sample(5, seed=1)
    together, _ = scenes.render(drawn)
    alone, _ = scenes.render(drawn[2:3])
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_pictures_and_masks_stay_in_range(scenes):
    images, masks = scenes.render(scenes.sample(16, seed=0, split="all"))
    assert images.shape == (16, 3, 64, 64) and masks.shape == (16, 1, 64, 64)
    assert images.min() >= -1 and images.max() <= 1 and masks.min() >= 0 and masks.max() <= 1
    # a drawing covers between a twentieth and two thirds of the picture
    assert (masks.mean((1, 2, 3)) > 0.05).all() and (masks.mean((1, 2, 3)) < 0.67).all()


def test_the_plain_background_is_the_named_colour(scenes):
    """Up to the shade of 6 % and the faint gradient."""
    drawn = scenes.sample(200, seed=2, split="all")
    drawn = drawn[drawn.pattern == 0]
    images, masks = scenes.render(drawn)
    for i in range(len(drawn)):
        hue, saturation, value = BACKGROUNDS[scenes.background_names[drawn.background[i]]]
        expected = torch.tensor(colorsys.hsv_to_rgb(hue / 360.0, saturation, value))
        outside = images[i][:, masks[i, 0] == 0].add(1).div(2)
        assert (outside.mean(1) - expected).abs().max() < 0.2


def test_captions_speak_every_label(scenes):
    drawn = scenes.sample(64, seed=5)
    for i, caption in enumerate(scenes.captions(drawn)):
        assert scenes.object_names[drawn.object[i]] in caption
        assert scenes.background_names[drawn.background[i]] in caption.split(" on ")[1]
        spoken = [word for word in ("striped", "dotted", "checkered") if word in caption]
        assert spoken == ([scenes.pattern_names[drawn.pattern[i]]] if drawn.pattern[i] else [])
        if drawn.colour[i]:
            assert scenes.colour_names[drawn.colour[i]] in caption.split(" on ")[0]


def test_dropping_words_is_rare_and_reproducible(scenes):
    drawn = scenes.sample(2000, seed=6)
    dropped = scenes.captions(drawn, drop=True, seed=1)
    assert dropped == scenes.captions(drawn, drop=True, seed=1)
    share = sum("background" not in caption for caption in dropped) / len(dropped)
    assert 0.07 < share < 0.13  # .1 +- four standard errors


def test_held_out_triples_never_meet_the_training_split(scenes):
    def triples(split):
        drawn = scenes.sample(6000, seed=0, split=split)
        return set(zip(drawn.object.tolist(), drawn.colour.tolist(), drawn.background.tolist()))

    train, held_out = triples("train"), triples("held_out")
    assert train and held_out and not train & held_out
    for o, c, b in held_out:
        assert is_held_out(scenes.object_names[o], scenes.colour_names[c], scenes.background_names[b])


def test_no_object_stands_on_its_own_colour():
    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    drawn = scenes.sample(4000, seed=0, split="all")
    spoken = drawn.colour > 0
    colours = [scenes.colour_names[c] for c in drawn.colour[spoken]]
    assert all(c != scenes.background_names[b] for c, b in zip(colours, drawn.background[spoken]))


@pytest.mark.parametrize("kind", ["colour", "background", "pattern", "object"])
def test_an_edit_pair_differs_in_one_label_and_inside_its_mask(scenes, kind):
    pairs = scenes.edit_pairs(kind, 12, seed=1)
    outside = (pairs.source - pairs.target).abs().amax(1, keepdim=True)[pairs.mask == 0]
    assert outside.numel() and outside.max() < 1e-5
    for field in dataclasses.fields(pairs.source_scenes):
        before, after = getattr(pairs.source_scenes, field.name), getattr(pairs.target_scenes, field.name)
        assert bool((before != after).all()) if field.name == kind else torch.equal(before, after)
    assert all(a != b for a, b in zip(pairs.source_prompts, pairs.target_prompts))


@pytest.mark.parametrize("family", FAMILIES)
def test_vendor_pairs_share_their_scene(family):
    pairs = vendor_pairs(family, 6, seed=0)
    outside = (pairs.source - pairs.target).abs().amax(1, keepdim=True)[pairs.mask == 0]
    assert outside.max() < 1e-5 and all(a != b for a, b in zip(pairs.source_prompts, pairs.target_prompts))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(pairs.source, pairs.target))


def test_the_colour_that_a_drawing_has_by_itself_is_named():
    own = EmojiScenes(objects=["heart", "tree"])
    assert own.native_colours == ("red", "green")


def test_several_vendors_are_named_in_captions():
    scenes = EmojiScenes(["noto", "twemoji"], objects=["star"])
    drawn = scenes.sample(20, seed=0)
    captions = scenes.captions(drawn)
    assert all(f"in {scenes.vendor_names[v]} style" in text for v, text in zip(drawn.vendor, captions))
    pairs = scenes.edit_pairs("vendor", 4)
    swap = {"noto": "twemoji", "twemoji": "noto"}
    for before, after in zip(pairs.source_prompts, pairs.target_prompts):
        assert " ".join(swap.get(word, word) for word in before.split()) == after


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: EmojiScenes(resolution=63), "resolution=63 must be an even number"),
        (lambda s: EmojiScenes(objects=["unicorn"]), r"objects=\['unicorn'\] are not drawn by every vendor"),
        (lambda s: EmojiScenes("samsung"), "sheets='samsung' is not a shipped vendor; use one of fluent"),
        (lambda s: EmojiScenes([]), "name at least one"),
        (lambda s: s.sample(-1), "n=-1 must be a whole number"),
        (lambda s: s.sample(2, split="test"), "split='test' is unknown; use one of train"),
        (lambda s: s.edit_pairs("shape", 2), "kind='shape' is unknown; use one of colour"),
        (lambda s: s.edit_pairs("vendor", 2), "needs two values to swap, this set has 1"),
        (lambda s: vendor_pairs("moons", 2), "family='moons' is unknown; use one of hearts"),
        (lambda s: vendor_pairs("skin_tone", 2, "fluent"), "is not drawn by fluent"),
    ],
)
def test_wrong_calls_get_one_sentence(scenes, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(scenes)

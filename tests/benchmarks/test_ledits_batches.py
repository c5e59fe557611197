"""Our class for batches must be diffusers' own where that one can be run, and pictures of a batch must not meet."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion, StableDiffusionPipeline
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import LeditsAttentionStore
from ledits_batches import WordMaps, make_ledits

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import resolve_model


HEADS, POSITIONS, TOKENS = 2, 16, 6


@pytest.fixture(scope="module")
def parts():
    model = resolve_model()
    return StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).components


@pytest.fixture(scope="module")
def pairs():
    return EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", 2, 3)


def attention(samples: int, seed: int = 0) -> torch.Tensor:
    scores = torch.randn(samples * HEADS, POSITIONS, TOKENS, generator=torch.Generator().manual_seed(seed))
    return scores.softmax(-1)


def maps_of(store, attn: torch.Tensor, concepts: int, select: int) -> torch.Tensor:
    store(attn, True, "up", concepts, False)
    return store.aggregate_attention(store.step_store, ["a", "b"][:concepts], (4, 4), ["up", "down"], True, select)


def test_the_maps_of_one_picture_are_those_that_stock_reads():
    attn = attention(3)
    for select in range(2):
        stock = LeditsAttentionStore(average=False, batch_size=1, max_size=POSITIONS, max_resolution=None)
        own = WordMaps(1, torch.full((2, 1), TOKENS))
        assert torch.allclose(maps_of(own, attn, 2, select), maps_of(stock, attn, 2, select), atol=1e-7)


def test_the_maps_of_a_batch_are_those_of_each_picture_alone():
    attn = attention(2 * 3)  # no words, then two concepts, of two pictures
    apart = attn.unflatten(0, (3, 2, HEADS))
    both = maps_of(WordMaps(2, torch.full((2, 2), TOKENS)), attn, 2, 1)
    for picture in range(2):
        alone = maps_of(WordMaps(1, torch.full((2, 1), TOKENS)), apart[:, picture].flatten(0, 1), 2, 1)
        assert torch.equal(both[picture], alone[0])


def test_padding_behind_the_last_word_is_not_read():
    maps = maps_of(WordMaps(2, torch.tensor([[2, 4]])), attention(4), 1, 0)
    assert (maps[0, ..., 3:] == 0).all() and (maps[0, ..., 1:3] > 0).all()
    assert (maps[1, ..., 5:] == 0).all() and (maps[1, ..., 1:5] > 0).all()


def test_finer_maps_are_averaged_to_the_side_that_is_asked_for():
    own = WordMaps(1, torch.full((1, 1), TOKENS))
    attn = attention(2)
    own(attn, True, "up", 1, False)
    small = own.aggregate_attention(own.step_store, ["a"], (2, 2), ["up"], True, 0)
    picture = attn.unflatten(0, (2, HEADS))[1].mean(0).view(4, 4, TOKENS)
    assert torch.allclose(small[0, 0, 0], picture[:2, :2].mean((0, 1)), atol=1e-6)
    assert torch.allclose(small[0, 1, 0], picture[2:, :2].mean((0, 1)), atol=1e-6)


def edited(pipe, images: torch.Tensor, editing_prompt: list[str], seeds: list[int], **settings) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe.invert((images + 1) / 2, num_inversion_steps=3, generator=generators)
    return pipe(editing_prompt=editing_prompt, output_type="pt", **settings).images


def test_one_picture_without_attention_mask_is_edited_as_by_stock(parts, pairs):
    own = make_ledits(parts)
    scheduler = DPMSolverMultistepScheduler.from_config(
        parts["scheduler"].config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    names = ("vae", "text_encoder", "tokenizer", "unet")
    stock = LEditsPPPipelineStableDiffusion(
        **{name: parts[name] for name in names}, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    own.words = {"target": pairs.target_prompts[:1]}
    settings = {"edit_guidance_scale": 3.0, "edit_threshold": 0.5, "use_intersect_mask": False}
    expected = edited(stock, pairs.source[:1], pairs.target_prompts[:1], [7], **settings)
    assert torch.equal(edited(own, pairs.source[:1], ["target"], [7], **settings), expected)


def test_stock_has_no_mask_for_the_demo_model(parts, pairs):
    """Why the class exists; when diffusers changes this, the benchmark's page must."""
    scheduler = DPMSolverMultistepScheduler.from_config(
        parts["scheduler"].config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    names = ("vae", "text_encoder", "tokenizer", "unet")
    stock = LEditsPPPipelineStableDiffusion(
        **{name: parts[name] for name in names}, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    with pytest.raises((ValueError, RuntimeError), match="expected a non-empty list of Tensors"):
        edited(stock, pairs.source[:1], pairs.target_prompts[:1], [7])


def test_a_picture_is_edited_the_same_alone_and_beside_another(parts, pairs):
    own = make_ledits(parts)
    settings = {"edit_guidance_scale": 3.0, "edit_threshold": 0.5}
    own.words = {"target": pairs.target_prompts}
    both = edited(own, pairs.source, ["target"], [7, 8], **settings)
    for row in range(2):
        own.words = {"target": pairs.target_prompts[row : row + 1]}
        alone = edited(own, pairs.source[row : row + 1], ["target"], [7 + row], **settings)
        # a mask is a comparison with a quantile, so rounding may move a pixel of it
        assert (alone[0] - both[row]).abs().mean() < 2e-3

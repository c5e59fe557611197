"""Controllers of several pictures in one batch: each picture gets what it gets alone, and what cannot go together says so."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_ext.attention import (
    AttentionController,
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    ControllerGroup,
    LocalBlend,
)
from tests.helpers.tiny_models import MAX_LENGTH, TEXT_WIDTH, tiny_tokenizer, tiny_unet


TOKENIZER = tiny_tokenizer()
STEPS = 4
COMMON: dict[str, Any] = {"self_replace_steps": (0.25, 0.75), "max_self_attention_resolution": 1.0}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = tiny_unet().double()
    with torch.no_grad():  # sharper maps than those of new weights, or an edit would hardly show
        for name, parameter in made.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(4)
    return made


def mixed() -> list[AttentionController]:
    """Four pictures with three targets each, every kind of edit among them."""
    swap = ["a cat", "a dog", "a cow", "a hat"]
    grown = ["a cat", "a big cat", "cat", "a cat at sea"]
    same = ["a cat"] * 4
    blend = LocalBlend(TOKENIZER, grown, "cat", start=0.3, threshold=0.9)
    subtracted = LocalBlend(TOKENIZER, swap, ["cat", "dog", "cow", "hat"], subtract_words="a", threshold=0.8)
    return [
        AttentionReplace(TOKENIZER, swap, cross_replace_steps={"default_": 0.8, "dog": (0.0, 0.3)}, **COMMON),
        AttentionRefine(TOKENIZER, grown, cross_replace_steps=0.5, local_blend=blend, **COMMON),
        AttentionReweight(
            TOKENIZER, same, [{"cat": 3.0}, {"cat": -1.0}, {}], cross_replace_steps=(0.4, 1.0), **COMMON
        ),
        AttentionReweight(
            TOKENIZER, swap, {"dog": 2.0}, AttentionReplace(TOKENIZER, swap, local_blend=subtracted, **COMMON)
        ),
    ]


def rows_of(seed: int, pictures: int, each: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents and words of n pictures and their targets, `(each, n, ...)`, and embeddings without words."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, pictures, 4, 16, 16, generator=generator, dtype=torch.float64)
    text = 2 * torch.randn(2, each, pictures, MAX_LENGTH, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    return latents.repeat(each, 1, 1, 1, 1), text[0], text[1]


@torch.no_grad()
def sampled(
    controller: AttentionController | ControllerGroup,
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    without: torch.Tensor,
    apart: bool,
) -> torch.Tensor:
    """A few made-up steps with guidance, its two halves in one pass or in two."""
    with controller.attach(unet, latents.shape, STEPS):
        for step in range(STEPS):
            t = 900 - 200 * step
            if apart:
                towards = unet(latents, t, text).sample
                with controller.paused():
                    away = unet(latents, t, without).sample
            else:
                away, towards = unet(torch.cat([latents] * 2), t, torch.cat([without, text])).sample.chunk(2)
            latents = controller.after_step(step, latents - 0.4 * (away + 3.0 * (towards - away)))
    return latents


@pytest.mark.parametrize("apart", [False, True])
def test_each_picture_of_a_group_is_edited_as_alone(unet, apart):
    group = ControllerGroup(mixed())
    given = rows_of(1, pictures=4, each=4)
    together = sampled(group, unet, *(rows.flatten(0, 1) for rows in given), apart).unflatten(0, (4, 4))
    for picture, controller in enumerate(mixed()):
        alone = sampled(controller, unet, *(rows[:, picture] for rows in given), apart)
        torch.testing.assert_close(together[:, picture], alone, atol=1e-10, rtol=0)
        of_group = group.controllers[picture].local_blend
        if controller.local_blend is not None:
            assert torch.equal(of_group.mask, controller.local_blend.mask)
            assert 0 < of_group.mask.double().mean() < 1
    # An edit without its controller is another one, so that the agreement above says something.
    quiet = AttentionReplace(TOKENIZER, ["a cat"] * 4, cross_replace_steps=0.0, self_replace_steps=0.0)
    plain = sampled(quiet, unet, *(rows[:, 0] for rows in given), apart)
    assert (together[1:, 0] - plain[1:]).abs().max() > 1e-3


def test_a_group_of_one_is_its_controller_bit_for_bit(unet):
    given = [rows[:, 0] for rows in rows_of(2, pictures=1, each=4)]
    for of_group, alone in zip(mixed(), mixed(), strict=True):
        found = sampled(ControllerGroup([of_group]), unet, *given, False)
        assert torch.equal(found, sampled(alone, unet, *given, False))


@torch.no_grad()
def test_sources_and_the_unconditional_half_stay_as_they_are_bit_for_bit(unet):
    latents, text, without = (rows.flatten(0, 1) for rows in rows_of(3, pictures=4, each=4))
    given = (torch.cat([latents] * 2), 500, torch.cat([without, text]))
    plain = unet(*given).sample
    group = ControllerGroup(mixed())
    # Of the second step on, where every window is open.
    with group.attach(unet, latents.shape, STEPS):
        unet(*given)
        group.after_step(0, latents)
        edited = unet(*given).sample
    assert torch.equal(edited[: 16 + 4], plain[: 16 + 4])
    assert not torch.allclose(edited[16 + 4 :], plain[16 + 4 :], atol=1e-6)


def test_the_rows_are_the_sources_and_then_a_target_of_each():
    pairs = [["a cat", "a dog", "a cow"], ["a hat", "a cap", "a wig"]]
    group = ControllerGroup([AttentionReplace(TOKENIZER, pair) for pair in pairs])
    assert group.prompts == ["a cat", "a hat", "a dog", "a cap", "a cow", "a wig"]


def test_a_controller_serves_again_after_an_error_inside_a_group(unet):
    controllers = mixed()
    group = ControllerGroup(controllers)
    before = dict(unet.attn_processors)
    latents, text, _ = (rows.flatten(0, 1) for rows in rows_of(4, pictures=4, each=4))
    for rows in (3, 4, 15):
        with pytest.raises(ValueError, match=f"got a batch of {rows}; 4 controllers of 4 prompts each need 16, or 32"):
            with torch.no_grad(), group.attach(unet, latents.shape, STEPS):
                unet(latents[:rows], 500, text[:rows])
    with group.attach(unet, latents.shape, STEPS):
        with pytest.raises(ValueError, match="attached already"):
            with controllers[1].attach(unet, latents.shape, STEPS):
                raise AssertionError
        with pytest.raises(ValueError, match="attached already"):
            with ControllerGroup([controllers[2]]).attach(unet, latents.shape, STEPS):
                raise AssertionError
        with pytest.raises(ValueError, match=r"latents has the shape \(4, 4, 16, 16\); it must be \(16, "):
            group.after_step(0, latents[:4])
    assert unet.attn_processors == before
    for call in (lambda: group.after_step(0, latents), lambda: controllers[0].after_step(0, latents[::4])):
        with pytest.raises(ValueError, match="not attached"):
            call()
    with controllers[0].attach(unet, latents.shape, STEPS):
        pass


SWAP, GROWN = ["a cat", "a dog"], ["a cat", "a big cat"]


def replace(prompts: list[str] = SWAP, **options: Any) -> AttentionReplace:
    return AttentionReplace(TOKENIZER, prompts, **options)


def shared_blend() -> list[AttentionController]:
    blend = LocalBlend(TOKENIZER, SWAP, ["cat", "dog"])
    return [replace(local_blend=blend), replace(local_blend=blend)]


@pytest.mark.parametrize("make, answer", [
    (lambda: replace(), "controllers=.* is not a list of controllers"),
    (lambda: None, "controllers=None is not a list"),
    (lambda: [], "controllers=.* holds no controller; give one for each picture"),
    (lambda: [replace(), "refine"], "controllers.1.='refine' is not a controller of attention"),
    (lambda: [replace(), ControllerGroup([replace()])], "controllers.1.=.* is not a controller of attention"),
    (lambda: [replace()] * 2, "controllers.1. is controllers.0. again; make one for each picture"),
    (shared_blend, "controllers.1. has the local_blend of controllers.0."),
    (lambda: [replace(), replace(["a cat", "a dog", "a cow"])], "controllers.1. has 3 prompts, controllers.0. has 2"),
    (lambda: [replace(), replace(self_replace_steps=0.1)], r"controllers.1. has self_replace_steps=\(0.0, 0.1\), "),
    (
        lambda: [replace(), replace(max_self_attention_resolution=1)],
        "controllers.1. has max_self_attention_resolution=1.0, controllers.0. has 0.5",
    ),
])  # fmt: skip
def test_what_makes_no_group_is_answered_in_one_sentence(make, answer):
    with pytest.raises((TypeError, ValueError), match=answer) as caught:
        ControllerGroup(make())
    assert "\n" not in str(caught.value)

"""Several pictures edited with a controller each in one call."""

from typing import Any

import pytest
import torch

from diffusers_ext import (
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    LocalBlend,
    NullTextInversionPipeline,
)
from diffusers_ext.attention import AttentionController
from diffusers_ext.inversion import INVERSIONS
from tests.pipelines.test_null_text_inversion import QUICK, STEPS, build, picture


SOURCES = ["a red cat", "a tan hat", "a cat"]
EDITS = ["a red dog", "a big tan hat", "a cat"]


def controllers(pipe: NullTextInversionPipeline) -> list[AttentionController]:
    """A swap with a local blend, a refinement and a reweighting."""
    pairs = [list(pair) for pair in zip(SOURCES, EDITS, strict=True)]
    blend = LocalBlend(pipe.tokenizer, pairs[0], ["cat", "dog"], threshold=0.97)
    return [
        AttentionReplace(pipe.tokenizer, pairs[0], local_blend=blend),
        AttentionRefine(pipe.tokenizer, pairs[1], cross_replace_steps=0.4),
        AttentionReweight(pipe.tokenizer, pairs[2], {"cat": 3.0}, cross_replace_steps=(0.3, 1.0)),
    ]


@pytest.fixture(scope="module")
def pipe() -> NullTextInversionPipeline:
    """In float64, where a picture in a batch and alone differ in nothing else than what went wrong."""
    made = build().to(dtype=torch.float64)
    with torch.no_grad():  # sharper maps than those of new weights, or an edit would hardly show
        for name, parameter in made.unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(4)
    return made


def inverted(pipe: NullTextInversionPipeline, method: str, rows: slice) -> Any:
    seeds = range(len(SOURCES))[rows]
    noise = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    return pipe.invert(
        torch.cat([picture(seed) for seed in seeds]), SOURCES[rows], method, num_inference_steps=STEPS,
        settings=QUICK.get(method), **(noise if method == "edit_friendly" else {}),
    )  # fmt: skip


# Calls compute steps in float32, so pictures that go round in float64 networks agree to its rounding, not to 1e-10.
@pytest.mark.parametrize("method", INVERSIONS)
def test_pictures_with_a_controller_each_are_edited_as_each_alone(pipe, method):
    call = {"return_source": True, "output_type": "latent"}
    together = pipe(EDITS, inversion=inverted(pipe, method, slice(None)), controller=controllers(pipe), **call)
    passes = 0
    for number, controller in enumerate(controllers(pipe)):
        rows = slice(number, number + 1)
        alone = pipe(EDITS[rows], inversion=inverted(pipe, method, rows), controller=controller, **call)
        passes += alone.network_evaluations
        torch.testing.assert_close(together.images[number::3], alone.images, atol=2e-4, rtol=0)
    assert together.network_evaluations == passes


def test_a_list_of_one_is_its_controller_bit_for_bit(pipe):
    inversion = inverted(pipe, "direct", slice(1))
    call = {"inversion": inversion, "output_type": "latent"}
    listed = pipe(EDITS[0], controller=controllers(pipe)[:1], **call).images
    assert torch.equal(listed, pipe(EDITS[0], controller=controllers(pipe)[0], **call).images)


def test_pictures_and_their_inversion_give_the_same(pipe):
    images = torch.cat([picture(seed) for seed in range(3)])
    found = pipe(
        EDITS, image=images, source_prompt=SOURCES, num_inference_steps=STEPS, controller=controllers(pipe),
        output_type="latent",
    ).images  # fmt: skip
    made = inverted(pipe, "direct", slice(None))
    assert torch.equal(found, pipe(EDITS, inversion=made, controller=controllers(pipe), output_type="latent").images)


def test_local_blends_leave_the_outside_bit_identical(pipe):
    of_each = controllers(pipe)
    edits = pipe(
        EDITS, inversion=inverted(pipe, "direct", slice(None)), controller=of_each, return_source=True,
        output_type="latent",
    ).images  # fmt: skip
    outside = ~of_each[0].local_blend.mask[1].expand_as(edits[3])
    assert outside.any() and torch.equal(edits[3][outside], edits[0][outside])


def test_a_callback_may_use_the_network_while_a_group_waits(pipe):
    inversion = inverted(pipe, "direct", slice(None))
    rows = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        rows.append(len(tensors["latents"]))
        with torch.no_grad():
            pipe.unet(tensors["latents"][:1].double(), timestep, torch.zeros(1, 16, 8, dtype=torch.float64))
        return {}

    call = {"inversion": inversion, "output_type": "latent"}
    plain = pipe(EDITS, controller=controllers(pipe), **call).images
    assert torch.equal(pipe(EDITS, controller=controllers(pipe), callback_on_step_end=callback, **call).images, plain)
    assert rows == [3] * STEPS


def wrong(pipe: NullTextInversionPipeline) -> dict[str, tuple[Any, str]]:
    first, second, third = controllers(pipe)
    other = AttentionRefine(pipe.tokenizer, ["a tan hat", "a new tan hat"])
    still = AttentionRefine(pipe.tokenizer, ["a tan hat", "a big tan hat"], self_replace_steps=0.1)
    return {
        "one for all": (first, "controller belongs to one picture, the call has 3; give a list with one for each"),
        "none": ([], "controller=.. holds no controller; give one for each picture"),
        "too few": ([first, second], "controller holds 2 controllers for 3 pictures; give one for each"),
        "another order": ([second, first, third], r"controller\[0\] was made for the prompts .*'a big tan hat'.*has "),
        "another prompt": (
            [first, other, third],
            r"controller\[1\] was made for the prompts .*, the call has .*, the",
        ),
        "no controller": ([first, None, third], r"controller\[1\]=None is not a controller of attention"),
        "twice": ([first, second, first], r"controller\[2\] is controller\[0\] again"),
        "windows": (
            [first, still, third],
            r"controller\[1\] has self_replace_steps=\(0.0, 0.1\), controller\[0\] has",
        ),
    }


@pytest.mark.reliability
def test_wrong_controllers_are_answered_in_one_sentence_and_leave_the_pipeline_usable(pipe):
    inversion = inverted(pipe, "direct", slice(None))
    processors = dict(pipe.unet.attn_processors)
    for name, (given, answer) in wrong(pipe).items():
        with pytest.raises((ValueError, TypeError), match=answer) as caught:
            pipe(EDITS, inversion=inversion, controller=given)
        assert "\n" not in str(caught.value), name
    assert pipe.unet.attn_processors == processors
    assert torch.isfinite(
        pipe(EDITS, inversion=inversion, controller=controllers(pipe), output_type="pt").images
    ).all()

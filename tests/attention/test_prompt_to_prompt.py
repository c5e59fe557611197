"""The controllers in a UNet: what they edit, what they leave alone, and what they refuse."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from diffusers_ext.attention import (
    AttentionController,
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    LocalBlend,
    controller_for,
    word_schedule,
)
from tests.helpers.tiny_models import (
    MAX_LENGTH,
    TEXT_WIDTH,
    tiny_stable_diffusion,
    tiny_stable_diffusion_xl,
    tiny_tokenizer,
    tiny_unet,
)


TOKENIZER = tiny_tokenizer()
SWAP, GROWN, SAME = ["a cat", "a dog"], ["a cat", "a big cat"], ["a cat", "a cat"]


def seeded_unet(**overrides: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = tiny_unet(**overrides)
    with torch.no_grad():  # sharper maps than those of new weights, or an edit would hardly show
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(4)
    return unet


UNET = seeded_unet()


def inputs(rows: int, height: int = 16, width: int = 16) -> tuple[torch.Tensor, int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = 2 * torch.randn(rows, MAX_LENGTH, TEXT_WIDTH, generator=generator)
    return torch.randn(rows, 4, height, width, generator=generator), 500, text


def identical_inputs(rows: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    latents, timestep, text = inputs(1)
    return latents.repeat(rows, 1, 1, 1), timestep, text.repeat(rows, 1, 1)


@torch.no_grad()
def run(controller: AttentionController, given: Any, unet: nn.Module = UNET, steps: int = 4) -> torch.Tensor:
    with controller.attach(unet, given[0].shape, steps):
        return unet(*given, return_dict=False)[0]


@torch.no_grad()
def plain(given: Any, unet: nn.Module = UNET) -> torch.Tensor:
    return unet(*given, return_dict=False)[0]


def doubled(given: Any) -> tuple[torch.Tensor, int, torch.Tensor]:
    return given[0].double(), given[1], given[2].double()


CONTROLLERS = {
    "replace": lambda prompts, **options: AttentionReplace(TOKENIZER, prompts, **options),
    "refine": lambda prompts, **options: AttentionRefine(TOKENIZER, prompts, **options),
    "reweight": lambda prompts, **options: AttentionReweight(
        TOKENIZER, prompts, {"a": 1.0}, controller=AttentionRefine(TOKENIZER, prompts, **options)
    ),
}


class InPlace:
    """The arithmetic of the paper as plainly as can be: probabilities are formed, and rows of them overwritten."""

    def __init__(self, controller: AttentionController, largest: int) -> None:
        self.controller, self.largest = controller, largest

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(f(x), out_dim=4)
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        maps = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, dim=-1)
        first = len(maps) - len(self.controller.prompts)
        if encoder_hidden_states is not None:
            edited = self.controller.edit_cross_attention(maps[first], maps[first + 1 :])
            maps = torch.cat([maps[: first + 1], edited])
        elif maps.shape[-1] <= self.largest:
            maps = torch.cat([maps[: first + 1], maps[first : first + 1].expand_as(maps[first + 1 :])])
        return attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("rows", [2, 4])
def test_equal_prompts_change_nothing_bit_for_bit(name, rows):
    controller = CONTROLLERS[name](
        SAME, cross_replace_steps=1.0, self_replace_steps=1.0, max_self_attention_resolution=1
    )
    given = identical_inputs(rows)
    assert torch.equal(run(controller, given), plain(given))


def test_closed_windows_change_nothing_bit_for_bit():
    controller = AttentionReplace(TOKENIZER, SWAP, cross_replace_steps=0, self_replace_steps=0)
    assert torch.equal(run(controller, inputs(4)), plain(inputs(4)))


def test_the_source_and_the_unconditional_half_stay_as_they_are_bit_for_bit():
    controller = AttentionReplace(TOKENIZER, ["a cat", "a dog", "a cow"], max_self_attention_resolution=1.0)
    edited, stock = run(controller, inputs(6)), plain(inputs(6))
    assert torch.equal(edited[:4], stock[:4])
    assert all((edited[row] - stock[row]).abs().max() > 1e-4 for row in (4, 5))


BEFORE = {"fused": AttnProcessor2_0, "plain": AttnProcessor, "sliced": lambda: SlicedAttnProcessor(1)}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_result_is_that_of_overwriting_the_maps(name, before):
    controller = CONTROLLERS[name](
        SWAP, cross_replace_steps=1.0, self_replace_steps=1.0, max_self_attention_resolution=0.5
    )
    unet = seeded_unet().double()
    unet.set_attn_processor(InPlace(controller, 64))
    expected = plain(doubled(inputs(4)), unet)
    unet.set_attn_processor(before())
    torch.testing.assert_close(run(controller, doubled(inputs(4)), unet), expected, atol=1e-10, rtol=0)


LAYERS = {
    "plain": {},
    "residual and rescaling": {"residual_connection": True, "rescale_output_factor": 1.7},
    "group norm": {"norm_num_groups": 4},
    "bias and upcast": {"bias": True, "upcast_softmax": True},
    "norm of the text": {"cross_attention_norm": "layer_norm"},
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("picture", [False, True], ids=["sequence", "picture"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_options_of_a_layer_and_masks_are_honoured(options, cross, picture, masked):
    torch.manual_seed(0)
    text_width = TEXT_WIDTH if cross else None
    layer = Attention(query_dim=32, cross_attention_dim=text_width, heads=2, dim_head=8, **options).double().eval()
    network = nn.ModuleList([layer, Attention(query_dim=8, cross_attention_dim=8, heads=1, dim_head=8)])
    controller = AttentionReplace(TOKENIZER, SWAP, self_replace_steps=1.0, max_self_attention_resolution=1.0)
    hidden = torch.randn(4, 32, 4, 6).double()
    hidden = hidden if picture else hidden.flatten(2).transpose(1, 2)
    text = 3 * torch.randn(4, MAX_LENGTH, TEXT_WIDTH).double() if cross else None
    mask = torch.zeros(4, 1, MAX_LENGTH if cross else 24).double()
    mask[1:, :, 3:7] = -1e4 * torch.arange(1, 4).view(3, 1, 1)
    given = {"encoder_hidden_states": text, "attention_mask": mask if masked else None}
    scores = layer.get_attention_scores

    def overwritten(*args):
        maps = scores(*args).unflatten(0, (4, -1))
        target = controller.edit_cross_attention(maps[2], maps[3:]) if cross else maps[2:3]
        return torch.cat([maps[:3], target]).flatten(0, 1)

    layer.set_processor(AttnProcessor())
    stock = layer(hidden, **given)
    layer.get_attention_scores = overwritten
    expected = layer(hidden, **given)
    del layer.get_attention_scores
    with controller.attach(network, (4, 6), 4):
        found = layer(hidden, **given)
    torch.testing.assert_close(found, expected, atol=1e-7 if "upcast_softmax" in options else 1e-12, rtol=0)
    assert torch.equal(found[:3], stock[:3]) and (found[3] - stock[3]).abs().max() > 1e-5


def test_lora_acts_and_is_edited():
    from peft import LoraConfig

    controller = AttentionReplace(TOKENIZER, SWAP, self_replace_steps=1.0, max_self_attention_resolution=1.0)
    unet, given = seeded_unet(), doubled(inputs(4))
    without = run(controller, given, unet.double())
    unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False, lora_alpha=8)
    )
    found = run(controller, given, unet.double())
    unet.set_attn_processor(InPlace(controller, 256))
    torch.testing.assert_close(found, plain(given, unet), atol=1e-10, rtol=0)
    assert (found - without).abs().max() > 1e-3


def test_an_ip_adapter_acts_beside_the_edit_and_gets_its_masks():
    torch.manual_seed(0)

    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(query_dim=8, cross_attention_dim=TEXT_WIDTH, heads=2, dim_head=4)

    network = OneLayer()
    adapter = IPAdapterAttnProcessor2_0(8, TEXT_WIDTH, num_tokens=[3], scale=0.7)
    controller = AttentionReplace(TOKENIZER, SWAP)
    hidden, text, picture = (
        torch.randn(4, 64, 8),
        torch.randn(4, MAX_LENGTH, TEXT_WIDTH),
        torch.randn(4, 1, 3, TEXT_WIDTH),
    )
    masks = [torch.rand(1, 1, 8, 8).round()]

    def change() -> torch.Tensor:
        before = network.attn(hidden, encoder_hidden_states=context, **extra)
        with controller.attach(network, (8, 8), 4):
            return network.attn(hidden, encoder_hidden_states=context, **extra) - before

    context, extra = text, {}
    edit = change()
    assert edit[3].abs().max() > 1e-4
    network.attn.set_processor(adapter)
    for extra, shown in (({}, picture.squeeze(1)), ({"ip_adapter_masks": masks}, picture)):
        context = (text, [shown])
        torch.testing.assert_close(change(), edit, atol=1e-6, rtol=1e-4)
    assert network.attn.processor is adapter and network.attn._modules["processor"] is adapter
    with controller.attach(network, (8, 8), 4):  # the adapter's weights are still part of the network
        assert {id(p) for p in adapter.parameters()} <= {id(p) for p in network.parameters()}


def test_gradient_checkpointing_gives_the_same_gradient_and_the_same_masks():
    def gradient(checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        unet = seeded_unet()
        unet.requires_grad_(False)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        blend = LocalBlend(TOKENIZER, SWAP, ["cat", "dog"], start=0.0)
        controller = AttentionReplace(TOKENIZER, SWAP, self_replace_steps=1.0, local_blend=blend)
        latents, timestep, text = inputs(4)
        text.requires_grad_(True)
        with controller.attach(unet, latents.shape, 4):
            for step in range(2):
                output = unet(latents, timestep, text, return_dict=False)[0]
                (found,) = torch.autograd.grad(output.square().sum(), text)
                controller.after_step(step, latents[:2])
        return found, blend.mask

    (checkpointed, mask), (expected, expected_mask) = gradient(True), gradient(False)
    assert torch.equal(checkpointed, expected) and torch.equal(mask, expected_mask)


def test_a_target_is_edited_the_same_alone_or_beside_others_with_or_without_the_unconditional_half():
    latents, timestep, text = inputs(6)
    both = run(AttentionReplace(TOKENIZER, ["a cat", "a dog", "a cow"]), (latents, timestep, text))
    without = run(AttentionReplace(TOKENIZER, ["a cat", "a dog", "a cow"]), (latents[3:], timestep, text[3:]))
    torch.testing.assert_close(without, both[3:], atol=1e-5, rtol=1e-4)
    alone = run(AttentionReplace(TOKENIZER, ["a cat", "a cow"]), (latents[[3, 5]], timestep, text[[3, 5]]))
    torch.testing.assert_close(alone, both[[3, 5]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (6, 20)])
def test_self_attention_is_replaced_up_to_a_share_of_the_latents_size(size):
    def edited(share: float) -> torch.Tensor:
        return run(
            AttentionReplace(
                TOKENIZER, SWAP, cross_replace_steps=0, self_replace_steps=1.0, max_self_attention_resolution=share
            ),
            inputs(2, *size),
        )

    stock = plain(inputs(2, *size))
    assert torch.equal(edited(0.49), stock)  # the UNet has maps of the latents' size and of half of it
    assert not torch.equal(edited(0.5), stock) and not torch.equal(edited(1.0), edited(0.5))
    assert torch.equal(edited(0.9), edited(0.5))


def test_windows_open_and_close_with_the_steps():
    given, stock = inputs(2), plain(inputs(2))
    controller = AttentionReplace(
        TOKENIZER, SWAP, cross_replace_steps=0, self_replace_steps=(0.25, 0.75), max_self_attention_resolution=1.0
    )
    changed = []
    with torch.no_grad(), controller.attach(UNET, given[0].shape, 4):
        for step in range(4):
            for _ in range(2):  # two passes in a step, as of Heun's method
                output = UNET(*given, return_dict=False)[0]
            changed.append(not torch.equal(output, stock))
            assert torch.equal(controller.after_step(step, given[0]), given[0])
    assert changed == [False, True, True, False]


def test_words_have_windows_of_their_own():
    schedule = word_schedule(TOKENIZER, SWAP, 4, {"default_": 0.4, "dog": 0.9})
    controller = AttentionReplace(TOKENIZER, SWAP, {"default_": 0.4, "dog": 0.9}, self_replace_steps=0)
    assert schedule.sum(0)[0].unique().tolist() == [2, 4]
    given, stock = inputs(2), plain(inputs(2))
    with torch.no_grad(), controller.attach(UNET, given[0].shape, 4):
        for step in range(4):
            assert not torch.equal(UNET(*given, return_dict=False)[0], stock)
            controller.after_step(step, given[0])


def test_a_pause_leaves_the_network_as_it_is():
    controller, given, stock = AttentionReplace(TOKENIZER, SWAP), inputs(2), plain(inputs(2))
    with torch.no_grad(), controller.attach(UNET, given[0].shape, 4):
        with controller.paused():
            assert torch.equal(UNET(*given, return_dict=False)[0], stock)
            UNET(*inputs(3))
        assert not torch.equal(UNET(*given, return_dict=False)[0], stock)


def test_processors_are_put_back_also_after_an_error_and_a_run_begins_anew():
    unet, controller = seeded_unet(), AttentionReplace(TOKENIZER, SWAP)
    before = dict(unet.attn_processors)
    first = run(controller, inputs(2), unet)
    with pytest.raises(KeyError), controller.attach(unet, (16, 16), 4):
        controller.after_step(3, torch.zeros(2, 4, 16, 16))
        raise KeyError
    assert dict(unet.attn_processors) == before
    assert torch.equal(run(controller, inputs(2), unet), first)


def test_reweighting_multiplies_after_the_edit_before_it():
    refine = AttentionRefine(TOKENIZER, GROWN, cross_replace_steps=0.4, self_replace_steps=0.1)
    twice = AttentionReweight(TOKENIZER, GROWN, {"big": 3.0}, controller=refine)
    chained = AttentionReweight(TOKENIZER, GROWN, {"cat": 2.0}, controller=twice, self_replace_steps=0.7)
    source, own = torch.rand(2, 5, MAX_LENGTH), torch.rand(1, 2, 5, MAX_LENGTH)
    maps = refine.edit_cross_attention(source, own)
    maps[..., 2:5] *= 3  # "big", a token a letter
    maps[..., 5:8] *= 2
    torch.testing.assert_close(chained.edit_cross_attention(source, own), maps)
    assert chained.cross_replace_steps == 0.4 and chained.self_replace_steps == (0.0, 0.7)
    assert twice.self_replace_steps == (0.0, 0.1)


def test_reweighting_alone_takes_the_map_of_the_source():
    controller = AttentionReweight(TOKENIZER, [*SAME, "a cat"], [{"cat": -2.0}, {}])
    source, own = torch.rand(2, 5, MAX_LENGTH), torch.rand(2, 2, 5, MAX_LENGTH)
    maps = controller.edit_cross_attention(source, own)
    torch.testing.assert_close(maps[0, ..., 2:5], -2 * source[..., 2:5])
    assert torch.equal(maps[1], source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_keep_their_type_and_the_source_as_it_is(dtype):
    unet = seeded_unet().to(dtype)
    latents, timestep, text = inputs(4)
    given = (latents.to(dtype), timestep, text.to(dtype))
    edited, stock = run(AttentionReplace(TOKENIZER, SWAP), given, unet), plain(given, unet)
    assert edited.dtype == dtype and torch.equal(edited[:3], stock[:3]) and not torch.equal(edited[3], stock[3])


def test_the_layers_of_stable_diffusion_2_are_edited():
    unet = seeded_unet(use_linear_projection=True, upcast_attention=True, attention_head_dim=(1, 2))
    edited, stock = run(AttentionReplace(TOKENIZER, SWAP), inputs(4), unet), plain(inputs(4), unet)
    assert torch.equal(edited[:3], stock[:3]) and not torch.equal(edited[3], stock[3])


PIPELINES = {"1.x": tiny_stable_diffusion, "xl": tiny_stable_diffusion_xl}


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_a_stock_pipeline_edits_with_the_callback(build):
    pipe = build()
    blend = LocalBlend(pipe.tokenizer, GROWN, ["cat", "big cat"], start=0.5)
    refine = AttentionRefine(pipe.tokenizer, GROWN, local_blend=blend)
    latents = inputs(1)[0].repeat(2, 1, 1, 1)
    options = {"latents": latents, "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    stock = pipe(GROWN, **options).images
    with refine.attach(pipe.unet, latents.shape, 2):
        edited = pipe(GROWN, callback_on_step_end=refine.callback_on_step_end, **options).images
    assert torch.equal(edited[0], stock[0]) and not torch.equal(edited[1], stock[1])
    assert blend.mask is not None and blend.mask.shape == (2, 1, 16, 16)
    outside = ~blend.mask[1].expand(4, -1, -1)
    assert torch.equal(edited[1][outside], edited[0][outside])


WRONG: dict[str, tuple[Any, str]] = {
    "one prompt": (lambda: AttentionReplace(TOKENIZER, ["a cat"]), "holds 1 prompts; give"),
    "a str": (lambda: AttentionReplace(TOKENIZER, "a cat"), "prompts='a cat' is not a list"),
    "no text": (lambda: AttentionReplace(TOKENIZER, ["a", None]), "is not a list of str"),
    "lengths": (lambda: AttentionReplace(TOKENIZER, GROWN), "2 and 3 words.*AttentionRefine"),
    "alignment": (lambda: AttentionReplace(TOKENIZER, SWAP, alignment="x"), "alignment='x' is not one of"),
    "share": (lambda: AttentionReplace(TOKENIZER, SWAP, 1.2), "cross_replace_steps=1.2"),
    "window": (lambda: AttentionRefine(TOKENIZER, SWAP, self_replace_steps=(0.5, 0.1)), "self_replace_steps=.*ends"),
    "word": (lambda: AttentionReplace(TOKENIZER, SWAP, {"cow": 1.0}), "'cow'.*'a', 'dog'"),
    "size": (lambda: AttentionReplace(TOKENIZER, SWAP, max_self_attention_resolution=32), "resolution=32"),
    "differ": (lambda: AttentionReweight(TOKENIZER, SWAP, {"dog": 2.0}), "differ; give controller="),
    "other prompts": (
        lambda: AttentionReweight(TOKENIZER, SAME, {"cat": 2.0}, AttentionRefine(TOKENIZER, SWAP)),
        "controller was made for the prompts",
    ),
    "blend": (
        lambda: AttentionRefine(TOKENIZER, SAME, local_blend=LocalBlend(TOKENIZER, SWAP, ["cat", "dog"])),
        "local_blend was made for the prompts",
    ),
    "not attached": (lambda: AttentionRefine(TOKENIZER, SAME).after_step(0, torch.zeros(1)), "is not attached"),
    "batch": (lambda: run(AttentionReplace(TOKENIZER, SWAP), inputs(3)), "batch of 3.*need 2, or 4"),
    "steps": (lambda: run(AttentionReplace(TOKENIZER, SWAP), inputs(2), steps=0), "num_inference_steps=0"),
    "shape": (lambda: AttentionReplace(TOKENIZER, SWAP).attach(UNET, 16, 4).__enter__(), "latents_shape=16"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_told_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert isinstance(next(iter(UNET.attn_processors.values())), AttnProcessor2_0)


def test_objects_of_another_kind_are_type_errors():
    for call, message in (
        (lambda: AttentionReplace(None, SWAP), "tokenizer=None"),
        (lambda: AttentionReplace(TOKENIZER, SWAP, local_blend="cat"), "local_blend='cat'"),
        (lambda: AttentionReweight(TOKENIZER, SAME, {"cat": 2.0}, controller="x"), "controller='x'"),
        (lambda: AttentionReplace(TOKENIZER, SWAP).attach("unet", (16, 16), 4).__enter__(), "unet='unet'"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_latents_of_another_size_than_said_are_noticed():
    controller = AttentionReplace(TOKENIZER, SWAP)
    with controller.attach(UNET, (12, 16), 4), pytest.raises(ValueError, match="256 positions.*12x16"):
        UNET(*inputs(2))
    with controller.attach(UNET, (16, 16), 4):
        with pytest.raises(ValueError, match=r"latents has the shape \(3, 4, 16, 16\).*\(2, channels, 16, 16\)"):
            controller.after_step(0, torch.zeros(3, 4, 16, 16))
        with pytest.raises(ValueError, match="step=4 is not one of the 4 steps"):
            controller.after_step(4, torch.zeros(2, 4, 16, 16))


def test_text_of_another_length_than_the_tokenizers_is_noticed():
    latents, timestep, text = inputs(2)
    with pytest.raises(ValueError, match="attends to 32 text tokens.*has 16"):
        run(AttentionReplace(TOKENIZER, SWAP), (latents, timestep, torch.cat([text, text], 1)))


def test_unknown_processors_networks_without_text_and_two_controllers_at_once_are_refused():
    class Own:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    one, other = AttentionReplace(TOKENIZER, SWAP), AttentionReplace(TOKENIZER, SWAP)
    unet = seeded_unet()
    unet.set_attn_processor(Own())
    with pytest.raises(ValueError, match="processor Own.*set_default_attn_processor"), one.attach(unet, (16, 16), 4):
        pass
    with pytest.raises(ValueError, match="no cross-attention"), one.attach(nn.Linear(1, 1), (16, 16), 4):
        pass
    with one.attach(UNET, (16, 16), 4):
        with pytest.raises(ValueError, match="attached already"), other.attach(UNET, (16, 16), 4):
            pass
        with pytest.raises(ValueError, match="attached already"), one.attach(UNET, (16, 16), 4):
            pass
    assert isinstance(next(iter(UNET.attn_processors.values())), AttnProcessor2_0)


def test_the_controller_that_fits_swaps_words_where_their_number_is_equal() -> None:
    swaps = controller_for(TOKENIZER, ["a red star", "a blue star"], self_replace_steps=0.25)
    adds = controller_for(TOKENIZER, ["a red star", "a striped red star"])
    assert type(swaps) is AttentionReplace and type(adds) is AttentionRefine
    assert swaps.self_replace_steps == (0.0, 0.25)

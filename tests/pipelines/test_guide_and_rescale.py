"""Guide-and-Rescale as a whole: the authors' results, the limit cases, and what a call leaves behind."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from peft import LoraConfig

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, InversionOutput, SelfAttentionEnergy
from diffusers_ext.guidance import GuidanceEnergy
from tests.helpers.tiny_models import tiny_components


STEPS = 10
NEW = "a photo of a white hat in the tree"


@pytest.fixture(scope="module")
def file(golden) -> Any:
    return golden("editing/guide_and_rescale_nonstyle.npz")


@pytest.fixture(scope="module")
def prompts(file) -> tuple[str, str]:
    return str(file["source_prompt"]), str(file["target_prompt"])


def load(path: Any, **kwargs: Any) -> GuideAndRescalePipeline:
    pipe = GuideAndRescalePipeline.from_pretrained(path, dtype=torch.float32, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_sd_path) -> GuideAndRescalePipeline:
    return load(tiny_sd_path)


@pytest.fixture(scope="module")
def inversion(pipe, file, prompts) -> InversionOutput:
    return pipe.invert(file["image"], prompts[0], STEPS)


@pytest.fixture(scope="module")
def edit(pipe, inversion, prompts):
    """`edit(**changes)`: the latents of the default edit, with changes."""

    def call(**changes: Any) -> torch.Tensor:
        arguments = {
            "inversion": inversion,
            "prompt": prompts[1],
            "num_inference_steps": STEPS,
            "output_type": "latent",
        }
        return pipe(**{**arguments, **changes}).images

    return call


@pytest.fixture(scope="module")
def edited(edit) -> torch.Tensor:
    return edit()


@pytest.mark.parametrize("name, scales", [("nonstyle", (3e5, 500)), ("nonstyle_weak", (3e3, 50))])
def test_a_whole_edit_is_that_of_the_authors(tiny_sd_path, golden, file, prompts, name, scales):
    pipe = load(tiny_sd_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    attention, features = scales
    output = pipe(
        file["image"],
        *prompts,
        guiders=[SelfAttentionEnergy(attention), FeatureEnergy(features)],
        num_inference_steps=STEPS,
        alignment="official",
        output_type="latent",
    )
    expected = golden(f"editing/guide_and_rescale_{name}.npz").tensor("latent_out")[-1]
    assert (output.images - expected).abs().max() <= 2e-3


def test_matched_alignment_reconstructs_better(pipe, file, prompts):
    error = {}
    for alignment in ("matched", "official"):
        inversion = pipe.invert(file["image"], prompts[0], STEPS, alignment)
        again = pipe(
            inversion=inversion, prompt=prompts[0], guiders=[], guidance_scale=1.0, num_inference_steps=STEPS,
            alignment=alignment, output_type="latent",
        ).images  # fmt: skip
        error[alignment] = (again - inversion.latents[0]).square().mean().sqrt().item()
    assert error["matched"] <= 0.150
    assert error["official"] == pytest.approx(0.255, abs=1e-3)


def test_guidance_off_is_stock_bit_for_bit(tiny_sd_path, edit, inversion, prompts):
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd_path, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    for scale in (7.5, 1.0):
        expected = stock(
            prompts[1], latents=inversion.latents[-1], num_inference_steps=STEPS, guidance_scale=scale, output_type="latent"
        ).images  # fmt: skip
        assert torch.equal(edit(guiders=[], guidance_scale=scale), expected)
        assert torch.equal(edit(guidance_end=0, guidance_scale=scale), expected)


def test_guidance_keeps_the_source(edit, edited, inversion):
    start = inversion.latents[0]
    assert (edited - start).norm() < 0.8 * (edit(guiders=[]) - start).norm()


def test_a_millionth_on_the_start_changes_next_to_nothing(edit, edited, inversion):
    start = inversion.latents[-1]
    for seed in range(2):
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        moved = edit(latents=start + 1e-6 * noise)
        assert (moved - edited).abs().max() < 1e-3


def test_checkpointing_changes_nothing(pipe, edit, edited):
    pipe.unet.enable_gradient_checkpointing()
    try:
        assert torch.equal(edit(), edited)
    finally:
        pipe.unet.disable_gradient_checkpointing()


def test_several_prompts_for_one_picture_share_its_inversion(pipe, edit, edited, file, prompts):
    several = pipe(file["image"], prompts[0], [prompts[1], NEW], num_inference_steps=STEPS, output_type="latent")
    torch.testing.assert_close(several.images[:1], edited, atol=5e-3, rtol=0)
    torch.testing.assert_close(several.images[1:], edit(prompt=NEW), atol=5e-3, rtol=0)
    # 10 of the inversion, then for each: 20 of sampling, and two more in steps 1 to 5.
    assert several.network_evaluations == 10 + 2 * 30 and several.backward_passes == 2 * 5


def test_a_batch_of_pictures_is_edited_as_each_alone(pipe, file, prompts):
    images = np.stack([file["image"], file["image"][::-1]])
    sources, targets = [prompts[0], prompts[1]], [prompts[1], NEW]
    together = pipe(images, sources, targets, num_inference_steps=4, output_type="latent").images
    for i in range(2):
        alone = pipe(images[i], sources[i], targets[i], num_inference_steps=4, output_type="latent").images
        torch.testing.assert_close(together[i : i + 1], alone, atol=5e-3, rtol=0)


def test_fifty_steps_cost_what_the_docs_say(tiny_sd_path, prompts):
    pipe = load(tiny_sd_path)
    output = pipe(np.zeros((16, 16, 3)), *prompts, output_type="latent")
    assert output.network_evaluations == 50 + 158 and output.backward_passes == 29


def test_v_prediction_edits_the_same(tiny_sd_path, file, prompts):
    pipe = load(tiny_sd_path)
    call = {"num_inference_steps": STEPS, "output_type": "latent", "alignment": "official"}
    expected = pipe(file["image"], *prompts, **call).images
    levels, forward = pipe.scheduler.alphas_cumprod, pipe.unet.forward

    def as_v(sample, timestep, *args, **kwargs):
        level = levels[int(timestep)]
        return ((forward(sample, timestep, *args, **kwargs)[0] - (1 - level) ** 0.5 * sample) / level**0.5,)

    pipe.unet.forward = as_v
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    torch.testing.assert_close(pipe(file["image"], *prompts, **call).images, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_pictures(tiny_sd_path, file, prompts, dtype):
    pipe = GuideAndRescalePipeline.from_pretrained(tiny_sd_path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(file["image"][:64, :64], *prompts, num_inference_steps=3, output_type="pt").images
    assert images.dtype == dtype and torch.isfinite(images).all()


def test_another_scheduler_lends_its_config_and_is_not_changed(tiny_sd_path, edited, inversion, prompts):
    pipe = load(tiny_sd_path)
    config = {**pipe.scheduler.config}
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    before = pipe.scheduler.timesteps.clone()
    call = {"inversion": inversion, "prompt": prompts[1], "num_inference_steps": STEPS, "output_type": "latent"}
    assert torch.equal(pipe(**call).images, edited)
    assert type(pipe.scheduler) is EulerDiscreteScheduler and torch.equal(pipe.scheduler.timesteps, before)


def test_a_saved_inversion_gives_the_same_edit(edit, edited, inversion, tmp_path):
    inversion.save_pretrained(tmp_path)
    assert torch.equal(edit(inversion=InversionOutput.from_pretrained(tmp_path)), edited)


def test_an_inversion_of_another_model_is_refused(inversion, prompts):
    other = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    with pytest.raises(ValueError, match="made with another model: its vae differs"):
        other(inversion=inversion, prompt=prompts[1], num_inference_steps=STEPS)


def test_the_picture_and_its_inversion_give_the_same(pipe, edited, file, prompts):
    output = pipe(file["image"], *prompts, num_inference_steps=STEPS, output_type="latent")
    assert torch.equal(output.images, edited)


def test_a_tuple_has_the_fields_of_the_output(pipe, inversion, prompts):
    call = {"inversion": inversion, "prompt": prompts[1], "num_inference_steps": STEPS, "output_type": "np"}
    output = pipe(**call)
    images, flags, forwards, backwards = pipe(**call, return_dict=False)
    assert np.array_equal(images, output.images) and images.shape == (1, 128, 128, 3)
    assert (flags, forwards, backwards) == (None, output.network_evaluations, output.backward_passes)


def test_it_works_in_no_grad_and_says_why_not_in_inference_mode(edit, edited):
    with torch.no_grad():
        assert torch.equal(edit(), edited)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="torch.inference_mode.. forbids"):
            edit()
        plain = edit(guiders=[])
    assert torch.equal(plain.clone(), edit(guiders=[]))


def test_an_inversion_made_in_inference_mode_can_be_used_outside(pipe, edit, edited, file, prompts):
    with torch.inference_mode():
        inversion = pipe.invert(file["image"], prompts[0], STEPS)
    assert torch.equal(edit(inversion=inversion), edited)


def test_a_callback_sees_the_network_as_it_was_and_may_change_the_latents(pipe, edit):
    before = dict(pipe.unet.attn_processors)
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
        seen.append((step, int(timestep), sorted(tensors)))
        if step == STEPS - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "source_prompt_embeds"]
    result = edit(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert not result.any()
    assert seen == [(i, 901 - 100 * i, sorted(names)) for i in range(STEPS)]


def test_a_callback_may_edit_with_the_same_pipeline(edit, edited):
    inner = []

    def callback(pipe, step, timestep, tensors):
        if step == 2:
            inner.append(edit())
        return tensors

    assert torch.equal(edit(callback_on_step_end=callback), edited)
    assert torch.equal(inner[0], edited)


def test_a_callback_may_return_nothing_and_may_stop(pipe, edit, edited):
    assert torch.equal(edit(callback_on_step_end=lambda *_: None), edited)
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 3
        return tensors

    edit(callback_on_step_end=stop)
    assert steps == [0, 1, 2, 3]


class Fails(GuidanceEnergy):
    def measure(self, state: Any) -> torch.Tensor:
        raise KeyError("on purpose")


@pytest.mark.parametrize("where", ["energy", "callback"])
def test_after_an_error_the_pipeline_is_as_before(pipe, edit, edited, where):
    unet, calls = pipe.unet, []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in (unet, unet.up_blocks[-1])]
    hooks = {name: tuple(module._forward_hooks) for name, module in unet.named_modules()}
    processors, wanted = dict(unet.attn_processors), [p.requires_grad for p in unet.parameters()]

    def fail(*_):
        raise KeyError("on purpose")

    arguments = (
        {"callback_on_step_end": fail} if where == "callback" else {"guiders": [SelfAttentionEnergy(), Fails(1.0)]}
    )
    with pytest.raises(KeyError, match="on purpose"):
        edit(**arguments)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert {name: tuple(module._forward_hooks) for name, module in unet.named_modules()} == hooks
    assert [p.requires_grad for p in unet.parameters()] == wanted
    assert all(p.grad is None for p in unet.parameters())
    for handle in handles:
        handle.remove()
    assert calls and torch.equal(edit(), edited)


def test_a_lora_takes_part_and_stays_untouched(tiny_sd_path, edited, file, prompts):
    pipe = load(tiny_sd_path)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    trainable = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in trainable.items()}
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    changed = pipe(file["image"], *prompts, **call).images
    assert trainable and all("lora" in name for name in trainable)
    assert all(p.requires_grad and p.grad is None and torch.equal(p, values[n]) for n, p in trainable.items())
    assert not torch.allclose(changed, edited, atol=1e-2)
    weak = pipe(file["image"], *prompts, **call, cross_attention_kwargs={"scale": 0.0}).images
    torch.testing.assert_close(weak, edited, atol=5e-3, rtol=0)


def test_the_hooks_of_accelerate_survive(tiny_sd_path, edited, inversion, prompts):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe = load(tiny_sd_path)
    hook = Counts()
    add_hook_to_module(pipe.unet, hook)
    call = {"inversion": inversion, "prompt": prompts[1], "num_inference_steps": STEPS, "output_type": "latent"}
    assert torch.equal(pipe(**call).images, edited)
    assert pipe.unet._hf_hook is hook and hook.calls == 10 + 2 * 5

"""Inversion and editing as a whole: the limit cases, what each method promises, and what a call leaves behind."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import LoraConfig

from diffusers_ext import (
    AttentionReplace,
    AttentionReweight,
    GuideAndRescalePipeline,
    InversionOutput,
    LocalBlend,
    NullTextInversionPipeline,
)
from diffusers_ext.inversion import INVERSIONS, InversionStoppedError
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components, tiny_stable_diffusion
from tests.pipelines.test_guide_and_rescale_batches import ip_adapter_weights


STEPS = 3
SOURCE, EDIT, OTHER = "a red cat", "a red dog", "a tan cat"
# Settings in which the small random network is inverted quickly.
QUICK: dict[str, dict[str, Any]] = {
    "fixed_point": {"iterations": 2}, "null_text": {"inner_steps": 4, "early_stop": 0.0},
}  # fmt: skip


def build(kind: str = "epsilon", **changes: Any) -> NullTextInversionPipeline:
    pipe = NullTextInversionPipeline(**{**tiny_components(kind), **changes}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> NullTextInversionPipeline:
    return build()


def picture(seed: int = 0, size: int = IMAGE_SIZE) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def inverted(pipe: NullTextInversionPipeline, method: str = "direct", prompt: Any = SOURCE, **changes: Any) -> Any:
    arguments = {"num_inference_steps": STEPS, "settings": QUICK.get(method), **changes}
    if method == "edit_friendly":
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
    image = torch.cat([picture(seed) for seed in range(len(prompt))]) if isinstance(prompt, list) else picture()
    return pipe.invert(image, prompt, method, **arguments)


@pytest.fixture(scope="module")
def inversions(pipe) -> dict[str, InversionOutput]:
    return {method: inverted(pipe, method) for method in INVERSIONS}


def latents_of(pipe: NullTextInversionPipeline, prompt: Any, **arguments: Any) -> torch.Tensor:
    return pipe(prompt, output_type="latent", **arguments).images


def replace(pipe: NullTextInversionPipeline, prompts: list[str], blend: bool = False) -> AttentionReplace:
    words = [prompt.split()[-1] for prompt in prompts]
    local = LocalBlend(pipe.tokenizer, prompts, words, threshold=0.97) if blend else None
    return AttentionReplace(pipe.tokenizer, prompts, local_blend=local)


# -- limit cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_without_a_controller_an_edit_is_stock_bit_for_bit(kind, scale):
    pipe = build(kind)
    inversion = inverted(pipe)
    stock = tiny_stable_diffusion(kind)
    edits = [EDIT, OTHER]
    expected = stock(
        edits, latents=inversion.latents[-1].repeat(2, 1, 1, 1), num_inference_steps=STEPS, guidance_scale=scale,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(latents_of(pipe, edits, inversion=inversion, guidance_scale=scale), expected)
    negative = stock(
        EDIT, negative_prompt="ugly", latents=inversion.latents[-1], num_inference_steps=STEPS, guidance_scale=scale,
        output_type="latent",
    ).images  # fmt: skip
    found = latents_of(pipe, EDIT, inversion=inversion, guidance_scale=scale, negative_prompt="ugly")
    assert torch.equal(found, negative)


@pytest.mark.parametrize("method", ["direct", "edit_friendly", "bdia"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_source_of_an_exact_method_is_the_round_trip_of_the_autoencoder(pipe, inversions, method, scale):
    with torch.no_grad():
        scale = pipe.vae.config.scaling_factor
        latents = pipe.vae.encode(picture()).latent_dist.mode() * scale
        # Twice, since a batch of two rounds differently from one.
        expected = (pipe.vae.decode(latents.repeat(2, 1, 1, 1) / scale).sample / 2 + 0.5).clamp(0, 1)[:1]
    arguments = {"inversion": inversions[method], "guidance_scale": scale, "return_source": True, "output_type": "pt"}
    for controller in (None, replace(pipe, [SOURCE, EDIT])):
        images = pipe(EDIT, controller=controller, **arguments).images
        assert len(images) == 2
        torch.testing.assert_close(images[:1], expected, atol=1e-6, rtol=0)
    assert torch.equal(inversions[method].latents[0], latents)


def test_a_source_that_is_sampled_is_the_way_back_of_the_inversion(pipe, inversions):
    plain = latents_of(pipe, SOURCE, inversion=inversions["ddim"], guidance_scale=1.0, return_source=True)
    assert torch.equal(plain[:1], plain[1:])
    guided = latents_of(pipe, SOURCE, inversion=inversions["null_text"], return_source=True)
    torch.testing.assert_close(guided[0], guided[1], atol=1e-5, rtol=0)
    # Negative-prompt inversion is at any guidance what sampling without guidance is.
    pushed = latents_of(pipe, SOURCE, inversion=inversions["negative_prompt"], guidance_scale=5.0, return_source=True)
    torch.testing.assert_close(pushed, plain, atol=1e-4, rtol=0)


def test_null_text_brings_the_source_nearer_than_guidance_alone(pipe, inversions):
    clean = inversions["null_text"].latents[0]
    error = {
        method: float((latents_of(pipe, SOURCE, inversion=inversions[method]) - clean).norm())
        for method in ("ddim", "null_text")
    }
    assert error["null_text"] < error["ddim"]


@pytest.mark.parametrize("method", ["edit_friendly", "bdia"])
def test_with_the_source_prompt_an_exact_method_leads_back(pipe, inversions, method):
    scale = inversions[method].config["settings"]["guidance_scale"]
    found = latents_of(pipe, SOURCE, inversion=inversions[method], guidance_scale=scale)
    torch.testing.assert_close(found, inversions[method].latents[0], atol=1e-3, rtol=0)


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", INVERSIONS)
@pytest.mark.parametrize("controlled", [False, True])
def test_edits_of_one_picture_are_those_of_single_calls(pipe, inversions, method, controlled):
    edits, inversion = [EDIT, OTHER], inversions[method]

    def controller(prompts: list[str]) -> Any:
        return replace(pipe, [SOURCE, *prompts]) if controlled else None

    together = latents_of(pipe, edits, inversion=inversion, controller=controller(edits))
    for number, edit in enumerate(edits):
        alone = latents_of(pipe, edit, inversion=inversion, controller=controller([edit]))
        torch.testing.assert_close(together[number : number + 1], alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", ["direct", "null_text", "edit_friendly", "negative_prompt"])
def test_pictures_are_inverted_and_edited_as_each_alone(pipe, method):
    noise = {"generator": [torch.Generator().manual_seed(s) for s in (1, 2)]} if method == "edit_friendly" else {}
    both = inverted(pipe, method, ["a red cat", "a tan hat"], **noise)
    edited = latents_of(pipe, [EDIT, OTHER], inversion=both, return_source=True)
    for number, (source, edit) in enumerate(zip(["a red cat", "a tan hat"], [EDIT, OTHER], strict=True)):
        noise = {"generator": torch.Generator().manual_seed(number + 1)} if method == "edit_friendly" else {}
        alone = pipe.invert(
            picture(number), source, method, num_inference_steps=STEPS, settings=QUICK.get(method), **noise
        )
        torch.testing.assert_close(both.latents[:, number], alone.latents[:, 0], atol=1e-5, rtol=0)
        found = latents_of(pipe, edit, inversion=alone, return_source=True)
        torch.testing.assert_close(edited[[number, 2 + number]], found, atol=2e-3, rtol=0)


def test_the_picture_and_its_inversion_give_the_same(pipe, inversions):
    call = {"image": picture(), "source_prompt": SOURCE, "num_inference_steps": STEPS}
    for method in ("direct", "null_text"):
        settings = {"inversion_method": method, "inversion_settings": QUICK.get(method)}
        found = pipe(EDIT, **call, **settings, output_type="latent")
        expected = pipe(EDIT, inversion=inversions[method], output_type="latent")
        assert torch.equal(found.images, expected.images)
        assert found.backward_passes == inversions[method].backward_passes
        made = inversions[method].network_evaluations
        assert found.network_evaluations == expected.network_evaluations + made


# -- what a call costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", INVERSIONS)
def test_passes_are_those_that_the_network_saw(pipe, inversions, method):
    counts = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    inversion = inversions[method]
    output = pipe([EDIT, OTHER], inversion=inversion, controller=replace(pipe, [SOURCE, EDIT, OTHER]))
    handle.remove()
    # Three with words and two without; a source that is not put on its states needs a third without.
    steps = STEPS - (method == "bdia")
    each = 5 if method in ("direct", "edit_friendly", "bdia") else 6
    assert sum(counts) == output.network_evaluations == each * steps
    plain = pipe([EDIT, OTHER], inversion=inversion)
    assert plain.network_evaluations == 4 * steps and plain.backward_passes == 0


def test_a_later_start_keeps_more_of_the_picture(pipe, inversions):
    inversion = inversions["edit_friendly"]
    distance = [
        float((latents_of(pipe, EDIT, inversion=inversion, skip=skip) - inversion.latents[0]).norm())
        for skip in (0, 2)
    ]
    assert distance[1] < distance[0]


# -- controllers --------------------------------------------------------------------------------------------------


def test_a_controller_is_what_stock_makes_of_it(pipe, inversions):
    edits = [EDIT, OTHER]
    stock = tiny_stable_diffusion()
    controller = replace(pipe, [SOURCE, *edits], blend=True)
    start = inversions["ddim"].latents[-1].repeat(3, 1, 1, 1)
    with controller.attach(stock.unet, start.shape, STEPS):
        expected = stock(
            [SOURCE, *edits], latents=start, num_inference_steps=STEPS, output_type="latent",
            callback_on_step_end=controller.callback_on_step_end,
        ).images  # fmt: skip
    call = {"inversion": inversions["ddim"], "controller": controller, "return_source": True}
    assert torch.equal(latents_of(pipe, edits, **call), expected)


@pytest.mark.parametrize("method", ["direct", "bdia", "edit_friendly"])
def test_outside_of_the_words_the_latents_are_the_picture_bit_for_bit(pipe, inversions, method):
    controller = replace(pipe, [SOURCE, EDIT], blend=True)
    found = latents_of(pipe, EDIT, inversion=inversions[method], controller=controller)
    outside = ~controller.local_blend.mask[1:].expand_as(found)
    assert outside.any() and not outside.all()
    assert torch.equal(found[outside], inversions[method].latents[0][outside])


def test_weights_of_words_alone_change_the_edit(pipe, inversions):
    call = {"inversion": inversions["direct"]}
    plain = latents_of(pipe, SOURCE, **call)
    heavy = AttentionReweight(pipe.tokenizer, [SOURCE, SOURCE], {"red": 5.0})
    assert not torch.allclose(latents_of(pipe, SOURCE, controller=heavy, **call), plain, atol=1e-3)


# -- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", INVERSIONS)
def test_a_saved_inversion_gives_the_same_edit(pipe, inversions, method, tmp_path):
    inversions[method].save_pretrained(tmp_path)
    kept = InversionOutput.from_pretrained(tmp_path)
    assert kept.config["method"] == method
    assert torch.equal(latents_of(pipe, EDIT, inversion=kept), latents_of(pipe, EDIT, inversion=inversions[method]))


def test_an_inversion_of_guide_and_rescale_serves_as_well(pipe):
    parts = pipe.components
    other = GuideAndRescalePipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for method in ("ddim", "negative_prompt"):
        inversion = other.invert(picture(), SOURCE, STEPS, method=method)
        found = latents_of(pipe, EDIT, inversion=inversion)
        torch.testing.assert_close(found, latents_of(pipe, EDIT, inversion=inverted(pipe, method)), atol=1e-4, rtol=0)


def test_timesteps_of_ones_own_are_kept_with_the_inversion(pipe):
    inversion = inverted(pipe, timesteps=[801, 401, 1])
    assert inversion.config["num_inference_steps"] == 3
    seen: list[int] = []
    pipe(EDIT, inversion=inversion, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(int(t)))
    assert seen == [801, 401, 1]
    pair = inverted(pipe, "bdia", timesteps=[801, 401, 1])
    assert torch.isfinite(latents_of(pipe, EDIT, inversion=pair)).all()


def test_another_scheduler_lends_its_config_and_is_not_changed(pipe, inversions):
    other = build(scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
    before = other.scheduler.timesteps.clone()
    found = latents_of(other, EDIT, inversion=inversions["direct"])
    assert torch.equal(found, latents_of(pipe, EDIT, inversion=inversions["direct"]))
    assert type(other.scheduler) is EulerDiscreteScheduler and torch.equal(other.scheduler.timesteps, before)


# -- precision and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["direct", "null_text", "bdia"])
def test_half_precision_leaves_states_and_embeddings_in_float32(dtype, method):
    pipe = build().to(dtype)
    inversion = inverted(pipe, method)
    for tensor in (inversion.latents, inversion.null_embeddings):
        assert tensor is None or tensor.dtype == torch.float32 and bool((tensor != tensor.to(dtype).float()).any())
    images = pipe(EDIT, inversion=inversion, return_source=True, output_type="pt").images
    assert images.dtype == dtype and torch.isfinite(images).all()
    assert all(module.dtype == dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder))


@pytest.mark.parametrize("method", ["null_text", "fixed_point"])
def test_checkpointing_changes_nothing_and_is_switched_off_again(pipe, method):
    settings = {"null_text": QUICK["null_text"], "fixed_point": {"iterations": 2, "solver": "gradient"}}[method]
    calls = []
    original = pipe.unet._set_gradient_checkpointing
    pipe.unet._set_gradient_checkpointing = lambda *a, **k: (calls.append(k.get("enable", a)), original(*a, **k))
    try:
        expected = inverted(pipe, method, settings=settings)
        assert not calls
        found = inverted(pipe, method, settings=settings, gradient_checkpointing=True)
    finally:
        del pipe.unet._set_gradient_checkpointing
    assert len(calls) == 2 and not pipe.unet.is_gradient_checkpointing
    assert torch.equal(found.latents, expected.latents)
    if method == "null_text":
        assert torch.equal(found.null_embeddings, expected.null_embeddings)


def test_checkpointing_that_was_on_stays_on():
    pipe = build()
    pipe.unet.enable_gradient_checkpointing()
    inverted(pipe, "null_text", gradient_checkpointing=True)
    assert pipe.unet.is_gradient_checkpointing


def test_it_works_in_inference_mode_where_no_gradients_are_needed(pipe, inversions):
    with torch.inference_mode():
        inversion = inverted(pipe)
        found = latents_of(pipe, EDIT, inversion=inversion).clone()
        with pytest.raises(ValueError, match="method='null_text' needs gradients, which torch.inference_mode"):
            inverted(pipe, "null_text")
    assert torch.equal(found, latents_of(pipe, EDIT, inversion=inversions["direct"]))
    assert torch.equal(latents_of(pipe, EDIT, inversion=inversion), found)


def test_a_frozen_network_trains_nothing_and_gets_its_gradients_back(pipe):
    wanted = [p.requires_grad for p in pipe.unet.parameters()]
    assert all(wanted)
    inverted(pipe, "null_text")
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted
    assert all(p.grad is None for p in pipe.unet.parameters())


# -- callbacks ----------------------------------------------------------------------------------------------------


def test_a_callback_hears_of_every_step_and_round_of_an_inversion(pipe):
    heard: list[tuple[int, int, dict[str, Any]]] = []
    inverted(pipe, "null_text", callback_on_step_end=lambda pipe, step, t, report: heard.append((step, t, report)))
    assert [step for step, _, report in heard if report["stage"] == "inversion"] == [0, 1, 2]
    rounds = [(step, report["round"]) for step, _, report in heard if report["stage"] == "optimisation"]
    assert rounds == [(step, number) for step in range(STEPS) for number in range(4)]
    assert all(report["loss"] >= 0 for _, _, report in heard if report["stage"] == "optimisation")


def test_the_bar_of_an_optimisation_shows_the_loss(capsys):
    pipe = build()
    pipe.set_progress_bar_config(mininterval=0)
    inverted(pipe, "null_text", ["a", "b"])
    shown = capsys.readouterr().err
    assert "inversion: 100%" in shown and "optimisation: 100%" in shown and "6/6" in shown and "loss=" in shown


def test_a_callback_may_set_what_guidance_points_away_from_for_the_rest(pipe, inversions):
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["negative_prompt_embeds"].clone())
        return {"negative_prompt_embeds": torch.zeros_like(seen[-1])} if step == 0 else {}

    call = {"inversion": inversions["null_text"], "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    changed = latents_of(pipe, EDIT, callback_on_step_end=callback, **call)
    assert torch.equal(seen[0], inversions["null_text"].null_embeddings[-1])
    assert not seen[1].any() and not seen[2].any()
    assert not torch.equal(changed, latents_of(pipe, EDIT, inversion=inversions["null_text"]))


def test_a_callback_may_use_the_pipeline_while_a_controller_waits(pipe, inversions):
    inner = []

    def callback(pipe: Any, step: int, *_: Any) -> None:
        scale, steps = pipe._guidance_scale, pipe._num_timesteps
        if step == 1:
            inner.append(latents_of(pipe, OTHER, inversion=inversions["direct"]))
        pipe._guidance_scale, pipe._num_timesteps = scale, steps

    call = {"inversion": inversions["direct"], "controller": replace(pipe, [SOURCE, EDIT])}
    found = latents_of(pipe, EDIT, callback_on_step_end=callback, **call)
    assert torch.equal(found, latents_of(pipe, EDIT, **call))
    assert torch.equal(inner[0], latents_of(pipe, OTHER, inversion=inversions["direct"]))


# -- what is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["edit", "inversion"])
def test_after_an_error_the_pipeline_is_as_before(where):
    pipe = build()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    call = {"inversion": inverted(pipe), "controller": replace(pipe, [SOURCE, EDIT])}
    expected = latents_of(pipe, EDIT, **call)
    processors, wanted = dict(pipe.unet.attn_processors), [p.requires_grad for p in pipe.unet.parameters()]

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        if where == "edit":
            pipe(EDIT, callback_on_step_end=fail, **call)
        else:
            inverted(pipe, "null_text", gradient_checkpointing=True, callback_on_step_end=fail)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted and any(wanted)
    assert not pipe.unet.is_gradient_checkpointing and all(p.grad is None for p in pipe.unet.parameters())
    assert torch.equal(latents_of(pipe, EDIT, **call), expected)


@pytest.mark.parametrize("method", ["direct", "null_text", "edit_friendly"])
def test_an_ip_adapter_shows_its_picture_to_the_edits_alone_and_is_intact_afterwards(method):
    pipe = build()
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, 6, pipe.unet.config.cross_attention_dim)])
    embeds = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), torch.ones(1, 1, 6)])]}
    before = dict(pipe.unet.attn_processors)
    assert any("IPAdapter" in type(processor).__name__ for processor in before.values())
    inversion = inverted(pipe, method, ["a red cat", "a red hat"], **embeds)
    one = inverted(pipe, method, **embeds)
    call = {"inversion": one, "controller": replace(pipe, [SOURCE, EDIT]), "return_source": True, **embeds}
    shown = latents_of(pipe, EDIT, **call)
    nothing = [torch.zeros(2, 1, 6)]
    hidden = latents_of(pipe, EDIT, **{**call, "ip_adapter_image_embeds": nothing})
    torch.testing.assert_close(shown[:1], hidden[:1], atol=1e-5, rtol=0)
    assert not torch.allclose(shown[1:], hidden[1:], atol=1e-3)
    assert torch.isfinite(latents_of(pipe, [EDIT, OTHER], inversion=inversion, **embeds)).all()
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_the_hooks_of_accelerate_survive_and_move_the_networks(pipe, inversions):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    hooked, hook = build(), Counts()
    add_hook_to_module(hooked.unet, hook)
    inversion = inverted(hooked, "null_text", gradient_checkpointing=True)
    # Three of the inversion, and in each step one of the source and four rounds.
    assert hook.calls == inversion.network_evaluations == 3 + 3 * 5
    controller = replace(pipe, [SOURCE, EDIT])
    found = latents_of(hooked, EDIT, inversion=inversion, controller=controller)
    assert torch.equal(found, latents_of(pipe, EDIT, inversion=inversions["null_text"], controller=controller))
    assert hooked.unet._hf_hook is hook and hook.calls == 18 + 3


def test_a_lora_takes_part_in_inversion_and_edit(pipe):
    other = build()
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    strong, weak = (inverted(other, "null_text", cross_attention_kwargs={"scale": s}) for s in (1.0, 0.0))
    plain = inverted(pipe, "null_text")
    assert not torch.allclose(strong.latents, plain.latents, atol=1e-3)
    torch.testing.assert_close(weak.latents, plain.latents, atol=1e-4, rtol=0)
    found = latents_of(other, EDIT, inversion=weak, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(found, latents_of(pipe, EDIT, inversion=plain), atol=5e-3, rtol=0)


def test_an_optimisation_that_leaves_the_numbers_keeps_the_best_so_far(pipe, monkeypatch):
    forward, calls = pipe.unet.forward, []

    def fails_late(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        output = forward(*args, **kwargs)
        # 3 of the inversion; then each step has one of the source and four of its rounds.
        return (output[0] * float("nan"),) if len(calls) == 3 + 5 + 2 else output

    monkeypatch.setattr(pipe.unet, "forward", fails_late)
    with pytest.raises(InversionStoppedError, match="picture 0 stopped in step 2 of 3 .* round 1") as caught:
        inverted(pipe, "null_text")
    monkeypatch.undo()
    best = caught.value.best
    assert isinstance(best, InversionOutput) and best.problem() is None
    assert torch.equal(best.null_embeddings[0], best.null_embeddings[2])
    assert np.isfinite(pipe(EDIT, inversion=best, output_type="np").images).all()


def test_a_scheduler_in_pure_noise_is_refused_for_a_network_that_predicts_noise():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="pure noise, which a network that predicts noise cannot undo"):
        inverted(build(scheduler=scheduler))

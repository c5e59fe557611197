"""CTMPipeline: what the network is told, stock pipelines as the limit case, and the checks of every pipeline."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from diffusers_ext import CTMPipeline, CTMScheduler
from diffusers_ext.training.distillation.lcm import guidance_embedding
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_models import tiny_components, tiny_unet


WIDTH = 16


def components() -> dict[str, Any]:
    parts = tiny_components()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = tiny_unet(time_cond_proj_dim=WIDTH).eval()
        torch.nn.init.normal_(parts["unet"].time_embedding.cond_proj.weight)
    return parts


def built(gamma: float = 0.0, **settings: Any) -> CTMPipeline:
    pipe = CTMPipeline(**components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, gamma=gamma, **settings)
    return pipe


class TestCTMPipeline(PipelineConformance):
    pipeline_class = CTMPipeline
    init_kwargs = {"requires_safety_checker": False}
    required_params = frozenset({"prompt"})
    not_applicable = {
        "test_guidance_scale_takes_effect": "guidance is part of the weights",
        "test_a_callback_can_change_the_guidance_scale": "guidance is part of the weights",
        "test_prompts_can_be_encoded_without_the_other_components": "it takes no negative prompt",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"prompt": "a red heart", "num_inference_steps": 2, "output_type": "pt"}

    @pytest.mark.slow  # what is particular to it, the scheduler's class in the index, is in the other tests of loading
    def test_a_fresh_process_loads_it(self, tmp_path: Any) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_the_network_is_told_where_each_step_jumps_to(gamma: float) -> None:
    pipe, told = built(gamma), []
    pipe.unet.register_forward_hook(
        lambda unet, inputs, options, answer: told.append(options["timestep_cond"]), with_kwargs=True
    )
    pipe(["a", "b"], num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))
    for found, end in zip(told, pipe.scheduler.target_timesteps, strict=True):
        torch.testing.assert_close(found, guidance_embedding(end.repeat(2) / 1000, WIDTH), rtol=0, atol=1e-4)
    assert (pipe.scheduler.target_timesteps == 0).all() if gamma == 1 else pipe.scheduler.target_timesteps[0] > 300


def test_with_all_noise_fresh_it_is_the_stock_pipeline_without_guidance() -> None:
    ours = built(1.0, final_sigmas_type="zero")
    stock = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.scheduler.set_timesteps(4)
    timesteps = stock.scheduler.timesteps.tolist()
    mine = ours("a", timesteps=timesteps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    theirs = stock(
        "a", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    other = built(0.0)("a", timesteps=timesteps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert not torch.allclose(other, theirs, atol=1e-2)


def test_another_scheduler_is_exchanged_for_one_that_starts_at_the_last_timestep() -> None:
    pipe = CTMPipeline(**components(), requires_safety_checker=False)
    assert type(pipe.scheduler) is CTMScheduler
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_failed_call_leaves_no_hook() -> None:
    pipe = built()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a", num_inference_steps=2, callback_on_step_end=fail)
    assert not pipe.unet._forward_pre_hooks


def test_a_network_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="time_cond_proj_dim=None and cannot be told where to jump"):
        CTMPipeline(**tiny_components(), requires_safety_checker=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not a whole number"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000 is out of range"),
        ({"timesteps": [1, 2]}, r"timesteps=\[1, 2\] is not a list of descending whole numbers"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents has the shape \(1, 3, 8, 8\)"),
        ({"output_type": "png"}, "output_type='png' is not one of"),
        ({"prompt": [1]}, r"prompt=\[1\] is not a str"),
        ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        ({"generator": [torch.Generator()] * 3}, "generator is a list of 3 for a batch of 1"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built()(**{"prompt": "a", "num_inference_steps": 2, **changes})


def test_a_scheduler_without_targets_is_refused() -> None:
    pipe = built()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler=DDIMScheduler does not say where it jumps to"):
        pipe("a")

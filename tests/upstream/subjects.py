"""Our classes under diffusers' own test suites. `run_upstream.py` runs this file where `tests` is the checkout's package.

To add a scheduler, list it in `SCHEDULERS`; to add a pipeline, write a class like the ones at the end.
"""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from reference_scheduler import ReferenceScheduler
from tiny_models import IMAGE_SIZE, tiny_components

from diffusers_ext import GuideAndRescalePipeline
from tests.pipelines.testing_utils import common
from tests.schedulers import test_schedulers as schedulers


# class -> arguments of its constructor; at least one is left at its default
SCHEDULERS: dict[type, dict[str, Any]] = {
    ReferenceScheduler: {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02},
}


def scheduler_suite(scheduler_class: type, config: dict[str, Any]) -> type:
    members = {
        "scheduler_classes": (scheduler_class,),
        "forward_default_kwargs": (("num_inference_steps", 50),),
        "get_scheduler_config": lambda self, **overrides: {**config, **overrides},
    }
    return type(f"Test{scheduler_class.__name__}", (schedulers.SchedulerCommonTest,), members)


for _class, _config in SCHEDULERS.items():
    globals()[f"Test{_class.__name__}"] = scheduler_suite(_class, _config)


class Suite(common.BasePipelineTesterConfig, common.PipelineTesterMixin):
    __test__ = False
    output_shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    batch_input_params = frozenset({"prompt", "negative_prompt"})
    callback_cfg_params = frozenset({"prompt_embeds"})

    def get_dummy_components(self) -> dict[str, Any]:
        return {**tiny_components(), "requires_safety_checker": False}

    def get_pipeline(self, **components: Any) -> Any:
        pipe = self.pipeline_class(**{**(components or self.get_dummy_components()), "requires_safety_checker": False})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {
            "prompt": "a small red heart", "generator": self.get_generator(0), "num_inference_steps": 2,
            "guidance_scale": 6.0, "output_type": "pt",
        }  # fmt: skip


class TestStableDiffusionPipeline(Suite):
    __test__ = True
    pipeline_class = StableDiffusionPipeline
    required_input_params_in_call_signature = frozenset({"prompt", "height", "width", "guidance_scale"})

    def test_encode_prompt_works_in_isolation(self) -> None:
        super().test_encode_prompt_works_in_isolation({"device": "cpu", "do_classifier_free_guidance": True})


class WithoutPickles(GuideAndRescalePipeline):
    """The suite saves with `safe_serialization=False`, which our pipelines refuse; it does not depend on it."""

    def save_pretrained(self, folder: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)


class TestGuideAndRescalePipeline(Suite):
    __test__ = True
    pipeline_class = WithoutPickles
    required_input_params_in_call_signature = frozenset({"image", "source_prompt", "prompt", "guidance_scale"})
    optional_input_params = common.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    batch_input_params = frozenset({"image", "source_prompt", "prompt"})

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        return {
            **super().get_dummy_inputs(),
            "image": torch.rand(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1,
            "source_prompt": "a heart",
            "num_inference_steps": 4,
        }

    @pytest.mark.skip(reason="an edit is deterministic: a picture and a prompt have one result")
    def test_num_images_per_prompt(self) -> None: ...

    @pytest.mark.skip(reason="prompts are given as text, three kinds of them")
    def test_encode_prompt_works_in_isolation(self) -> None: ...

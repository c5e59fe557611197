"""Null-text inversion under the checks that every pipeline of this package must pass."""

from typing import Any

import pytest
import torch

from diffusers_ext import NullTextInversionPipeline
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components


class TestNullTextInversionPipeline(PipelineConformance):
    pipeline_class = NullTextInversionPipeline
    init_kwargs = {"requires_safety_checker": False}
    required_params = frozenset(
        {
            "prompt", "inversion", "controller", "guidance_scale", "negative_prompt", "image", "source_prompt",
            "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        }
    )  # fmt: skip
    optional_params = frozenset(
        {"num_inference_steps", "generator", "latents", "output_type", "return_dict", "return_source"}
    )
    batch_params = ("image", "source_prompt", "prompt")
    not_applicable = {
        "test_several_images_per_prompt": "an edit is deterministic: a picture and a prompt have one result",
        "test_prompts_can_be_encoded_without_the_other_components": "prompts are given as text, three kinds of them",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        return {
            "image": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1,
            "source_prompt": "a red heart",
            "prompt": "a blue heart",
            "num_inference_steps": 3,
            "output_type": "pt",
        }


@pytest.mark.slow  # the class above shows most of it in every run
class TestNullTextInversionPipelineWithVelocityAndItsOwnNoise(TestNullTextInversionPipeline):
    # Random weights amplify rounding.
    tolerance = 1e-3

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_components("v_prediction")

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {**super().get_dummy_inputs(), "inversion_method": "edit_friendly"}

"""Guide-and-Rescale under the checks that every pipeline of this package must pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ext import GuideAndRescalePipeline
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components


class TestGuideAndRescalePipeline(PipelineConformance):
    pipeline_class = GuideAndRescalePipeline
    init_kwargs = {"requires_safety_checker": False}
    required_params = frozenset(
        {
            "image", "source_prompt", "prompt", "guiders", "guidance_scale", "rescale_range", "guidance_end",
            "alignment", "inversion", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        }
    )  # fmt: skip
    optional_params = frozenset(
        {"num_inference_steps", "generator", "latents", "output_type", "return_dict", "negative_prompt"}
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
            "num_inference_steps": 4,
            "output_type": "pt",
        }


class TestGuideAndRescalePipelineWithVelocity(TestGuideAndRescalePipeline):
    # Random weights amplify rounding: a change of the start latents by 1e-6 moves these results by 3e-4.
    tolerance = 1e-3

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_components("v_prediction")

    @pytest.mark.slow  # the class above shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)

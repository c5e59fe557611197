"""The FlowChef pipelines under the checks that every pipeline of this package must pass, and steered under the same ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ext import FlowChefFluxPipeline, FlowChefPipeline, FlowChefStableDiffusion3Pipeline
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_flows import tiny_flow_components, tiny_flux_components, tiny_sd3_components
from tests.helpers.tiny_models import IMAGE_SIZE


STEERING = frozenset(
    {
        "image", "mask_image", "source_prompt", "operator", "measurement", "objective", "noise_std", "source_stop",
        "steering_kwargs",
    }
)  # fmt: skip


def inpainting() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    mask[..., IMAGE_SIZE // 2 :] = 1
    return {
        "prompt": "a red heart",
        "image": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1,
        "mask_image": mask,
        "num_inference_steps": 3,
        "output_type": "pt",
    }


class TestFlowChefPipeline(PipelineConformance):
    pipeline_class = FlowChefPipeline
    init_kwargs = {"requires_safety_checker": False}
    required_params = PipelineConformance.required_params | STEERING

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_flow_components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return inpainting()


class TestFlowChefStableDiffusion3Pipeline(PipelineConformance):
    pipeline_class = FlowChefStableDiffusion3Pipeline
    required_params = PipelineConformance.required_params | STEERING
    not_applicable = {
        "test_prompts_can_be_encoded_without_the_other_components": "its encode_prompt returns four embeddings",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        parts = tiny_sd3_components()
        # transformers leaves hooks in an encoder that is asked for its hidden states for the first time
        for encoder in (parts["text_encoder"], parts["text_encoder_2"]):
            encoder(torch.ones(1, 4, dtype=torch.long), output_hidden_states=True)
        return parts

    def get_dummy_inputs(self) -> dict[str, Any]:
        return inpainting()

    @pytest.mark.slow  # the class above shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestFlowChefFluxPipeline(TestFlowChefStableDiffusion3Pipeline):
    pipeline_class = FlowChefFluxPipeline
    not_applicable = {
        "test_prompts_can_be_encoded_without_the_other_components": "its encode_prompt returns token positions too",
        "test_guidance_scale_takes_effect": "guidance is distilled into some of these networks, and not into this one",
        "test_a_callback_can_change_the_guidance_scale": "true_cfg_scale is read once",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_flux_components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"height": IMAGE_SIZE, "width": IMAGE_SIZE, **inpainting()}

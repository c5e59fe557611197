"""The pipeline suite under test: faults planted in the stock pipeline are caught by the checks meant for them.

The stock pipeline passes the suite (`tests/pipelines/test_stock_conformance.py`), so a check that fails here fails
because of the fault.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline  # noqa: F401
from diffusers.models.attention_processor import AttnProcessor

from tests.helpers.tiny_models import tiny_components

from .pipelines import PipelineConformance


class StockSuite(PipelineConformance):
    pipeline_class = StableDiffusionPipeline
    init_kwargs = {"requires_safety_checker": False}

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"prompt": "a red heart", "num_inference_steps": 2, "output_type": "pt"}


def planted(fault: str, change: Callable[..., Any]) -> type:
    """The stock pipeline whose call is `change(pipe, stock call, arguments)`."""
    stock = StableDiffusionPipeline.__call__

    def __call__(self: Any, prompt: Any = None, **arguments: Any) -> Any:
        return change(self, lambda **given: stock(self, **given), {"prompt": prompt, **arguments})

    __call__.__signature__ = inspect.signature(stock)
    return type(fault, (StableDiffusionPipeline,), {"__call__": __call__, "__module__": __name__})


def without(*names: str) -> Callable[..., Any]:
    def change(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
        return call(**{name: value for name, value in arguments.items() if name not in names})

    return change


def first_generator_only(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(arguments.get("generator"), list):
        arguments["generator"] = arguments["generator"][0]
    return call(**arguments)


def first_prompt_only(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(arguments["prompt"], list):
        arguments["prompt"] = arguments["prompt"][0]
    return call(**arguments)


def mixes_the_batch(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    images = call(**{**arguments, "return_dict": False})[0]
    return (images - images.mean(0) + images.mean(),)


def leaves_processors(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    pipe.unet.set_attn_processor(AttnProcessor())
    return call(**arguments)


def leaves_hooks_after_a_failure(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    hook = pipe.unet.register_forward_hook(lambda *_: None)
    output = call(**arguments)
    hook.remove()
    return output


def draws_from_the_global_generator(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    return call(**{**arguments, "generator": None})


def darkens_arrays(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    output = call(**arguments)
    return (output[0] * 0.9, None) if arguments["output_type"] == "np" else output


def drifts(pipe: Any, call: Any, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.01
    return call(**arguments)


# check -> the fault that it must catch
FAULTS: dict[str, type] = {
    "test_tuple_and_dict_outputs_are_equal": planted("IgnoresReturnDict", without("return_dict")),
    "test_a_batch_gives_one_result_each": planted("PaintsTheFirstPromptOnly", first_prompt_only),
    "test_a_sample_does_not_depend_on_its_batch": planted("MixesTheBatch", mixes_the_batch),
    "test_several_images_per_prompt": planted("IgnoresImagesPerPrompt", without("num_images_per_prompt")),
    "test_guidance_scale_takes_effect": planted("IgnoresGuidanceScale", without("guidance_scale")),
    "test_a_callback_sees_and_replaces_the_tensors": planted("IgnoresCallbacks", without("callback_on_step_end")),
    "test_output_types_show_the_same_picture": planted("DarkensArrays", darkens_arrays),
    "test_a_call_leaves_the_components_as_they_were": planted("LeavesProcessors", leaves_processors),
    "test_a_failed_call_leaves_the_pipeline_usable": planted("LeavesHooks", leaves_hooks_after_a_failure),
    "test_equal_seeds_give_equal_pictures": planted("DrawsFromTheGlobalGenerator", draws_from_the_global_generator),
    "test_a_generator_list_of_wrong_length_is_refused": planted("TakesTheFirstGenerator", first_generator_only),
    "test_a_misspelt_argument_is_an_error": StableDiffusionPipeline,
    "test_components_build_the_same_pipeline": planted("ChangesItsWeights", drifts),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_caught_by_its_check(check: str, tmp_path: Path) -> None:
    suite = type("Suite", (StockSuite,), {"pipeline_class": FAULTS[check]})()
    method = getattr(suite, check)
    with pytest.raises(AssertionError) as caught:
        method(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(method).parameters else {}))
    assert str(caught.value)


def test_the_suite_has_the_checks_it_promises() -> None:
    assert len(PipelineConformance.checks()) == 28
    assert set(FAULTS) <= set(PipelineConformance.checks())

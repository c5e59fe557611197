"""The pipeline suite itself under test: each fault that is planted in the stock pipeline is caught by its check.

That a sound pipeline passes is shown where the suite runs on the stock pipeline, from which all the faulty ones derive.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from tests.helpers.tiny_models import tiny_components

from .pipelines import PipelineConformance


stock_call = StableDiffusionPipeline.__call__
stock_save = StableDiffusionPipeline.save_pretrained
stock_load = StableDiffusionPipeline.from_pretrained.__func__


def planted(fault: str, **namespace: Any) -> type:
    """The stock pipeline with the members of `namespace` in place of its own."""
    return type(f"{fault}Pipeline", (StableDiffusionPipeline,), {"__module__": __name__, **namespace})


def changed_output(change: Callable[[Any, Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """A call that returns `change(pipeline, images, arguments)` in place of the images."""

    @functools.wraps(stock_call)
    def call(self: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = stock_call(self, *args, **kwargs)
        output.images = change(self, output.images, {**kwargs, "return_dict": return_dict})
        return output if return_dict else (output.images, output.nsfw_content_detected)

    return call


def changed_arguments(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """A call that goes by `change(arguments)`."""

    @functools.wraps(stock_call)
    def call(self: Any, **kwargs: Any) -> Any:
        return stock_call(self, **{**kwargs, **change(kwargs)})

    return call


def after_a_call(deed: Callable[[Any], Any]) -> Callable[..., Any]:
    """A call that does `deed(pipeline)` to the pipeline before it returns."""

    @functools.wraps(stock_call)
    def call(self: Any, **kwargs: Any) -> Any:
        output = stock_call(self, **kwargs)
        deed(self)
        return output

    return call


def loading(change: Callable[[dict[str, Any]], dict[str, Any]]) -> classmethod:
    """A `from_pretrained` that goes by `change(arguments)`."""
    return classmethod(lambda cls, folder, **kwargs: stock_load(cls, folder, **change(kwargs)))


def loaded(deed: Callable[[Any], Any]) -> classmethod:
    """A `from_pretrained` that does `deed(pipeline)` to what it loaded."""

    def load(cls: type, folder: Path, **kwargs: Any) -> Any:
        pipe = stock_load(cls, folder, **kwargs)
        deed(pipe)
        return pipe

    return classmethod(load)


def spoil_a_weight(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data.mul_(1.5)


def lacks_latents(self: Any, prompt: Any, num_inference_steps: int = 50) -> Any:
    return stock_call(self, prompt, num_inference_steps=num_inference_steps)


@functools.wraps(stock_call)
def restores_on_success_only(self: Any, **kwargs: Any) -> Any:
    processors = dict(self.unet.attn_processors)
    self.unet.set_attn_processor(AttnProcessor())
    output = stock_call(self, **kwargs)
    self.unet.set_attn_processor(processors)
    return output


def encodes_with_the_unet(self: Any, *args: Any, **kwargs: Any) -> Any:
    embeds = StableDiffusionPipeline.encode_prompt(self, *args, **kwargs)
    return tuple(None if part is None else part.to(self.unet.dtype) for part in embeds)


def one_precision(kwargs: dict[str, Any]) -> dict[str, Any]:
    dtype = kwargs.get("dtype")
    return {**kwargs, "dtype": dtype["default"]} if isinstance(dtype, dict) else kwargs


FAULTS: dict[str, list[type]] = {
    "test_saved_and_loaded_pipeline_paints_the_same": [planted("SpoilsAWeight", from_pretrained=loaded(spoil_a_weight))],
    "test_output_has_the_declared_shape": [
        planted("ForgetsTheRange", __call__=changed_output(lambda self, images, given: images * 2 - 1)),
        planted("ChannelsLast", __call__=changed_output(lambda self, images, given: images.permute(0, 2, 3, 1))),
    ],
    "test_call_signature_is_complete": [planted("LacksLatents", __call__=lacks_latents)],
    "test_a_batch_gives_one_result_each": [
        planted("FirstOnly", __call__=changed_output(lambda self, images, given: images[:1]))],
    "test_a_sample_does_not_depend_on_its_batch": [
        planted("MixesTheBatch", __call__=changed_output(lambda self, images, given: images + 0.01 * len(images)))],
    "test_tuple_and_dict_outputs_are_equal": [
        planted("FlipsTuples", __call__=changed_output(
            lambda self, images, given: images if given["return_dict"] else images.flip(-1))),
        planted("AlwaysGivesDicts", __call__=changed_arguments(lambda given: {"return_dict": True})),
    ],
    "test_components_build_the_same_pipeline": [
        planted("CopiesItsParts", components=property(
            lambda self: copy.deepcopy(StableDiffusionPipeline.components.fget(self))))],
    "test_half_precision_gives_finite_results": [
        planted("OverflowsInHalf", __call__=changed_output(
            lambda self, images, given: images if self.unet.dtype == torch.float32 else images * torch.nan))],
    "test_half_precision_survives_saving": [
        planted("LoadsInFloat32", from_pretrained=loading(lambda given: {**given, "dtype": torch.float32}))],
    "test_optional_components_may_be_left_out": [
        planted("InventsAPart", from_pretrained=loaded(lambda pipe: setattr(pipe, "feature_extractor", object())))],
    "test_it_changes_precision_with_to": [planted("StaysWhereItIs", to=lambda self, *args, **kwargs: self)],
    "test_several_images_per_prompt": [
        planted("OneImageOnly", __call__=changed_arguments(lambda given: {"num_images_per_prompt": 1}))],
    "test_guidance_scale_takes_effect": [
        planted("IgnoresGuidance", __call__=changed_arguments(lambda given: {"guidance_scale": 5.0}))],
    "test_a_callback_sees_and_replaces_the_tensors": [
        planted("NeverCalls", __call__=changed_arguments(lambda given: {"callback_on_step_end": None})),
        planted("IgnoresTheAnswer", __call__=changed_arguments(lambda given: {"callback_on_step_end": (
            None if given.get("callback_on_step_end") is None
            else lambda *seen: given["callback_on_step_end"](*seen[:3], dict(seen[3])) and {})})),
    ],
    "test_a_callback_can_change_the_guidance_scale": [
        planted("FixedGuidance", guidance_scale=property(lambda self: 2.0))],
    "test_variants_are_saved_under_their_name": [
        planted("SavesWithoutVariant", save_pretrained=lambda self, folder, variant=None: stock_save(self, folder))],
    "test_variants_load_with_equal_weights": [planted("SpoilsAWeight", from_pretrained=loaded(spoil_a_weight))],
    "test_a_missing_variant_is_an_error": [
        planted("IgnoresTheVariant", from_pretrained=loading(lambda given: {**given, "variant": None}))],
    "test_prompts_can_be_encoded_without_the_other_components": [
        planted("EncodesWithTheUNet", encode_prompt=encodes_with_the_unet)],
    "test_precision_may_differ_between_components": [
        planted("OnePrecision", from_pretrained=loading(one_precision))],
    "test_a_misspelt_argument_is_an_error": [StableDiffusionPipeline],
    "test_output_types_show_the_same_picture": [
        planted("DarkArrays", __call__=changed_output(
            lambda self, images, given: images**2 if given["output_type"] == "np" else images))],
    "test_a_call_leaves_the_components_as_they_were": [
        planted("ChangesTheSchedule", __call__=after_a_call(
            lambda self: self.scheduler.register_to_config(timestep_spacing="trailing"))),
        planted("LeavesProcessors", __call__=after_a_call(lambda self: self.unet.set_attn_processor(AttnProcessor()))),
        planted("LeavesAHook", __call__=after_a_call(
            lambda self: self.unet.conv_in.register_forward_hook(lambda *seen: None))),
        planted("StartsTraining", __call__=after_a_call(lambda self: self.unet.train())),
        planted("FreezesTheUNet", __call__=after_a_call(lambda self: self.unet.requires_grad_(False))),
        planted("ChangesAWeight", __call__=after_a_call(spoil_a_weight)),
    ],
    "test_a_failed_call_leaves_the_pipeline_usable": [
        planted("RestoresOnSuccessOnly", __call__=restores_on_success_only)],
    "test_equal_seeds_give_equal_pictures": [
        planted("DrawsAnUnseededNumber", __call__=changed_output(
            lambda self, images, given: images + 1e-3 * torch.rand(())))],
    "test_a_generator_list_of_wrong_length_is_refused": [
        planted("TakesTheFirstGenerator", __call__=changed_arguments(lambda given: {
            "generator": given["generator"][0] if isinstance(given["generator"], list) else given["generator"]}))],
    "test_a_fresh_process_loads_it": [planted("ImportedByNobody")],
}  # fmt: skip
# Nothing to plant it in without a device; on one, the two runs are compared with each other.
NEEDS_AN_ACCELERATOR = "test_it_moves_to_an_accelerator_and_back"


def run_check(pipeline_class: type, check: str, folder: Path) -> None:
    """Runs one check of the suite on a class, outside of the collection of pytest."""

    class Suite(PipelineConformance):
        init_kwargs = {"requires_safety_checker": False}

        def get_dummy_components(self) -> dict[str, Any]:
            return tiny_components()

        def get_dummy_inputs(self) -> dict[str, Any]:
            return {"prompt": "a red heart", "num_inference_steps": 2, "output_type": "pt"}

    Suite.pipeline_class = pipeline_class
    method = getattr(Suite(), check)
    method(**({"tmp_path": folder} if "tmp_path" in inspect.signature(method).parameters else {}))


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        pytest.param(check, fault, id=f"{fault.__name__}-{check}")
        for check, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_a_planted_fault_is_caught_by_its_check(check: str, fault: type, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        run_check(fault, check, tmp_path)
    assert str(caught.value), f"{check} fails without a message"


def test_every_check_has_a_fault_that_it_catches() -> None:
    assert sorted([*FAULTS, NEEDS_AN_ACCELERATOR]) == PipelineConformance.checks()
    assert len(PipelineConformance.checks()) == 28

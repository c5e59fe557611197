"""Twenty-eight checks that a pipeline must pass to behave like one of diffusers' own, on a CPU and without downloads.

The first twenty-one are those of diffusers' pipeline tests, written anew; the one that needs an accelerator says so and
is skipped without one. The others cover what those leave out: misspelt arguments, agreement of the output types,
restored components after a call and after a failed one, repeatability, generator lists, and a reload where only the
package was imported.

To put a pipeline under test:

    class TestMyPipeline(PipelineConformance):
        pipeline_class = MyPipeline

        def get_dummy_components(self):
            return tiny_components()

        def get_dummy_inputs(self):
            return {"prompt": "a red heart", "num_inference_steps": 2, "output_type": "pt"}
"""

import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.helpers.fresh_process import assert_reloads_equal
from tests.helpers.placement import in_own_memory

from .base import Conformance, attempt


PROMPTS = ("a red heart", "a very small blue cat face on a green background", "a")
VARIANT = "fp16"


class PipelineConformance(Conformance):
    """The checks. A subclass sets the class attributes and gives components and inputs.

    Args:
        pipeline_class (`type`):
            The pipeline.
        init_kwargs (`dict[str, Any]`):
            Constructor arguments that are not components.
        output_shape (`tuple[int, ...]`, defaults to (3, 32, 32)):
            Shape of one result with `output_type="pt"`.
        required_params (`frozenset[str]`):
            Names that the call must have.
        optional_params (`frozenset[str]`):
            Names that the call must have, with a default.
        batch_params (`tuple[str, ...]`, defaults to ("prompt",)):
            Arguments of which a list (of tensors: a batch) gives one result each.
        encode_prompt_kwargs (`dict[str, Any]`):
            Arguments of `encode_prompt` besides the prompt.
        tolerance (`float`, defaults to 1e-4):
            Largest difference of a sample in a batch and alone.
        fresh_imports (`tuple[str, ...]`, defaults to ("diffusers_ext",)):
            All that the fresh process imports before it reloads the pipeline.
    """

    pipeline_class: ClassVar[Any]
    init_kwargs: ClassVar[dict[str, Any]] = {}
    output_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    required_params: ClassVar[frozenset[str]] = frozenset({"prompt", "negative_prompt", "guidance_scale"})
    optional_params: ClassVar[frozenset[str]] = frozenset(
        {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
    )
    batch_params: ClassVar[tuple[str, ...]] = ("prompt",)
    encode_prompt_kwargs: ClassVar[dict[str, Any]] = {
        "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True,
    }  # fmt: skip
    tolerance: ClassVar[float] = 1e-4
    fresh_imports: ClassVar[tuple[str, ...]] = ("diffusers_ext",)

    # -- what a subclass gives ------------------------------------------------------------------------------------

    def get_dummy_components(self) -> dict[str, Any]:
        """New components, the same at every call."""
        raise NotImplementedError

    def get_dummy_inputs(self) -> dict[str, Any]:
        """Arguments of a call with `output_type="pt"`, without a generator; tensors, text and numbers only."""
        raise NotImplementedError

    # -- shared by the checks -------------------------------------------------------------------------------------

    def pipeline(self, **replaced: Any) -> Any:
        pipe = self.pipeline_class(**{**self.get_dummy_components(), **self.init_kwargs, **replaced})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(self, folder: Path, **kwargs: Any) -> Any:
        pipe = in_own_memory(self.pipeline_class.from_pretrained(folder, **kwargs))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, seed: int = 0, **changes: Any) -> Any:
        inputs = {"generator": torch.Generator().manual_seed(seed), **self.get_dummy_inputs(), **changes}
        return pipe(**inputs, return_dict=False)[0]

    def batch(self, size: int) -> dict[str, list[Any]]:
        """The arguments that are given once per result, `size` different ones of each."""
        inputs = self.get_dummy_inputs()
        return {name: [self.variation(name, inputs[name], i) for i in range(size)] for name in self.batch_params}

    def variation(self, name: str, value: Any, number: int) -> Any:
        """The `number`-th argument of a batch, made from the argument of a single call."""
        if isinstance(value, str):
            return PROMPTS[number % len(PROMPTS)]
        return value.roll(number, dims=-1)

    @staticmethod
    def joined(batch: dict[str, Sequence[Any]]) -> dict[str, Any]:
        """Each argument of a batch as a call takes it: tensors joined, the rest as lists."""
        return {
            name: torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else list(values)
            for name, values in batch.items()
        }

    @staticmethod
    def modules(pipe: Any) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}

    def state(self, pipe: Any) -> dict[str, Any]:
        """All that a call must leave as it was."""
        kept: dict[str, Any] = {"scheduler": json.dumps(dict(pipe.scheduler.config), default=str, sort_keys=True)}
        for name, module in self.modules(pipe).items():
            kept[f"{name}: identity"] = id(module)
            kept[f"{name}: training"] = [part.training for part in module.modules()]
            kept[f"{name}: gradients wanted"] = [weight.requires_grad for weight in module.parameters()]
            kept[f"{name}: gradients"] = [weight.grad is None for weight in module.parameters()]
            kept[f"{name}: weights"] = [float(weight.detach().double().sum()) for weight in module.parameters()]
            kept[f"{name}: hooks"] = [
                len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
                for part in module.modules()
            ]
            kept[f"{name}: patched methods"] = ["forward" in vars(part) for part in module.modules()]
            if hasattr(module, "attn_processors"):
                kept[f"{name}: attention processors"] = {
                    key: (type(processor).__name__, id(processor)) for key, processor in module.attn_processors.items()
                }
        return kept

    def assert_state(self, pipe: Any, before: dict[str, Any], when: str) -> None:
        after = self.state(pipe)
        changed = [name for name in before if after.get(name) != before[name]]
        assert not changed, f"{when} changes {', '.join(changed)}"

    # -- the twenty-one of diffusers -------------------------------------------------------------------------------

    def test_saved_and_loaded_pipeline_paints_the_same(self, tmp_path: Path) -> None:
        pipe = self.pipeline()
        pipe.save_pretrained(tmp_path)
        loaded = self.load(tmp_path)
        assert torch.equal(self.call(loaded), self.call(pipe)), "a saved and reloaded pipeline paints another picture"

    def test_output_has_the_declared_shape(self) -> None:
        output = self.call(self.pipeline())
        assert output.shape == (1, *self.output_shape), f"shape {tuple(output.shape)}"
        assert torch.isfinite(output).all() and output.min() >= 0 and output.max() <= 1, "values outside [0, 1]"

    def test_call_signature_is_complete(self) -> None:
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        missing = (self.required_params | self.optional_params) - set(parameters)
        assert not missing, f"the call lacks {sorted(missing)}"
        bare = [name for name in self.optional_params if parameters[name].default is inspect.Parameter.empty]
        assert not bare, f"{sorted(bare)} have no default"

    def test_a_batch_gives_one_result_each(self) -> None:
        pipe = self.pipeline()
        for size in (1, 2, 3):
            output = attempt(f"a batch of {size}", self.call, pipe, **self.joined(self.batch(size)))
            assert output.shape == (size, *self.output_shape), f"a batch of {size} gave {tuple(output.shape)}"

    def test_a_sample_does_not_depend_on_its_batch(self) -> None:
        pipe, values = self.pipeline(), self.batch(3)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        together = self.call(pipe, generator=seeds, **self.joined(values))
        for i in range(3):
            alone = self.call(pipe, seed=i, **{name: value[i] for name, value in values.items()})
            error = (together[i] - alone[0]).abs().max().item()
            assert error < self.tolerance, f"sample {i} of a batch differs by {error:.1e} from the same alone"

    def test_tuple_and_dict_outputs_are_equal(self) -> None:
        pipe = self.pipeline()
        seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
        output = pipe(**self.get_dummy_inputs(), generator=seeded[0])
        values = pipe(**self.get_dummy_inputs(), generator=seeded[1], return_dict=False)
        assert isinstance(values, tuple), f"return_dict=False gave {type(values).__name__}"
        assert torch.equal(output[0], values[0]), "the tuple has another picture"

    def test_components_build_the_same_pipeline(self) -> None:
        pipe = self.pipeline()
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        assert set(pipe.components) <= set(parameters), "components holds what the constructor does not take"
        twin = self.pipeline_class(**pipe.components, **self.init_kwargs)
        twin.set_progress_bar_config(disable=True)
        other = [name for name, part in pipe.components.items() if twin.components[name] is not part]
        assert not other, f"{other} are not the parts that the pipeline was built from"
        assert torch.equal(self.call(twin), self.call(pipe)), "a pipeline of the same components paints otherwise"

    def test_half_precision_gives_finite_results(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            output = attempt(f"a call in {dtype}", self.call, self.pipeline().to(dtype))
            assert torch.isfinite(output).all(), f"values that are not finite in {dtype}"

    def test_half_precision_survives_saving(self, tmp_path: Path) -> None:
        pipe = self.pipeline().to(torch.bfloat16)
        pipe.save_pretrained(tmp_path)
        loaded = self.load(tmp_path, dtype=torch.bfloat16)
        for name, module in self.modules(loaded).items():
            assert module.dtype == torch.bfloat16, f"{name} came back as {module.dtype}"
        assert torch.equal(self.call(loaded), self.call(pipe)), "a reloaded half-precision pipeline paints otherwise"

    def test_optional_components_may_be_left_out(self, tmp_path: Path) -> None:
        if not self.pipeline_class._optional_components:
            pytest.skip("the pipeline has no optional components")
        pipe = self.pipeline()
        for name in pipe._optional_components:
            setattr(pipe, name, None)
        pipe.save_pretrained(tmp_path)
        loaded = attempt("from_pretrained", self.load, tmp_path)
        left = [name for name in pipe._optional_components if getattr(loaded, name) is not None]
        assert not left, f"{left} came back although they were None"
        assert torch.equal(self.call(loaded), self.call(pipe)), "without optional components it paints otherwise"

    def test_it_moves_to_an_accelerator_and_back(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        pipe = self.pipeline()
        expected = self.call(pipe)
        for device in ("cuda", "cpu"):
            pipe.to(device)
            found = {module.device.type for module in self.modules(pipe).values()}
            assert found == {device}, f"moved to {device}, found on {sorted(found)}"
            error = (self.call(pipe).cpu() - expected).abs().max().item()
            assert error < 1e-2, f"the picture made on {device} differs by {error:.1e}"
        pipe.enable_model_cpu_offload()
        error = (self.call(pipe).cpu() - expected).abs().max().item()
        assert error < 1e-2, f"the picture made with offloading differs by {error:.1e}"

    def test_it_changes_precision_with_to(self) -> None:
        pipe = self.pipeline()
        for dtype in (torch.float32, torch.float16):
            pipe.to(dtype=dtype)
            found = {name: module.dtype for name, module in self.modules(pipe).items()}
            assert set(found.values()) == {dtype}, f"after .to(dtype={dtype}) the components are {found}"

    def test_several_images_per_prompt(self) -> None:
        pipe = self.pipeline()
        for size, images in ((1, 1), (1, 2), (2, 2)):
            output = self.call(pipe, num_images_per_prompt=images, **self.joined(self.batch(size)))
            assert len(output) == size * images, f"{size} prompts with {images} images each gave {len(output)}"

    def test_guidance_scale_takes_effect(self) -> None:
        pipe = self.pipeline()
        without, strong = (self.call(pipe, guidance_scale=scale) for scale in (1.0, 7.5))
        assert without.shape == strong.shape, f"guidance changes the shape to {tuple(strong.shape)}"
        assert not torch.equal(without, strong), "guidance_scale=7.5 gives the picture of 1.0"

    def test_a_callback_sees_and_replaces_the_tensors(self) -> None:
        pipe, seen = self.pipeline(), []
        names = list(pipe._callback_tensor_inputs)

        def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, sorted(tensors)))
            return tensors

        def erase_at_the_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == pipe.num_timesteps - 1:
                tensors["latents"] = torch.zeros_like(tensors["latents"])
            return tensors

        plain = self.call(pipe, output_type="latent")
        for wanted in (["latents"], names):
            seen.clear()
            watched = self.call(
                pipe, output_type="latent", callback_on_step_end=look, callback_on_step_end_tensor_inputs=wanted
            )
            expected = [(step, sorted(wanted)) for step in range(pipe.num_timesteps)]
            assert seen == expected, f"the callback saw {seen}"
            assert torch.equal(watched, plain), "a callback that only looks changes the result"
        erased = self.call(
            pipe, output_type="latent", callback_on_step_end=erase_at_the_end, callback_on_step_end_tensor_inputs=names
        )
        assert not erased.any(), "latents that the callback replaces are not used"

    def test_a_callback_can_change_the_guidance_scale(self) -> None:
        pipe = self.pipeline()

        def increase(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale += 1.0
            return tensors

        changed = self.call(pipe, guidance_scale=2.0, callback_on_step_end=increase)
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps, f"guidance_scale ended at {pipe.guidance_scale}"
        assert not torch.equal(changed, self.call(pipe, guidance_scale=2.0)), "a changed guidance scale has no effect"

    def test_variants_are_saved_under_their_name(self, tmp_path: Path) -> None:
        pipe = self.pipeline()
        pipe.save_pretrained(tmp_path, variant=VARIANT)
        for name in self.modules(pipe):
            files = [file.name for file in (tmp_path / name).glob("*.safetensors")]
            assert files and all(f".{VARIANT}." in file for file in files), f"{name} was saved as {files}"

    def test_variants_load_with_equal_weights(self, tmp_path: Path) -> None:
        pipe = self.pipeline()
        pipe.save_pretrained(tmp_path, variant=VARIANT)
        loaded = self.modules(self.load(tmp_path, variant=VARIANT))
        for name, module in self.modules(pipe).items():
            weights = dict(loaded[name].named_parameters())
            assert set(weights) == set(dict(module.named_parameters())), f"{name} has other weights"
            for key, weight in module.named_parameters():
                assert torch.equal(weights[key], weight), f"{key} of {name} differs"

    def test_a_missing_variant_is_an_error(self, tmp_path: Path) -> None:
        self.pipeline().save_pretrained(tmp_path)
        try:
            self.load(tmp_path, variant=VARIANT)
        except (ValueError, OSError) as error:
            assert VARIANT in str(error), f"the message does not name the variant: {error}"
        else:
            raise AssertionError(f"variant={VARIANT!r} was accepted, though there is none")

    def test_prompts_can_be_encoded_without_the_other_components(self) -> None:
        components = self.get_dummy_components()
        text = {name: part if "text" in name or "token" in name else None for name, part in components.items()}
        encoder = attempt("a pipeline of the text parts alone", self.pipeline, **text)
        prompt = self.get_dummy_inputs()["prompt"]
        with torch.no_grad():
            embeds, negative = attempt("encode_prompt", encoder.encode_prompt, prompt, **self.encode_prompt_kwargs)
        pipe = self.pipeline()
        given = self.call(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
        torch.testing.assert_close(given, self.call(pipe), msg="embeddings made in isolation paint another picture")

    def test_precision_may_differ_between_components(self, tmp_path: Path) -> None:
        pipe = self.pipeline()
        pipe.save_pretrained(tmp_path)
        first, *others = self.modules(pipe)
        loaded = self.modules(self.load(tmp_path, dtype={first: torch.bfloat16, "default": torch.float16}))
        found = {name: module.dtype for name, module in loaded.items()}
        wanted = {first: torch.bfloat16, **dict.fromkeys(others, torch.float16)}
        assert found == wanted, f"asked for {wanted}, loaded {found}"

    # -- seven that users need -------------------------------------------------------------------------------------

    def test_a_misspelt_argument_is_an_error(self) -> None:
        try:
            self.call(self.pipeline(), guidence_scale=3.0)
        except TypeError as error:
            assert "guidence_scale" in str(error), f"the message does not name the argument: {error}"
        else:
            raise AssertionError("guidence_scale=3.0 was accepted without effect")

    def test_output_types_show_the_same_picture(self) -> None:
        pipe = self.pipeline()
        tensor, array, pictures, latents = (
            self.call(pipe, output_type=output_type) for output_type in ("pt", "np", "pil", "latent")
        )
        np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).float().numpy(), atol=1e-6)
        bytes_ = np.stack([np.asarray(picture) for picture in pictures])
        np.testing.assert_allclose(bytes_ / 255, array, atol=0.5 / 255 + 1e-6)
        assert latents.shape[0] == len(tensor) and latents.shape[1] != 3, f"latents of shape {tuple(latents.shape)}"

    def test_a_call_leaves_the_components_as_they_were(self) -> None:
        pipe = self.pipeline()
        before = self.state(pipe)
        self.call(pipe)
        self.assert_state(pipe, before, "a call")

    def test_a_failed_call_leaves_the_pipeline_usable(self) -> None:
        pipe = self.pipeline()
        expected, before = self.call(pipe), self.state(pipe)

        def fail(*_: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.call(pipe, callback_on_step_end=fail)
        self.assert_state(pipe, before, "an interrupted call")
        assert torch.equal(self.call(pipe), expected), "after an interrupted call the same arguments paint otherwise"

    def test_equal_seeds_give_equal_pictures(self) -> None:
        pipe = self.pipeline()
        expected = self.call(pipe)
        assert torch.equal(self.call(pipe), expected), "a second call with the same seed differs"
        assert torch.equal(self.call(copy.deepcopy(pipe)), expected), "a copy of the pipeline differs"
        assert torch.equal(self.call(self.pipeline()), expected), "a pipeline of equal components differs"

    def test_a_generator_list_of_wrong_length_is_refused(self) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        try:
            self.call(self.pipeline(), generator=generators)
        except ValueError as error:
            assert "generator" in str(error) and "3" in str(error), f"the message names neither: {error}"
        else:
            raise AssertionError("three generators for one picture were accepted")

    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        assert_reloads_equal(self.pipeline(), tmp_path, self.get_dummy_inputs(), imports=self.fresh_imports)

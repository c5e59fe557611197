"""`invert()` for pipelines with the components of a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`."""

from typing import Any

import torch

from ..guidance import GuidedStep, part_of_condition
from ..inversion import ALIGNMENTS, DDIMLadder, InversionOutput, ddim_inversion_states
from .editing import EditingMixin, PipelineImage
from .inputs import check_finite, check_kwargs, check_size, checked_choice, checked_prompts, images_to_tensor, spread
from .one_at_a_time import one_at_a_time


INVERSION_METHODS = ("ddim", "negative_prompt")


class DDIMInversionMixin(EditingMixin):
    """Inverts pictures by DDIM; put it before the pipeline class that has the components."""

    @one_at_a_time("unet")
    @torch.no_grad()
    def invert(
        self,
        image: PipelineImage,
        source_prompt: str | list[str],
        num_inference_steps: int = 50,
        alignment: str = "matched",
        height: int | None = None,
        width: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        method: str = "ddim",
        timesteps: list[int] | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
    ) -> InversionOutput:
        """Inverts pictures by DDIM with their own prompts, without classifier-free guidance.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                The picture or pictures, as in the call.
            source_prompt (`str` or `list[str]`):
                What they show; one for all or one each.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps, those that the edit will have.
            alignment (`str`, *optional*, defaults to `"matched"`):
                `"matched"` or `"official"`, as in the call.
            height (`int`, *optional*): Scale the picture to this height in pixels. Defaults to its own.
            width (`int`, *optional*): Scale the picture to this width in pixels. Defaults to its own.
            cross_attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is that of LoRA.
            method (`str`, *optional*, defaults to `"ddim"`):
                `"ddim"`, or `"negative_prompt"`: the same latents, and calls that use them point away from the source prompt
                instead of from `""` unless they say otherwise (negative-prompt inversion, 2023, arXiv 2305.16807). The
                source prompt alone is then reproduced at any guidance scale as it is at 1.
            timesteps (`list[int]`, *optional*):
                Descending timesteps instead of evenly spaced ones, as few-step models are trained for;
                `num_inference_steps` has no effect then.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                With an IP-Adapter but no image encoder: one tensor `(2, 1, width)` for each adapter, of which the first half
                stands for no picture prompt.

        Returns:
            [`InversionOutput`]: For the `inversion` argument of any number of calls; it can be saved.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If `image` is not a picture.
        """
        checked_choice(alignment, "alignment", ALIGNMENTS)
        checked_choice(method, "method", INVERSION_METHODS)
        self._check_model()
        check_size(height, width)
        check_kwargs(cross_attention_kwargs)
        ladder = self._ladder(num_inference_steps, timesteps)
        prompts = checked_prompts(source_prompt, "source_prompt")
        pixels = images_to_tensor(image, height, width)
        output = self._invert(
            pixels,
            prompts,
            ladder,
            alignment,
            cross_attention_kwargs,
            method,
            image_prompt=(None, ip_adapter_image_embeds),
        )
        self.maybe_free_model_hooks()
        return output

    def _invert(
        self,
        pixels: torch.Tensor,
        prompts: list[str],
        ladder: DDIMLadder,
        alignment: str,
        cross_attention_kwargs: dict[str, Any] | None,
        method: str = "ddim",
        samples_per_pass: int | None = 1,
        image_prompt: tuple[Any, Any] = (None, None),
    ) -> InversionOutput:
        prompts = spread(prompts, len(pixels), "source_prompt", "pictures")
        device, dtype = self._execution_device, self.unet.dtype
        image_size = list(pixels.shape[-2:])
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        _, image_embeds = self._image_prompts(*image_prompt, len(prompts))
        start = self._encode(pixels).to(dtype)
        check_finite(start, "the encoded picture", self.vae.dtype)
        condition = self._condition(prompts, image_size, lora_scale, image_embeds)
        step = GuidedStep(self.unet, [], unet_kwargs={"cross_attention_kwargs": cross_attention_kwargs})
        together = samples_per_pass or len(prompts)
        parts = [slice(first, first + together) for first in range(0, len(prompts), together)]

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            found = []
            for rows in parts:
                found.append(step.predict(latents[rows], timestep.to(device), part_of_condition(condition, rows)))
            return torch.cat(found)

        states: list[torch.Tensor] = []
        with self.progress_bar(total=len(ladder)) as progress_bar:
            for state in ddim_inversion_states(predict, start, ladder, alignment):
                check_finite(state, f"the latents after {len(states)} steps of the inversion", dtype)
                if states:
                    progress_bar.update()
                states.append(state)
        return InversionOutput(
            latents=torch.stack(states),
            timesteps=ladder.timesteps.flip(0),
            prompt=prompts,
            config=self._inversion_config(ladder, alignment, image_size, method),
            network_evaluations=len(ladder) * len(prompts),
        )

"""`invert()` for pipelines with the components of a `StableDiffusionPipeline`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from ..guidance import GuidedStep
from ..inversion import ALIGNMENTS, DDIMLadder, InversionOutput, ddim_inversion_states, model_fingerprint
from .inputs import (
    check_finite,
    check_kwargs,
    check_size,
    check_text_to_image,
    checked_choice,
    checked_prompts,
    checked_steps,
    images_to_tensor,
    pad_to_multiple,
    spread,
)


PipelineImage = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)


class DDIMInversionMixin:
    """Inverts pictures by DDIM; put it before the pipeline class that has the components."""

    # Given by the pipeline class.
    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    vae_scale_factor: int
    _execution_device: torch.device
    encode_prompt: Any
    progress_bar: Any
    maybe_free_model_hooks: Any

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

        Returns:
            [`InversionOutput`]: For the `inversion` argument of any number of calls; it can be saved.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If `image` is not a picture.
        """
        steps = checked_steps(num_inference_steps)
        checked_choice(alignment, "alignment", ALIGNMENTS)
        self._check_model()
        check_size(height, width)
        check_kwargs(cross_attention_kwargs)
        ladder = DDIMLadder.from_scheduler_config(self.scheduler.config, steps)
        prompts = checked_prompts(source_prompt, "source_prompt")
        pixels = images_to_tensor(image, height, width)
        output = self._invert(pixels, prompts, ladder, alignment, cross_attention_kwargs)
        self.maybe_free_model_hooks()
        return output

    def _check_model(self) -> None:
        for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
            if getattr(self, name, None) is None:
                raise ValueError(f"this pipeline has no {name}; load it with all its components")
        check_text_to_image(self.unet, self.vae)
        if getattr(self.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
            raise ValueError("an IP-Adapter is loaded, but there is no picture prompt here; call unload_ip_adapter()")

    def _inversion_config(self, ladder: DDIMLadder, alignment: str, image_size: Sequence[int]) -> dict[str, Any]:
        return {
            "method": "ddim",
            "alignment": alignment,
            "num_inference_steps": len(ladder),
            "image_size": list(image_size),
            "scheduler": ladder.config,
            "model": model_fingerprint({"vae": self.vae, "text_encoder": self.text_encoder, "unet": self.unet}),
        }

    def _invert(
        self,
        pixels: torch.Tensor,
        prompts: list[str],
        ladder: DDIMLadder,
        alignment: str,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> InversionOutput:
        prompts = spread(prompts, len(pixels), "source_prompt", "pictures")
        device, dtype = self._execution_device, self.unet.dtype
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        padded = pad_to_multiple(pixels, multiple).to(device, self.vae.dtype)
        encoded = retrieve_latents(self.vae.encode(padded), sample_mode="argmax")
        start = (encoded * self.vae.config.scaling_factor).to(dtype)
        check_finite(start, "the encoded picture", self.vae.dtype)
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        embeds, _ = self.encode_prompt(prompts, device, 1, False, lora_scale=lora_scale)
        step = GuidedStep(self.unet, [], unet_kwargs={"cross_attention_kwargs": cross_attention_kwargs})
        states: list[torch.Tensor] = []
        with self.progress_bar(total=len(ladder)) as progress_bar:
            walk = ddim_inversion_states(lambda z, t: step.predict(z, t.to(device), embeds), start, ladder, alignment)
            for state in walk:
                check_finite(state, f"the latents after {len(states)} steps of the inversion", dtype)
                if states:
                    progress_bar.update()
                states.append(state)
        return InversionOutput(
            latents=torch.stack(states),
            timesteps=ladder.timesteps.flip(0),
            prompt=prompts,
            config=self._inversion_config(ladder, alignment, pixels.shape[-2:]),
            network_evaluations=len(ladder) * len(prompts),
        )

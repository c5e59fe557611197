"""The pictures of a benchmark of edits, and every editing method on one set of weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from ledits_batches import make_ledits

from diffusers_ext import GuideAndRescalePipeline, InversionOutput, NullTextInversionPipeline


GUIDANCE_SCALE = 3.5  # of every method, where it is not the knob


@dataclass
class Batch:
    """Pictures to edit.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        source: What they show, n captions.
        target: What they shall show, n captions.
        seeds: Of each picture's noise, so that no result depends on what else is in the batch.
        truth: The true edited pictures, where they are known.
        inversions: Filled by the first method that inverts, and used by the others.
    """

    images: torch.Tensor
    source: list[str]
    target: list[str]
    seeds: list[int]
    truth: torch.Tensor | None = None
    inversions: dict[str, InversionOutput] = field(default_factory=dict)

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


class Editors:
    """Every method on one set of weights.

    Args:
        model: Folder or Hub id of a Stable Diffusion 1.x or 2.x model.
        steps: Of the inversion and of the sampling.
        device: Where it runs.
    """

    def __init__(self, model: str | Path, steps: int, device: str = "cpu"):
        self.steps = steps
        self.guide = GuideAndRescalePipeline.from_pretrained(model, dtype=torch.float32).to(device)
        parts = dict(self.guide.components)
        parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
        self.redraw = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        self.words = NullTextInversionPipeline(**parts, requires_safety_checker=False)
        self.ledits = make_ledits(parts)
        for pipe in (self.guide, self.redraw, self.words):
            pipe.set_progress_bar_config(disable=True)
        self.forward_passes = self.backward_passes = 0
        self.guide.unet.register_forward_pre_hook(self._count)

    def _count(self, unet: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.forward_passes += len(given[0])

    def reconstruction(self, batch: Batch) -> torch.Tensor:
        return self._through_autoencoder(batch.images)

    def truth(self, batch: Batch) -> torch.Tensor:
        assert batch.truth is not None
        return self._through_autoencoder(batch.truth)

    def _through_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.guide.vae
        latents = vae.encode(images.to(vae.device)).latent_dist.mode()
        return vae.decode(latents).sample.clamp(-1.0, 1.0).cpu()

    def inverted(
        self, batch: Batch, method: str = "ddim", guidance_scale: float = 1.0, settings: Mapping[str, Any] = {}
    ) -> InversionOutput:
        """The inversion of a batch, made once for all methods that have it in common."""
        if method in ("ddim", "direct"):
            if "ddim" not in batch.inversions:
                batch.inversions["ddim"] = self.guide.invert(
                    _from_unit(batch.images), batch.source, num_inference_steps=self.steps
                )
            ddim = batch.inversions["ddim"]
            # Direct inversion is that trajectory, kept to while editing.
            return ddim if method == "ddim" else replace(ddim, config={**ddim.config, "method": "direct"})
        scale = guidance_scale if method == "null_text" else None
        key = f"{method} {scale} {sorted(settings.items())}"
        if key not in batch.inversions:
            batch.inversions[key] = self.words.invert(
                _from_unit(batch.images), batch.source, method, num_inference_steps=self.steps, guidance_scale=scale,
                settings=settings, generator=batch.generators() if method == "edit_friendly" else None,
            )  # fmt: skip
            self.backward_passes += batch.inversions[key].backward_passes
        return batch.inversions[key]

    def guided(self, batch: Batch, guidance_scale: float = GUIDANCE_SCALE, **settings: Any) -> torch.Tensor:
        """Guide-and-Rescale; with `guiders=[]` plain DDIM inversion and sampling."""
        edited = self.guide(
            inversion=self.inverted(batch), prompt=batch.target, num_inference_steps=self.steps,
            guidance_scale=guidance_scale, samples_per_pass=None, output_type="pt", **settings,
        )  # fmt: skip
        self.backward_passes += edited.backward_passes
        return edited.images.cpu() * 2.0 - 1.0

    def sdedit(self, batch: Batch, strength: float, guidance_scale: float = GUIDANCE_SCALE) -> torch.Tensor:
        edited = self.redraw(
            batch.target, image=_from_unit(batch.images), strength=strength, num_inference_steps=self.steps,
            guidance_scale=guidance_scale, generator=batch.generators(), output_type="pt",
        )  # fmt: skip
        return edited.images.cpu() * 2.0 - 1.0

    def ledits_pp(self, batch: Batch, edit_guidance_scale: float, threshold: float) -> torch.Tensor:
        """Inversion without words and the target caption as the one concept, as its documentation shows."""
        pipe, unet = self.ledits, self.ledits.unet
        installed = dict(unet.attn_processors)
        try:
            pipe.invert(
                _from_unit(batch.images), source_prompt="", num_inversion_steps=self.steps,
                generator=batch.generators(),
            )  # fmt: skip
            pipe.words = {"target": batch.target}
            edited = pipe(
                editing_prompt=["target"], edit_guidance_scale=edit_guidance_scale, edit_threshold=threshold,
                output_type="pt",
            )  # fmt: skip
        finally:
            unet.set_attn_processor(installed)
        return edited.images.cpu() * 2.0 - 1.0


def _from_unit(images: torch.Tensor) -> torch.Tensor:
    return (images + 1.0) / 2.0

"""The editing methods that `editing.py` compares, and every setting of each: fixed here before a test pair is drawn.

All walk 30 steps of the same model, and get the same pictures and captions. A method's *knob* trades the edit against
the rest of the picture; its main setting makes the table, the others the curve. Where the authors name no setting for
pictures of 64 pixels (LEDITS++), it was chosen among several on other pairs (seed 10 000), to the peer's advantage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from ledits_batches import make_ledits
from word_methods import WORD_METHODS, WORD_PEERS, WORD_SETTINGS

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


Run = Callable[[Editors, Batch], torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """One row: a method with its knob at one value.

    Args:
        method: One of `METHODS`, or a row that edits nothing.
        knob: What is set.
        main: Whether it is measured on every task.
        run: Edits a batch.
        pairs: How many pairs of a task it is measured on, None for all.
    """

    method: str
    knob: str
    main: bool
    run: Run = field(compare=False)
    pairs: int | None = None

    @property
    def name(self) -> str:
        few = "" if self.pairs is None else f"first {self.pairs} pairs"
        return ", ".join(part for part in (self.method, self.knob, few) if part)


def _from_unit(images: torch.Tensor) -> torch.Tensor:
    return (images + 1.0) / 2.0


NO_EDIT, UPPER_LIMIT = "No edit", "Truth through the autoencoder"
SDEDIT, DDIM, LEDITS, GUIDE = "SDEdit", "DDIM inversion + CFG", "LEDITS++", "Guide-and-Rescale"
METHODS = (SDEDIT, DDIM, LEDITS, GUIDE, *WORD_METHODS)
PEERS = (SDEDIT, DDIM, LEDITS, *WORD_PEERS)
OURS = tuple(method for method in METHODS if method not in PEERS)


def _guided(guidance_scale: float = GUIDANCE_SCALE, **settings: Any) -> Run:
    return lambda editors, batch: editors.guided(batch, guidance_scale, **settings)


def _redrawn(strength: float, guidance_scale: float = GUIDANCE_SCALE) -> Run:
    return lambda editors, batch: editors.sdedit(batch, strength, guidance_scale)


def _masked(edit_guidance_scale: float, threshold: float) -> Run:
    return lambda editors, batch: editors.ledits_pp(batch, edit_guidance_scale, threshold)


def _settings() -> list[Setting]:
    rows = [
        Setting(NO_EDIT, "", True, Editors.reconstruction),
        Setting(UPPER_LIMIT, "", True, Editors.truth),
    ]
    for scale in (1.0, 1.5, 2.0, 3.5, 5.0, 7.5):
        rows.append(Setting(DDIM, f"scale {scale}", scale == GUIDANCE_SCALE, _guided(scale, guiders=[])))
    for strength in (0.3, 0.45, 0.6, 0.75, 0.9):
        rows.append(Setting(SDEDIT, f"strength {strength}", strength == 0.75, _redrawn(strength)))
    for scale, threshold in ((2.0, 0.2), (3.0, 0.2), (5.0, 0.2), (3.0, 0.4), (3.0, 0.6)):
        knob = f"edit scale {scale}, threshold {threshold}"
        rows.append(Setting(LEDITS, knob, (scale, threshold) == (3.0, 0.2), _masked(scale, threshold)))
    for scale in (2.0, 3.5, 5.0):
        rows.append(Setting(GUIDE, f"scale {scale}", scale == GUIDANCE_SCALE, _guided(scale)))
    rows += [
        Setting(GUIDE, "guided .3 of the steps", False, _guided(guidance_end=0.3)),
        Setting(GUIDE, "guided .8 of the steps", False, _guided(guidance_end=0.8)),
        Setting(GUIDE, "upper bound 1", False, _guided(rescale_range=(0.33, 1.0))),
        Setting(GUIDE, "scale 2.0, guided .8 of the steps", False, _guided(2.0, guidance_end=0.8)),
    ]
    rows += [Setting(row.method, row.knob, row.main, row.edit, row.pairs) for row in WORD_SETTINGS]
    return rows


SETTINGS = _settings()
# What each method's authors or documentation name, for pictures and models of the usual size.
DOCUMENTED = (
    Setting(DDIM, "scale 7.5", True, _guided(7.5, guiders=[])),
    Setting(SDEDIT, "strength 0.75", True, _redrawn(0.75, 7.5)),
    Setting(LEDITS, "edit scale 5, threshold 0.9", True, _masked(5.0, 0.9)),
    Setting(GUIDE, "scale 7.5", True, _guided(7.5)),
)

"""LEDITS++ of diffusers, for batches in which every picture has its own words, and for networks smaller than SD's.

LEDITS++: Limitless Image Editing using Text-to-Image Models, 2023, arXiv 2311.16711. The sampling, the inversion and
the masks are those of `diffusers.LEditsPPPipelineStableDiffusion`, whose loop runs unchanged. Three things keep that
class from being measured here, and each is cured in a method it calls:

* one list of concepts serves all pictures of a batch. Here a concept is a key, and each picture has its own words for
  it.
* the cross-attention mask reads maps whose side is a quarter of the latents'. The demo model has maps of the whole
  and the half side only, and `torch.cat(): expected a non-empty list of Tensors` is what stock says. Here the
  coarsest maps that the down and up blocks have are averaged to that side; with Stable Diffusion these are the maps
  that stock reads.
* its tokens are counted after padding by the tokenizers of transformers 5, so that padding counts as words, and its
  maps of a batch are split between the wrong pictures. Here each picture's own words are read.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion


class WordMaps:
    """Where each picture's words are looked at: takes the place of the attention store for one call."""

    def __init__(self, pictures: int, words: torch.Tensor):
        self.pictures = pictures
        self.words = words  # (concepts, pictures): how many tokens
        self.average = False
        self.step_store: list[torch.Tensor] = []

    def __call__(
        self, attn: torch.Tensor, is_cross: bool, place_in_unet: str, editing_prompts: int, PnP: bool
    ) -> None:
        # (1 + concepts, pictures, heads, positions, tokens); the first has no words
        maps = attn.unflatten(0, (1 + editing_prompts, self.pictures, -1))
        self.step_store.append(maps[1:].mean(2))

    def between_steps(self, store_step: bool = True) -> None:
        self.step_store = []

    def aggregate_attention(
        self,
        attention_maps: list[torch.Tensor],
        prompts: Any,
        res: Sequence[int],
        from_where: Any,
        is_cross: bool,
        select: int,
    ) -> torch.Tensor:
        """(pictures, *res, tokens), tokens behind a picture's last word 0."""
        coarsest = min(maps.shape[-2] for maps in attention_maps)
        maps = torch.stack([maps[select] for maps in attention_maps if maps.shape[-2] == coarsest]).mean(0)
        side = round((coarsest * res[1] / res[0]) ** 0.5)
        maps = maps.transpose(1, 2).unflatten(2, (coarsest // side, side))
        maps = F.adaptive_avg_pool2d(maps, tuple(res)).permute(0, 2, 3, 1)
        inside = torch.arange(maps.shape[-1], device=maps.device) <= self.words[select].to(maps.device)[:, None]
        return maps * inside[:, None, None]


class LEditsBatches(LEditsPPPipelineStableDiffusion):
    """`words` holds, for every concept of a call, one text for each picture; the call's `editing_prompt` lists the
    concepts."""

    words: dict[str, list[str]]

    def encode_prompt(self, device: Any, num_images_per_prompt: int, enable_edit_guidance: bool, **given: Any) -> Any:
        concepts = given.get("editing_prompt")
        if not enable_edit_guidance or not isinstance(concepts, list):
            return super().encode_prompt(device, num_images_per_prompt, enable_edit_guidance, **given)
        texts = [text for concept in concepts for text in self.words[concept]]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        self._word_counts = (tokens.attention_mask.sum(1) - 2).view(len(concepts), -1)
        given["editing_prompt_embeds"] = self.text_encoder(tokens.input_ids.to(device))[0]
        edit, negative, _ = super().encode_prompt(device, num_images_per_prompt, enable_edit_guidance, **given)
        return edit, negative, self._word_counts.amax(1)

    def prepare_unet(self, attention_store: Any, PnP: bool = False) -> None:
        self.attention_store = WordMaps(self.batch_size, self._word_counts)
        super().prepare_unet(self.attention_store, PnP)


def make_ledits(components: dict[str, Any]) -> LEditsBatches:
    """The pipeline with the scheduler that its authors use, from the parts of a Stable Diffusion pipeline."""
    scheduler = DPMSolverMultistepScheduler.from_config(
        components["scheduler"].config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    parts = {name: components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    pipe = LEditsBatches(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

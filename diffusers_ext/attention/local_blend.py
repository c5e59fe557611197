"""Local blend: an edit that stays where the named words are.

Prompt-to-Prompt, 2022, arXiv 2208.01626, section 4. After each step from a chosen one on, the latents of an edit are
put back to the source's wherever neither of the two prompts attends to the words that change:

    S     = sum over steps and layers of the attention to the words, after the edit
    m     = max-pooled(S), scaled to the latents and to a largest value of 1, above a threshold; or the source's own m
    z     = z where m else z_src

Words to subtract give a second mask, without the pooling, which is taken out of the first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .alignment import checked_prompts, text_length, word_indices
from .maps import above_in_either, keep_source_outside, map_sizes, soft_mask, word_attention
from .word_steps import checked_share, window_bounds


Words = str | Sequence[str | Sequence[str]]


class LocalBlend:
    """Keeps the source picture, bit for bit in the latents, outside of where words are.

    It is handed to a controller, which gives it the attention maps:
    `AttentionReplace(tokenizer, prompts, local_blend=LocalBlend(tokenizer, prompts, ["cat", "dog"]))`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompts (`list[str]`): The source's prompt, then the targets', as for the controller.
        words (`list`):
            For each prompt what changes in it: a word, several in a row (`"teddy bear"`), a list of such, or `[]` for
            nothing. A single str stands for the same word in each.
        subtract_words (`list`, *optional*): For each prompt what must not change although it is near, in the same form.
        start (`float`, *optional*, defaults to 0.2): Share of the steps after which blending begins.
        threshold (`float`, *optional*, defaults to 0.3):
            Share of the largest attention from which on a place belongs to the words. Higher keeps more of the source.
        subtract_threshold (`float`, *optional*, defaults to 0.3): The same for `subtract_words`.
        resolution (`float`, *optional*, defaults to 0.25):
            Which maps are read, by their side as a share of the latents'; the nearest that the network has. 0.25 are
            those of 16 x 16 in Stable Diffusion 1.x at 512 pixels. The middle block, whose maps are the least sharp,
            is left out.

    Attributes:
        mask (`torch.Tensor` of shape `(prompts, 1, height, width)`, *optional*):
            Where the last step let the edits differ; None before the first blend.

    Raises:
        ValueError: If an argument is wrong, or a word is not in its prompt.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext import AttentionReplace, LocalBlend

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        prompts = ["a red star on a blue background", "a red heart on a blue background"]
        blend = LocalBlend(tokenizer, prompts, ["star", "heart"], subtract_words=["background", "background"])
        controller = AttentionReplace(tokenizer, prompts, local_blend=blend)
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        words: Words,
        subtract_words: Words | None = None,
        start: float = 0.2,
        threshold: float = 0.3,
        subtract_threshold: float = 0.3,
        resolution: float = 0.25,
    ) -> None:
        self.prompts = checked_prompts(prompts)
        self.start = checked_share(start, "start")
        self.threshold = checked_share(threshold, "threshold")
        self.subtract_threshold = checked_share(subtract_threshold, "subtract_threshold")
        self.resolution = checked_share(resolution, "resolution")
        if not self.resolution:
            raise ValueError(
                "resolution=0 names no maps; give the side of the maps as a share of the latents', such as 0.25"
            )
        self._words = _chosen(tokenizer, self.prompts, words, "words")
        self._subtracted = (
            None if subtract_words is None else _chosen(tokenizer, self.prompts, subtract_words, "subtract_words")
        )
        self.mask: torch.Tensor | None = None
        self._sizes: list[tuple[int, int]] = []
        self._start = 0
        self._of_step: dict[str, tuple[int, torch.Tensor]] = {}
        self._sums: dict[int, torch.Tensor] = {}

    def begin(self, latents_size: tuple[int, int], num_steps: int) -> None:
        """Forgets the last run. Called by the controller.

        Args:
            latents_size (`tuple[int, int]`): Height and width of the latents.
            num_steps (`int`): Sampling steps.
        """
        self._sizes = map_sizes(*latents_size)
        self._start = window_bounds((self.start, 1.0), num_steps)[0]
        self.mask = None
        self._of_step, self._sums = {}, {}

    def read(self, name: str, halvings: int, maps: torch.Tensor) -> None:
        """Reads a layer's maps of this step. Called by the controller; a second call for a layer replaces the first.

        Args:
            name (`str`): The layer.
            halvings (`int`): How often its size is halved from the latents'.
            maps (`torch.Tensor` of shape `(prompts, heads, positions, L)`): After the edit.
        """
        if name.startswith("mid_block"):
            return
        with torch.no_grad():
            sets = [self._words] if self._subtracted is None else [self._words, self._subtracted]
            self._of_step[name] = (halvings, torch.stack([word_attention(maps.detach(), words) for words in sets]))

    def __call__(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Ends a step.

        Args:
            step (`int`): The step, from 0.
            latents (`torch.Tensor` of shape `(prompts, channels, height, width)`): Latents after it.

        Returns:
            `torch.Tensor`: Those of the edits put back to the source's outside the mask.

        Raises:
            ValueError: If the network did not run since the last step.
        """
        if not self._of_step:
            raise ValueError(
                "local_blend saw no attention map in this step; run the UNet inside `controller.attach(...)`"
            )
        by_size: dict[int, list[torch.Tensor]] = {}
        for halvings, attention in self._of_step.values():
            by_size.setdefault(halvings, []).append(attention)
        for halvings, layers in by_size.items():
            mean = torch.stack(layers).mean(0)
            self._sums[halvings] = self._sums[halvings] + mean if halvings in self._sums else mean
        self._of_step = {}
        if step < self._start:
            return latents
        wanted = -torch.log2(torch.tensor(self.resolution)).item()
        halvings = min(self._sums, key=lambda present: (abs(present - wanted), -present))
        pictures = self._sums[halvings].unflatten(-1, self._sizes[halvings])
        size = self._sizes[0]
        mask = above_in_either(soft_mask(pictures[0], size, widen=True), self.threshold)
        if self._subtracted is not None:
            mask &= ~above_in_either(soft_mask(pictures[1], size, widen=False), self.subtract_threshold)
        self.mask = mask.to(latents.device)
        return keep_source_outside(latents, self.mask)


def _chosen(tokenizer: PreTrainedTokenizerBase, prompts: list[str], words: Any, name: str) -> torch.Tensor:
    """Which tokens of each prompt are those of its words, `(prompts, L)`."""
    by_prompt = [words] * len(prompts) if isinstance(words, str) else words
    if not isinstance(by_prompt, (list, tuple)):
        raise ValueError(f"{name}={words!r} is not a word, or a list of a word or words for each prompt")
    if len(by_prompt) != len(prompts):
        raise ValueError(
            f"{name} has {len(by_prompt)} entries for {len(prompts)} prompts; give one each, [] for no word"
        )
    chosen = torch.zeros(len(prompts), text_length(tokenizer))
    for number, (prompt, entry) in enumerate(zip(prompts, by_prompt, strict=True)):
        items = [entry] if isinstance(entry, str) else entry
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name}[{number}]={entry!r} is not a word or a list of words")
        for item in items:
            chosen[number, word_indices(tokenizer, prompt, item)] = 1
    if not chosen.any():
        raise ValueError(f"{name}={words!r} names no word; give what changes in each prompt, or leave it out")
    return chosen

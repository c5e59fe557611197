"""Prompt-to-Prompt: edits a picture by the words that made it.

Prompt-to-Prompt Image Editing with Cross Attention Control, 2022, arXiv 2208.01626. Source and edits are sampled
together, from the same noise, each with its prompt. Which place attends to which word decides the layout; so in a
window of the steps each edit takes over the source's maps:

    cross-attention   A <- f(A_src, A)   f is a word swap, a refinement or a reweighting, see `maps.py`
    self-attention    A <- A_src         in layers up to a size

Whoever samples follows this protocol. The batch of the UNet is [source, target, ...], or twice that with the
unconditional half first:

    with controller.attach(unet, latents.shape, num_steps):
        for i, t in enumerate(timesteps):
            ...                                      # any number of passes, then a step
            latents = controller.after_step(i, latents)

In the pipelines of diffusers the last line is `callback_on_step_end=controller.callback_on_step_end`. A pass of the
unconditional half alone belongs in `with controller.paused():`. Steps are counted by `after_step` only, and what is
kept of a layer is kept under its name: a layer that runs twice, as under gradient checkpointing, or not at all,
changes nothing.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .alignment import Alignment, checked_prompts, prompt_words, refinement_mapper, replacement_mapper, text_length
from .attached_edit import AttachedEdit
from .edit_run import EditRun
from .local_blend import LocalBlend
from .maps import refine_words, replace_words, reweight_words
from .word_steps import Share, checked_share, checked_window, equalizer, word_schedule


class AttentionController(AttachedEdit[EditRun]):
    """What the controllers share: windows, local blend and protocol. Derive from it to edit maps in another way.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer; either one of SDXL.
        prompts (`list[str]`): The source's prompt, then the targets'.
        cross_replace_steps (`float`, `tuple` or `dict`, *optional*, defaults to 0.8):
            Share of the steps with edited cross-attention, `(start, end)`, or one of both by word, with `"default_"`
            for all others. Less leaves the edit freer in its shape.
        self_replace_steps (`float` or `tuple`, *optional*, defaults to 0.5):
            Share of the steps with the source's self-attention, or `(start, end)`.
        local_blend ([`LocalBlend`], *optional*): Keeps the source outside of where words are.
        max_self_attention_resolution (`float`, *optional*, defaults to 0.5):
            Largest maps of self-attention that are replaced, by their side as a share of the latents': 0.5 is 32 x 32
            in Stable Diffusion 1.x at 512 pixels. Larger ones hold texture.

    Raises:
        TypeError: If `tokenizer` or `local_blend` is something else.
        ValueError: If another argument is wrong.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        cross_replace_steps: Share | Mapping[str, Share] = 0.8,
        self_replace_steps: Share = 0.5,
        local_blend: LocalBlend | None = None,
        max_self_attention_resolution: float = 0.5,
    ) -> None:
        self.text_length = text_length(tokenizer)
        self.tokenizer = tokenizer
        self.prompts = checked_prompts(prompts)
        for prompt in self.prompts:
            prompt_words(tokenizer, prompt)
        word_schedule(tokenizer, self.prompts, 1, cross_replace_steps)  # for its checks
        self.cross_replace_steps = cross_replace_steps
        self.self_replace_steps = checked_window(self_replace_steps, "self_replace_steps")
        if local_blend is not None and not isinstance(local_blend, LocalBlend):
            raise TypeError(f"local_blend={local_blend!r} is not a LocalBlend")
        if local_blend is not None and local_blend.prompts != self.prompts:
            raise ValueError(
                f"local_blend was made for the prompts {local_blend.prompts}, the controller for {self.prompts}"
            )
        self.local_blend = local_blend
        self.max_self_attention_resolution = checked_share(
            max_self_attention_resolution, "max_self_attention_resolution"
        )

    @abstractmethod
    def edit_cross_attention(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The edit f, without its window.

        Args:
            source (`torch.Tensor` of shape `(heads, positions, L)`): The source's map.
            own (`torch.Tensor` of shape `(targets, heads, positions, L)`): The targets' maps.

        Returns:
            `torch.Tensor` of shape `(targets, heads, positions, L)`: Edited maps of the targets.
        """

    def _begin(self, size: tuple[int, int], num_steps: int) -> EditRun:
        self._run = EditRun(self, size, num_steps)
        if self.local_blend is not None:
            self.local_blend.begin(size, num_steps)
        return self._run

    def _end_step(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        self._attached().step = step + 1
        return latents if self.local_blend is None else self.local_blend(step, latents)


class AttentionReplace(AttentionController):
    """Swaps words: each target has as many words as the source, and the new ones take the places of the old.

    Args:
        alignment (`str`, *optional*, defaults to `"matched"`):
            `"official"` repeats a fault of the authors' code, see [`replacement_mapper`].

    The other arguments are those of [`AttentionController`].

    Raises:
        ValueError: If an argument is wrong, or prompts differ in their number of words.

    Example:
        ```python
        import torch
        from diffusers import StableDiffusionPipeline
        from diffusers_ext import AttentionReplace

        pipe = StableDiffusionPipeline.from_pretrained("pipelines/emoji-scenes-64")
        prompts = ["a red star on a blue background", "a red heart on a blue background"]
        controller = AttentionReplace(pipe.tokenizer, prompts)
        latents = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
        with controller.attach(pipe.unet, latents.shape, num_inference_steps=4):
            pictures = pipe(prompts, latents=latents, num_inference_steps=4,
                            callback_on_step_end=controller.callback_on_step_end).images
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        cross_replace_steps: Share | Mapping[str, Share] = 0.8,
        self_replace_steps: Share = 0.5,
        local_blend: LocalBlend | None = None,
        max_self_attention_resolution: float = 0.5,
        alignment: Alignment = "matched",
    ) -> None:
        super().__init__(
            tokenizer, prompts, cross_replace_steps, self_replace_steps, local_blend, max_self_attention_resolution
        )
        source, *targets = self.prompts
        self.mapper = torch.stack([replacement_mapper(tokenizer, source, target, alignment) for target in targets])

    def edit_cross_attention(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return replace_words(source, self.mapper)


class AttentionRefine(AttentionController):
    """Adds or takes away words: tokens that both prompts have keep the source's maps, new ones have their own.

    The arguments are those of [`AttentionController`].

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext import AttentionRefine

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        controller = AttentionRefine(tokenizer, ["a red star", "a striped red star"], cross_replace_steps=0.6)
        assert controller.aligned[0, :6].tolist() == [True, True, False, True, True, True]
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        cross_replace_steps: Share | Mapping[str, Share] = 0.8,
        self_replace_steps: Share = 0.5,
        local_blend: LocalBlend | None = None,
        max_self_attention_resolution: float = 0.5,
    ) -> None:
        super().__init__(
            tokenizer, prompts, cross_replace_steps, self_replace_steps, local_blend, max_self_attention_resolution
        )
        source, *targets = self.prompts
        mappers = [refinement_mapper(tokenizer, source, target) for target in targets]
        self.mapper = torch.stack([mapper for mapper, _ in mappers])
        self.aligned = torch.stack([aligned for _, aligned in mappers])

    def edit_cross_attention(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return refine_words(source, own, self.mapper, self.aligned)


def controller_for(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **settings: Any) -> AttentionController:
    """The controller that fits prompts: [`AttentionReplace`] where all have as many words, else [`AttentionRefine`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompts (`list[str]`): The source's prompt, then the targets'.
        settings: Further arguments of [`AttentionController`].

    Raises:
        ValueError: If an argument is wrong.
    """
    swaps = len({len(prompt.split()) for prompt in prompts}) == 1
    return (AttentionReplace if swaps else AttentionRefine)(tokenizer, prompts, **settings)


class AttentionReweight(AttentionController):
    """Makes words stronger or weaker, alone or after another controller.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The pipeline's tokenizer.
        prompts (`list[str]`): The source's prompt, then the targets'. Without `controller` all the same.
        weights (`dict[str, float]` or a list of them):
            Factors by word, see [`equalizer`]: for every target that has the word, or one dict for each target.
        controller ([`AttentionController`], *optional*):
            Edits the maps first: a swap, a refinement, another reweighting.
        cross_replace_steps, self_replace_steps, local_blend, max_self_attention_resolution (*optional*):
            As in [`AttentionController`]; by default those of `controller`.

    Raises:
        TypeError: If `controller` is something else.
        ValueError: If an argument is wrong, a word is in no target, or the prompts differ and no controller says how.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext import AttentionRefine, AttentionReweight

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        prompts = ["a red star", "a striped red star"]
        controller = AttentionReweight(tokenizer, prompts, {"striped": 2.0}, controller=AttentionRefine(tokenizer,
        prompts))
        ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        weights: Mapping[str, float] | Sequence[Mapping[str, float]],
        controller: AttentionController | None = None,
        cross_replace_steps: Share | Mapping[str, Share] | None = None,
        self_replace_steps: Share | None = None,
        local_blend: LocalBlend | None = None,
        max_self_attention_resolution: float | None = None,
    ) -> None:
        if controller is not None and not isinstance(controller, AttentionController):
            raise TypeError(
                f"controller={controller!r} is not a controller; give an AttentionReplace or AttentionRefine"
            )
        said = {
            "cross_replace_steps": cross_replace_steps, "self_replace_steps": self_replace_steps,
            "local_blend": local_blend, "max_self_attention_resolution": max_self_attention_resolution,
        }  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        inherited: dict[str, Any] = {} if controller is None else {name: getattr(controller, name) for name in said}
        super().__init__(tokenizer, prompts, **(inherited | given))
        if controller is None and len(set(self.prompts)) > 1:
            raise ValueError(
                f"prompts={self.prompts} differ; give controller=AttentionReplace(...) or AttentionRefine(...)"
            )
        if controller is not None and controller.prompts != self.prompts:
            raise ValueError(f"controller was made for the prompts {controller.prompts}, not for {self.prompts}")
        self.controller = controller
        self.weights = equalizer(tokenizer, self.prompts, weights)

    def edit_cross_attention(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        maps = source[None] if self.controller is None else self.controller.edit_cross_attention(source, own)
        return reweight_words(maps, self.weights)

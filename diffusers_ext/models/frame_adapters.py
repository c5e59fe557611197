"""Video transformers of diffusers as networks of rolling diffusion: every frame of latents with a time of its own.

Rolling diffusion (arXiv 2402.09470, 2503.10488) needs a network that is told a time for each frame. Three transformers of diffusers take
one a token or frame, though no pipeline of theirs rolls: Wan `(batch, tokens)`, as its image-to-video model uses it; LTX-Video `(batch,
tokens)`, for conditions; SkyReels-V2 `(batch, frames)`, by diffusion forcing, the only one of the three that was trained with noise that differs from
frame to frame. An adapter wraps one of them and is called as [`RollingTransformer1DModel`] is, with latents `(batch, frames,
channels, height, width)` and an encoded prompt that it holds.
"""

import os
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .frame_times import checked_times


__all__ = ["LTXFrameAdapter", "ModelMixin", "SkyReelsV2FrameAdapter", "WanFrameAdapter"]

# What LTXPipeline assumes: 25 frames a second, of which its VAE makes one latent of 8, and of 32 by 32 pixels one.
LTX_INTERPOLATION = (8 / 25, 32.0, 32.0)
SKYREELS_SLOW = 16  # frames a second, that have the first of its two embeddings


@dataclass
class FrameAdapterOutput(BaseOutput):
    """What an adapter gives.

    Attributes:
        sample (`torch.Tensor` of shape `(batch, frames, channels, height, width)`): The prediction, context frames included.
    """

    sample: torch.Tensor


class FrameAdapter(ModelMixin):
    """What the adapters share. A subclass names the class it wraps, and says how that is called.

    Args:
        transformer ([`ModelMixin`]): The transformer.
        height (`int`, *optional*): Height of the latents, a multiple of the patch size; needed for a stream.
        width (`int`, *optional*): Width of the latents, likewise.
        prompt_embeds (`torch.Tensor` of shape `(1 or batch, tokens, width)`, *optional*): The encoded prompt; see `set_prompt`.
        negative_prompt_embeds (`torch.Tensor`, *optional*): That of what shall not be seen, likewise.

    Raises:
        TypeError: If `transformer` is of another class.
        ValueError: If the network cannot be rolled, or a shape does not fit.
    """

    wrapped_class = ""

    def __init__(
        self,
        transformer: ModelMixin,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if type(transformer).__name__ != self.wrapped_class or not isinstance(transformer, ModelMixin):
            raise TypeError(
                f"transformer={type(transformer).__name__} is not what {type(self).__name__} wraps; give a {self.wrapped_class}"
            )
        self.transformer = transformer
        config = transformer.config
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ValueError(
                f"the transformer has {config.in_channels} input and {config.out_channels} output channels, as models for "
                "image-to-video have; use a text-to-video model"
            )
        patch_time, *self._patch = self._patch_size()
        if patch_time != 1:
            raise ValueError(
                f"the transformer makes one token of {patch_time} frames, which cannot have different times; use a model whose "
                "patches are of one frame"
            )
        self.set_size(height, width)
        self._embeds: torch.Tensor | None = None
        self._negative: torch.Tensor | None = None
        if prompt_embeds is not None or negative_prompt_embeds is not None:
            self.set_prompt(prompt_embeds, negative_prompt_embeds)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        height: int | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads the transformer by its own `from_pretrained`, and wraps it. The prompt is set afterwards, with `set_prompt`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or Hub id of the transformer, or where an adapter was saved.
            height (`int`, *optional*): Height of the latents.
            width (`int`, *optional*): Width of the latents.
            kwargs: As in `ModelMixin.from_pretrained`, such as `subfolder="transformer"`.

        Returns:
            The adapter.
        """
        import diffusers

        wrapped = getattr(diffusers, cls.wrapped_class).from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(wrapped, height, width)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the transformer as diffusers does, so that the folder loads with or without the adapter.

        Size and prompt belong to a stream and are not saved.

        Args:
            save_directory (`str` or `os.PathLike`): Where to.
            kwargs: As in `ModelMixin.save_pretrained`.
        """
        self.transformer.save_pretrained(save_directory, **kwargs)

    @property
    def config(self) -> Any:
        """The config of the transformer."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformer."""
        return self.transformer.dtype

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of one frame of latents: (channels, height, width)."""
        height, width = self._size
        if height is None or width is None:
            raise ValueError("height and width of the latents are missing; call set_size first")
        return (self._channels(), height, width)

    @property
    def has_prompt(self) -> bool:
        """Whether there is a prompt to guide towards, and one to guide away from."""
        return self._embeds is not None and self._negative is not None

    def set_size(self, height: int | None, width: int | None) -> None:
        """Sets the size of the latents of streams that begin from now on.

        Args:
            height (`int`, *optional*): In rows of latents, a multiple of the patch size.
            width (`int`, *optional*): In columns, likewise.

        Raises:
            ValueError: If one is not such a number.
        """
        for name, value, patch in (("height", height, self._patch[0]), ("width", width, self._patch[1])):
            if value is not None and (type(value) is not int or value < 1 or value % patch):
                raise ValueError(f"{name}={value!r} of the latents does not fit; use a multiple of {patch}")
        self._size = (height, width)

    def set_prompt(
        self, prompt_embeds: torch.Tensor | None, negative_prompt_embeds: torch.Tensor | None = None
    ) -> None:
        """Sets what the frames shall show. During a stream it holds from the next evaluation on, for all frames on their way.

        Args:
            prompt_embeds (`torch.Tensor` of shape `(1 or batch, tokens, width)`): What the pipeline's `encode_prompt` gives.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same for what shall not be seen; needed for guidance.

        Raises:
            TypeError: If one is not a tensor of floats.
            ValueError: If one has another shape or width.
        """
        checked: list[torch.Tensor | None] = []
        for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if value is None and name != "prompt_embeds":
                checked.append(None)
                continue
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(f"{name} is {found}; give a tensor of floats, as encode_prompt of the pipeline does")
            width = self._text_width()
            if value.ndim != 3 or value.shape[2] != width or 0 in value.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(value.shape)}; this network needs (batch, tokens, {width})"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds values that are infinite or not a number; give finite ones")
            checked.append(value)
        self._embeds, self._negative = checked

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        num_context: int = 0,
        return_dict: bool = True,
    ) -> FrameAdapterOutput | tuple[torch.Tensor]:
        """Predicts what the transformer was trained for, flow for all three, for every frame.

        Args:
            sample (`torch.Tensor` of shape `(batch, frames, channels, height, width)`): Context, then the window.
            timestep (`float` or `torch.Tensor`): Timesteps of the model: one number, `(batch,)`, one a sample, or `(batch or 1,
                frames)`, one a frame.
            condition: No frame has a condition of its own here: leave it out.
            condition_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): False for samples that get the negative prompt.
            num_context (`int`, *optional*, defaults to 0): How many of the frames are context. Positions are relative in all three
                networks, so that it makes no difference.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`FrameAdapterOutput`] or `tuple`: The prediction, of the shape of `sample`.

        Raises:
            TypeError: If `sample` is not a tensor of floats.
            ValueError: If a shape does not fit, or the prompt is missing; it names argument and shape.
        """
        times = self._checked(sample, timestep, condition).expand(sample.shape[:2])
        result = torch.empty_like(sample)
        for rows, embeds in self._embeds_for(sample, condition_mask):
            result[rows] = self._predict(sample[rows], times[rows], embeds.to(sample))
        return FrameAdapterOutput(result) if return_dict else (result,)

    def _embeds_for(self, sample: torch.Tensor, mask: Any) -> list[tuple[Any, torch.Tensor]]:
        """Samples with the same prompts, and these: one call of the transformer each, as prompts may differ in length."""
        batch, frames = sample.shape[:2]
        if self._embeds is None:
            raise ValueError("prompt_embeds are missing; call set_prompt first")
        if mask is None:
            return [(slice(None), _spread(self._embeds, batch, "prompt_embeds"))]
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        if shape != (batch, frames) or mask.dtype != torch.bool or bool((mask != mask[:, :1]).any()):
            raise ValueError(
                f"condition_mask={shape} does not fit; give a bool tensor of ({batch}, {frames}) that is the same for all frames of "
                "a sample"
            )
        prompted = mask[:, 0].to(sample.device)
        if self._negative is None and not bool(prompted.all()):
            raise ValueError("negative_prompt_embeds are missing, so there is no guidance; give them to set_prompt")
        groups = [(prompted, self._embeds, "prompt_embeds"), (~prompted, self._negative, "negative_prompt_embeds")]
        return [
            (rows, _spread(embeds, int(rows.sum()), name))
            for rows, embeds, name in groups
            if embeds is not None and bool(rows.any())
        ]

    def _checked(self, sample: Any, timestep: Any, condition: Any) -> torch.Tensor:
        """Checks the arguments; the times as (batch or 1, frames or 1)."""
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            raise TypeError(f"sample is {getattr(sample, 'dtype', type(sample).__name__)}; give a tensor of floats")
        channels, (high, wide) = self._channels(), self._patch
        fits = sample.ndim == 5 and sample.shape[2] == channels and 0 not in sample.shape
        if not fits or sample.shape[3] % high or sample.shape[4] % wide:
            raise ValueError(
                f"sample has the shape {tuple(sample.shape)}; this network needs (batch, frames, {channels}, height, width) with a "
                f"height in multiples of {high} and a width of {wide}"
            )
        if condition is not None:
            shape = tuple(condition.shape) if isinstance(condition, torch.Tensor) else repr(condition)
            raise ValueError(
                f"condition={shape} is given to a network whose frames have none of their own; leave it out"
            )
        return checked_times(timestep, sample)

    def _channels(self) -> int:
        return int(self.config.in_channels)

    @abstractmethod
    def _patch_size(self) -> tuple[int, ...]:
        """Frames, rows and columns of latents that make a token."""

    @abstractmethod
    def _text_width(self) -> int:
        """Numbers of an encoded token."""

    @abstractmethod
    def _predict(self, sample: torch.Tensor, times: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Calls the transformer with times (batch, frames) and encoded prompts (batch, tokens, width)."""


class WanFrameAdapter(FrameAdapter):
    """Rolls a [`WanTransformer3DModel`] for text-to-video; arguments as [`FrameAdapter`].

    Example:
        ```python
        import torch
        from diffusers import WanTransformer3DModel
        from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
        from diffusers_ext.models import WanFrameAdapter

        # random weights, for the look of the call; load with WanFrameAdapter.from_pretrained(repo, subfolder="transformer", ...)
        tiny = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
            num_layers=1,
        )
        network = WanFrameAdapter(tiny, height=4, width=4, prompt_embeds=torch.randn(1, 5, 8))
        scheduler = RollingLadderScheduler(prediction_type="flow_prediction", window_length=4)
        frames = RollingLadderPipeline(network, scheduler)(num_frames=6).frames
        assert frames.shape == (1, 6, 4, 4, 4)
        ```
    """

    wrapped_class = "WanTransformer3DModel"

    def _patch_size(self) -> tuple[int, ...]:
        return tuple(self.config.patch_size)

    def _text_width(self) -> int:
        return int(self.config.text_dim)

    def _predict(self, sample: torch.Tensor, times: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        high, wide = self._patch
        tokens = (sample.shape[3] // high) * (sample.shape[4] // wide)
        per_token = times.repeat_interleave(tokens, dim=1)
        video = sample.transpose(1, 2)
        return self.transformer(video, per_token, embeds, return_dict=False)[0].transpose(1, 2)


class SkyReelsV2FrameAdapter(FrameAdapter):
    """Rolls a [`SkyReelsV2Transformer3DModel`], as trained for diffusion forcing.

    Args:
        transformer ([`SkyReelsV2Transformer3DModel`]): The transformer. If it was set to causal blocks of several frames, window, ladder
            step and context of the scheduler have to be in whole blocks.
        height, width, prompt_embeds, negative_prompt_embeds: As in [`FrameAdapter`].
        fps (`int`, *optional*, defaults to 24): Frames a second, for models that are told them.

    Example:
        ```python
        from diffusers_ext.models import SkyReelsV2FrameAdapter

        assert SkyReelsV2FrameAdapter.wrapped_class == "SkyReelsV2Transformer3DModel"
        ```
    """

    wrapped_class = "SkyReelsV2Transformer3DModel"

    def __init__(
        self,
        transformer: ModelMixin,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        fps: int = 24,
    ) -> None:
        super().__init__(transformer, height, width, prompt_embeds, negative_prompt_embeds)
        if type(fps) is not int or fps < 1:
            raise ValueError(f"fps={fps!r} is not usable; use a whole number above 0")
        self._fps = fps

    def _patch_size(self) -> tuple[int, ...]:
        return tuple(self.config.patch_size)

    def _text_width(self) -> int:
        return int(self.config.text_dim)

    def _predict(self, sample: torch.Tensor, times: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        block, frames = self.config.num_frame_per_block, sample.shape[1]
        if frames % block:
            raise ValueError(
                f"{frames} frames are not whole blocks of num_frame_per_block={block}; use multiples of it for window_length, "
                "ladder_step, context_length and num_frames"
            )
        told = self.config.inject_sample_info
        arguments: dict[str, Any] = {"enable_diffusion_forcing": True, "return_dict": False}
        if told:
            arguments["fps"] = [0 if self._fps == SKYREELS_SLOW else 1]
        video = sample.transpose(1, 2)
        # diffusers adds the embedding of the frame rate in a shape that fits one sample only
        parts = [slice(i, i + 1) for i in range(len(sample))] if told else [slice(None)]
        made = [self.transformer(video[part], times[part], embeds[part], **arguments)[0] for part in parts]
        return torch.cat(made).transpose(1, 2)


class LTXFrameAdapter(FrameAdapter):
    """Rolls a [`LTXVideoTransformer3DModel`].

    Args:
        transformer ([`LTXVideoTransformer3DModel`]): The transformer.
        height, width, prompt_embeds, negative_prompt_embeds: As in [`FrameAdapter`]. Cut the padding off the encoded prompts, where
            the attention mask of `encode_prompt` is 0: the network looks at every token that it gets.
        rope_interpolation_scale (`tuple[float, float, float]`, *optional*, defaults to `(0.32, 32.0, 32.0)`): Seconds, rows and columns
            of pixels that a latent stands for; the default is that of `LTXPipeline` at 25 frames a second.

    Example:
        ```python
        from diffusers_ext.models import LTXFrameAdapter

        assert LTXFrameAdapter.wrapped_class == "LTXVideoTransformer3DModel"
        ```
    """

    wrapped_class = "LTXVideoTransformer3DModel"

    def __init__(
        self,
        transformer: ModelMixin,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        rope_interpolation_scale: tuple[float, float, float] = LTX_INTERPOLATION,
    ) -> None:
        super().__init__(transformer, height, width, prompt_embeds, negative_prompt_embeds)
        scale = rope_interpolation_scale
        if not isinstance(scale, (tuple, list)) or len(scale) != 3 or not all(_is_positive(item) for item in scale):
            raise ValueError(f"rope_interpolation_scale={scale!r} does not fit; give three numbers above 0")
        self._interpolation = tuple(float(item) for item in scale)

    def _patch_size(self) -> tuple[int, ...]:
        patch = self.config.patch_size
        return (self.config.patch_size_t, patch, patch)

    def _text_width(self) -> int:
        return int(self.transformer.caption_projection.linear_1.in_features)

    def _channels(self) -> int:
        return int(self.config.in_channels) // self.config.patch_size**2

    def _predict(self, sample: torch.Tensor, times: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        (high, wide), (batch, frames) = self._patch, sample.shape[:2]
        patches = sample.unflatten(4, (-1, wide)).unflatten(3, (-1, high))  # b f c h p w q
        rows, columns = patches.shape[3], patches.shape[5]
        tokens = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames * rows * columns, -1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=sample.device)
        answer = self.transformer(
            tokens, embeds, times.repeat_interleave(rows * columns, dim=1), mask, num_frames=frames, height=rows,
            width=columns, rope_interpolation_scale=self._interpolation, return_dict=False,
        )[0]  # fmt: skip
        patches = answer.reshape(batch, frames, rows, columns, self._channels(), high, wide)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(sample.shape)


def _spread(embeds: torch.Tensor, batch: int, name: str) -> torch.Tensor:
    """Encoded prompts for a batch: one for all, or one each."""
    if len(embeds) not in (1, batch):
        wanted = "give 1" if batch == 1 else f"give 1 or {batch}"
        raise ValueError(f"{name} are of {len(embeds)} prompts for a batch of {batch}; {wanted}")
    return embeds.expand(batch, -1, -1)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")

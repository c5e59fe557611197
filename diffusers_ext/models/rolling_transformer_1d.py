"""A transformer for windows of frames of which each has a noise level of its own.

The network of rolling diffusion (arXiv 2402.09470, 2503.10488) for sequences of feature vectors: motion, sensors, audio features. As a
diffusion transformer (DiT, arXiv 2212.09748), but the time embedding and with it the adaptive layer norm are of every frame:

    c_f = embed(t_f) + W_c u_f,     h = h + g1(c) * attention(LN(h) (1 + s1(c)) + b1(c)),     the same with g2, s2, b2 for the MLP

with u_f the frame's condition. Already emitted frames may stand before the window; positions count from the window's first frame,
so that a frame of the window has the same position however much context there is.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .frame_times import checked_times


__all__ = ["ModelMixin", "RollingTransformer1DModel", "RollingTransformer1DOutput"]

# Sinusoids of positions: windows are tens of frames, so the slowest need not be slower than a few hundred.
LONGEST_POSITION = 500


@dataclass
class RollingTransformer1DOutput(BaseOutput):
    """What the network gives.

    Attributes:
        sample (`torch.Tensor` of shape `(batch, frames, in_channels)`): The prediction, context frames included.
    """

    sample: torch.Tensor


class RollingTransformerBlock(nn.Module):
    """Attention over frames and an MLP, both modulated by every frame's own embedding."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        # A new block is the identity.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, causal: bool) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(embedding)).chunk(6, dim=-1)
        normed = self.norm1(hidden) * (1.0 + scale1) + shift1
        query, key, value = self.to_qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        hidden = hidden + gate1 * self.to_out(attended.transpose(1, 2).flatten(2))
        return hidden + gate2 * self.mlp(self.norm2(hidden) * (1.0 + scale2) + shift2)


class RollingTransformer1DModel(ModelMixin, ConfigMixin):
    """A transformer over frames with a time and a condition for each.

    Args:
        in_channels (`int`): Numbers a frame has.
        condition_channels (`int`, *optional*, defaults to 0): Numbers a frame's condition has; 0 for none.
        num_layers (`int`, *optional*, defaults to 4): Blocks.
        num_attention_heads (`int`, *optional*, defaults to 4): Heads of each.
        attention_head_dim (`int`, *optional*, defaults to 32): Width of a head, even.
        mlp_ratio (`int`, *optional*, defaults to 4): Width of the MLP over that of the blocks.
        causal (`bool`, *optional*, defaults to `False`): Whether a frame sees only frames before it and itself. Later frames of a
            window are noisier, but not empty: without the mask each frame is denoised with them in view.
        frame_mean (`list[float]`, *optional*): Means of the channels of the data. These four are not applied by the network, which
            was trained on numbers of mean 0 and variance 1, but by the pipeline, whose users have units of their own.
        frame_std (`list[float]`, *optional*): Standard deviations of the channels of the data.
        condition_mean (`list[float]`, *optional*): Means of the channels of the condition.
        condition_std (`list[float]`, *optional*): Standard deviations of the channels of the condition.

    Raises:
        ValueError: If a count is not a positive int, or a mean or deviation not one number a channel.

    Example:
        ```python
        import torch
        from diffusers_ext.models import RollingTransformer1DModel

        network = RollingTransformer1DModel(in_channels=6, condition_channels=3, num_layers=2)
        frames, times = torch.randn(2, 20, 6), torch.arange(49, 1000, 50).expand(2, -1)
        predicted = network(frames, times, condition=torch.randn(2, 20, 3)).sample
        assert predicted.shape == (2, 20, 6)
        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["RollingTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        condition_channels: int = 0,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 32,
        mlp_ratio: int = 4,
        causal: bool = False,
        frame_mean: list[float] | None = None,
        frame_std: list[float] | None = None,
        condition_mean: list[float] | None = None,
        condition_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "in_channels": in_channels, "num_layers": num_layers, "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        for name, value in {**counts, "condition_channels": condition_channels}.items():
            least = 0 if name == "condition_channels" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not usable; use an int of at least {least}")
        if attention_head_dim % 2:
            raise ValueError(f"attention_head_dim={attention_head_dim} is odd; use an even number")
        for name, statistic, channels in (
            ("frame_mean", frame_mean, in_channels),
            ("frame_std", frame_std, in_channels),
            ("condition_mean", condition_mean, condition_channels),
            ("condition_std", condition_std, condition_channels),
        ):
            if statistic is not None:
                check_channel_statistic(statistic, name, channels)
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Linear(in_channels, width)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        if condition_channels:
            self.condition_embedding = nn.Sequential(
                nn.Linear(condition_channels, width), nn.SiLU(), nn.Linear(width, width)
            )
            # Stands for no condition; learned where training drops it.
            self.null_condition = nn.Parameter(torch.zeros(width))
        blocks = [RollingTransformerBlock(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, in_channels)
        for layer in (self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        num_context: int = 0,
        return_dict: bool = True,
    ) -> RollingTransformer1DOutput | tuple[torch.Tensor]:
        """Predicts what the scheduler's `prediction_type` says, for every frame.

        Args:
            sample (`torch.Tensor` of shape `(batch, frames, in_channels)`): Context, then the window.
            timestep (`float` or `torch.Tensor`): Timesteps of the model: one number, `(batch,)`, one a sample, or `(batch or 1,
                frames)`, one a frame.
            condition (`torch.Tensor` of shape `(batch, frames, condition_channels)`, *optional*): A condition for each frame.
                Without it none has one.
            condition_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): False for frames whose condition shall not be
                looked at.
            num_context (`int`, *optional*, defaults to 0): How many of the frames are context.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`RollingTransformer1DOutput`] or `tuple`: The prediction, of the shape of `sample`.

        Raises:
            TypeError: If `sample` is not a tensor.
            ValueError: If a shape does not fit; it names argument and shape.
        """
        times = self._checked(sample, timestep, condition, condition_mask, num_context)
        batch, frames = sample.shape[:2]
        embedding = self.time_embedding(self.time_proj(times.flatten()).to(sample.dtype)).unflatten(0, times.shape)
        if self.config.condition_channels:
            embedding = embedding + self._conditions(condition, condition_mask)
        positions = torch.arange(frames, device=sample.device) - num_context
        place = get_timestep_embedding(positions, self.proj_in.out_features, max_period=LONGEST_POSITION)
        hidden = self.proj_in(sample) + place.to(sample.dtype)
        embedding = embedding.expand(batch, frames, -1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, embedding, self.config.causal)
            else:
                hidden = block(hidden, embedding, self.config.causal)
        shift, scale = self.modulation_out(F.silu(embedding)).chunk(2, dim=-1)
        result = self.proj_out(self.norm_out(hidden) * (1.0 + scale) + shift)
        return RollingTransformer1DOutput(result) if return_dict else (result,)

    def _conditions(self, condition: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        null = self.null_condition
        if condition is None:
            return null
        embedded = self.condition_embedding(condition.to(null.dtype))
        return embedded if mask is None else torch.where(mask.to(embedded.device)[..., None], embedded, null)

    def _checked(self, sample: Any, timestep: Any, condition: Any, mask: Any, num_context: Any) -> torch.Tensor:
        """Checks the arguments; the times as (batch or 1, frames or 1)."""
        channels, wanted = self.config.in_channels, self.config.condition_channels
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            raise TypeError(f"sample is {getattr(sample, 'dtype', type(sample).__name__)}; give a tensor of floats")
        if sample.ndim != 3 or sample.shape[2] != channels or 0 in sample.shape:
            raise ValueError(
                f"sample has the shape {tuple(sample.shape)}; this network needs (batch, frames, {channels})"
            )
        batch, frames = sample.shape[:2]
        if isinstance(num_context, bool) or not isinstance(num_context, int) or not 0 <= num_context <= frames:
            raise ValueError(f"num_context={num_context!r} is out of range; use an int from 0 to {frames}, the frames")
        times = checked_times(timestep, sample)
        if condition is not None:
            shape = tuple(condition.shape) if isinstance(condition, torch.Tensor) else type(condition).__name__
            if not wanted:
                raise ValueError(f"condition={shape} is given to a network without condition_channels; leave it out")
            if shape != (batch, frames, wanted):
                raise ValueError(
                    f"condition={shape} does not fit; this call needs a tensor of ({batch}, {frames}, {wanted})"
                )
        if mask is not None:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            if shape != (batch, frames) or mask.dtype != torch.bool:
                raise ValueError(f"condition_mask={shape} does not fit; give a bool tensor of ({batch}, {frames})")
        return times


def check_channel_statistic(value: Any, name: str, channels: int) -> None:
    """Refuses what is not one finite number a channel, above 0 for a standard deviation.

    Raises:
        ValueError: If it is not.
    """
    deviation = name.endswith("_std")
    wanted = f"a list of {channels} finite numbers" + (" above 0" if deviation else "")
    if not isinstance(value, (list, tuple)) or len(value) != channels:
        found = f"of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"{name}={found} does not fit the {channels} channels; give {wanted}")
    for number in value:
        usable = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not usable or (deviation and number <= 0):
            raise ValueError(f"{name} holds {number!r}; give {wanted}")

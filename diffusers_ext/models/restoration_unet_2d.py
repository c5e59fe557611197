"""A UNet that restores pictures: plain residual convolutions, told by an embedding what the time is and what the picture is like.

Networks of restoration do without the normalisation of generative UNets, which takes away how strong noise or light is (EDSR,
arXiv 1707.02921; NAFNet, arXiv 2204.04676). Here each block is

    h = h + W2 silu(W1 h (1 + g(e)) + b(e)),        e = silu(time(t) + statistics(log [|mean W0 x|, std W0 x]))

where mean and deviation are over the whole picture, so that noise and darkness are known at every place, and the picture may be of
any size. Logarithms, since darkness is undone by a factor.
There is no attention for the same reason. Coarser levels come by strided convolutions and go by sub-pixel ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .frame_times import finite_times


__all__ = ["ModelMixin", "RestorationUNet2DModel"]

TIME_WAVES = 32
# Of features of pictures in [0, 1], after the first convolution: below this they tell nothing, and this brings most logarithms to 0.
LEAST_STATISTIC, TYPICAL_LOGARITHM = 1e-3, 2.0


@dataclass
class RestorationUNet2DOutput(BaseOutput):
    """What the network gives; as `UNet2DOutput`, whose import would take every part of generative UNets along.

    Attributes:
        sample (`torch.Tensor` of shape `(batch, out_channels, H, W)`): The answer.
    """

    sample: torch.Tensor


class RestorationBlock(nn.Module):
    """Two convolutions on a residual path, modulated by the embedding."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * channels)
        # A new network is close to the identity, and hardly modulated: without normalisation its depth would multiply sizes.
        with torch.no_grad():
            self.conv2.weight *= 0.3
            nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
            nn.init.kaiming_uniform_(self.modulation.weight, a=1.0)
            self.modulation.weight *= 0.5
            nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        gain, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        return hidden + self.conv2(F.silu(self.conv1(hidden) * (1.0 + gain) + shift))


class RestorationUNet2DModel(ModelMixin, ConfigMixin):
    """A network for restoration of pictures of any size whose sides 2^(levels - 1) divides.

    Args:
        in_channels (`int`, *optional*, defaults to 6): Channels of the input; for [`MRRestorationPipeline`] those of x - mu and mu.
        out_channels (`int`, *optional*, defaults to 3): Channels of the answer.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(24, 48, 96)`): Width of each level, the finest first.
        layers_per_block (`int` or `tuple[int]`, *optional*, defaults to `(1, 1, 2)`): Blocks on the way down and on the way up, of
            each level if a tuple; the coarsest level has no way up.
        embedding_dim (`int`, *optional*, defaults to 96): Width of the embedding of time and statistics.

    Raises:
        ValueError: If a number is not a positive int, or the two tuples differ in length.

    Example:
        ```python
        import torch
        from diffusers_ext.models import RestorationUNet2DModel

        network = RestorationUNet2DModel(block_out_channels=(16, 32), layers_per_block=1)
        assert network(torch.rand(2, 6, 30, 44), 40.0).sample.shape == (2, 3, 30, 44)
        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["RestorationBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 6,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (24, 48, 96),
        layers_per_block: int | tuple[int, ...] = (1, 1, 2),
        embedding_dim: int = 96,
    ) -> None:
        super().__init__()
        widths = checked_counts("block_out_channels", block_out_channels)
        layers = [layers_per_block] * len(widths) if isinstance(layers_per_block, int) else layers_per_block
        depths = checked_counts("layers_per_block", layers)
        scalars = {"in_channels": in_channels, "out_channels": out_channels, "embedding_dim": embedding_dim}
        for name, value in scalars.items():
            checked_counts(name, [value])
        if len(depths) != len(widths):
            raise ValueError(
                f"layers_per_block={list(depths)} is not one number for each of block_out_channels={list(widths)}"
            )
        self.time_proj = Timesteps(TIME_WAVES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_WAVES, embedding_dim)
        self.statistics_embedding = TimestepEmbedding(2 * widths[0], embedding_dim)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)

        def blocks(level: int) -> nn.ModuleList:
            return nn.ModuleList(RestorationBlock(widths[level], embedding_dim) for _ in range(depths[level]))

        finer = range(len(widths) - 1)
        self.down_blocks = nn.ModuleList(blocks(level) for level in finer)
        self.downsamplers = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 2, stride=2) for i in finer)
        self.mid_block = blocks(len(widths) - 1)
        self.upsamplers = nn.ModuleList(nn.Conv2d(widths[i + 1], 4 * widths[i], 1) for i in finer)
        self.up_blocks = nn.ModuleList(blocks(level) for level in finer)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]
        self.gradient_checkpointing = False

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> RestorationUNet2DOutput | tuple[torch.Tensor]:
        """Answers what the scheduler's `prediction_type` asks for.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, H, W)`): Input pictures; 2^(levels - 1) divides H and W.
            timestep (`float` or `torch.Tensor`): One time for all, or one for each picture.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`RestorationUNet2DOutput`] or `tuple`: The answer `(batch, out_channels, H, W)`.

        Raises:
            TypeError: If `sample` is not a tensor of floats.
            ValueError: If a shape does not fit.
        """
        times = self._checked(sample, timestep)
        hidden = self.conv_in(sample)
        of_time = self.time_embedding(self.time_proj(times).to(hidden.dtype))
        embedding = F.silu(of_time + self.statistics_embedding(log_statistics(hidden).to(hidden.dtype)))
        passed = []
        for blocks, downsampler in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden = self._through(blocks, hidden, embedding)
            passed.append(hidden)
            hidden = downsampler(hidden)
        hidden = self._through(self.mid_block, hidden, embedding)
        for level in reversed(range(len(passed))):
            hidden = F.pixel_shuffle(self.upsamplers[level](hidden), 2) + passed[level]
            hidden = self._through(self.up_blocks[level], hidden, embedding)
        answer = self.conv_out(hidden)
        return RestorationUNet2DOutput(sample=answer) if return_dict else (answer,)

    def _through(self, blocks: Any, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, embedding)
            else:
                hidden = block(hidden, embedding)
        return hidden

    def _checked(self, sample: Any, timestep: Any) -> torch.Tensor:
        """Checks the arguments; the times as one a picture."""
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            raise TypeError(f"sample is {getattr(sample, 'dtype', type(sample).__name__)}; give a tensor of floats")
        channels, multiple = self.config.in_channels, 2 ** len(self.downsamplers)
        fits = sample.ndim == 4 and sample.shape[1] == channels and 0 not in sample.shape
        if not fits or sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"sample has the shape {tuple(sample.shape)}; this network needs (batch, {channels}, H, W) with sides that "
                f"{multiple} divides"
            )
        times = finite_times(timestep, sample.device).to(torch.float32)
        if tuple(times.shape) not in ((), (1,), (len(sample),)):
            raise ValueError(
                f"timestep of shape {tuple(times.shape)} does not fit; give one number, or one for each of {len(sample)} pictures"
            )
        return times.expand(len(sample))


def log_statistics(hidden: torch.Tensor) -> torch.Tensor:
    """Logarithms of size and deviation of each channel (n, c, H, W) over the picture, about centred: (n, 2 c) in float32."""
    deviation, mean = torch.std_mean(hidden.float(), (2, 3), correction=0)
    return torch.log(torch.cat([mean.abs(), deviation], dim=1) + LEAST_STATISTIC) + TYPICAL_LOGARITHM


def checked_counts(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of positive ints.

    Raises:
        ValueError: If it is not one.
    """
    given = list(values) if isinstance(values, (list, tuple)) else []
    if not given or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in given):
        raise ValueError(f"{name}={values!r} is not usable; give ints of at least 1")
    return tuple(given)

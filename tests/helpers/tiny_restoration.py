"""A restoration pipeline of a few thousand random weights."""

from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.schedulers import MRScheduler


def tiny_restoration_unet(channels: int = 3, seed: int = 0) -> UNet2DModel:
    """A network for pictures (or latents) of so many channels, that halves them once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=16, in_channels=2 * channels, out_channels=channels, block_out_channels=(4, 8), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, norm_num_groups=2,
        ).eval()  # fmt: skip


def tiny_restoration(scheduler: Any = None, **settings: Any) -> MRRestorationPipeline:
    """A pipeline for pictures with `scheduler`, or an `MRScheduler` of these settings (by default for velocities)."""
    scheduler = scheduler or MRScheduler(**{"prediction_type": "v_prediction", **settings})
    pipeline = MRRestorationPipeline(tiny_restoration_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

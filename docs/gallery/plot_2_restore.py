"""
A picture restored
==================

Mean-reverting diffusion ends in the degraded picture and not in noise, so a few network evaluations suffice. :doc:`/mean_reverting`
has the method and its measurements.
"""

import torch

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.data.degradations import rain
from diffusers_ext.data.photographs import packaged_crops
from diffusers_ext.hub import load_pipeline, resolve_model
from diffusers_ext.imaging import to_pil, to_tensor
from diffusers_ext.metrics import psnr
from diffusers_ext.sheets import Tile, contact_sheet


clean = to_tensor(packaged_crops()["coffee"])[None] / 2 + 0.5  # (1, 3, height, width) in [0, 1]
rainy = rain(clean, 0.01, 12.0, 80.0, torch.Generator().manual_seed(0))

pipe = load_pipeline(MRRestorationPipeline, resolve_model(default="mr-restoration"))
pipe.set_progress_bar_config(disable=True)

# %%
# Five evaluations, without start noise.
restored = pipe(rainy, num_inference_steps=5, noise_scale=0.0, output_type="pt").images


# %%
def tile(image, words):
    decibel = "" if image is clean else f", {psnr(2 * image - 1, 2 * clean - 1).item():.1f} dB"
    return Tile(to_pil(image[0] * 2 - 1), words + decibel)


picture = contact_sheet([[tile(rainy, "rain"), tile(restored, "restored"), tile(clean, "clean")]], title="A cup")

"""
Few steps at a high guidance
============================

At guidance 15 the sampling equation is stiff, and solvers of high order overshoot. `AdaptiveAdamsScheduler` measures where that
happens, sample by sample, and answers with a rule that extrapolates less. Euler's method never overshoots, and is hard to beat here.
:doc:`/samplers` compares two dozen samplers.
"""

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from diffusers_ext import AdaptiveAdamsScheduler, GHVBScheduler
from diffusers_ext.hub import load_pipeline
from diffusers_ext.sheets import Tile, contact_sheet


pipe = load_pipeline(StableDiffusionPipeline)
pipe.set_progress_bar_config(disable=True)
prompts = ["a blue car on a yellow striped background", "a green tree on a white background"]
noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)

# %%
# The same noise, eight evaluations, the same nodes; the last column is the solution of the equation but for a hundredth.
config = {**pipe.scheduler.config, "use_karras_sigmas": True, "timestep_spacing": "linspace"}
runs = {
    "Euler (DDIM)": (EulerDiscreteScheduler, 8),
    "DPM-Solver++": (DPMSolverMultistepScheduler, 8),
    "UniPC": (UniPCMultistepScheduler, 8),
    "GHVB": (GHVBScheduler, 8),
    "AdaptiveAdams": (AdaptiveAdamsScheduler, 8),
    "100 steps": (DPMSolverMultistepScheduler, 100),
}
columns = []
for scheduler, steps in runs.values():
    pipe.scheduler = scheduler.from_config(config)
    columns.append(pipe(prompts, num_inference_steps=steps, guidance_scale=15.0, latents=noise.clone()).images)

rows = [[Tile(image, prompt) for image in images] for prompt, images in zip(prompts, zip(*columns))]
picture = contact_sheet(rows, title="Eight evaluations at guidance 15", columns=list(runs))

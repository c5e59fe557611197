"""
A flow steered to a measurement
===============================

`FlowChefScheduler` bends the samples of a flow model towards what was measured, without differentiating the network: it needs only
what every `step` receives. The flow here is one whose velocity is known, of pictures that are smooth; :doc:`/flowchef` has pipelines.
"""

import torch

from diffusers_ext import FlowChefScheduler, GaussianBlur, InpaintMask, SuperResolution
from diffusers_ext.imaging import to_pil
from diffusers_ext.sheets import Tile, contact_sheet
from diffusers_ext.steering import MeasurementObjective


# Smooth pictures: the spectrum falls as the cube of the frequency.
frequency = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.fftfreq(64)[None] ** 2).sqrt().clamp_min(1 / 64)
spectrum = frequency**-3
spectrum = 0.16 * spectrum / spectrum.mean()


def velocity(state, t):
    """E[eps - x0 | x_t] of that Gaussian process, frequency by frequency."""
    gain = (t - (1 - t) * spectrum) / (t**2 + (1 - t) ** 2 * spectrum)
    return torch.fft.ifft2(gain * torch.fft.fft2(state)).real


def sample(objective=None, seed=1, steps=50):
    scheduler = FlowChefScheduler()
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    state = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        state = scheduler.step(velocity(state, float(t) / 1000), t, state).prev_sample
    return state


truth = sample(seed=9)
mask = torch.ones(64, 64)
mask[16:48, 16:48] = 0

# %%
# Three operators, one line each.
rows = []
for operator, words in (
    (InpaintMask(mask), "a square is missing"),
    (SuperResolution(4), "a quarter of the size"),
    (GaussianBlur(15, 3.0), "blurred"),
):
    measured = operator.A(truth)
    steered = sample(MeasurementObjective(operator, measured, noise_std=0.01))
    shown = torch.nn.functional.interpolate(measured, size=(64, 64))
    rows.append([Tile(to_pil(image[0]), words) for image in (shown, steered, truth)])

picture = contact_sheet(rows, title="Steered flows", columns=["measured", "steered", "truth"])

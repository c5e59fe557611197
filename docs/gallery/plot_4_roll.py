"""
A sensor's motion, streamed
===========================

Rolling diffusion emits frames while the condition arrives: here what thigh and trunk of a walking person do, from the accelerations of
the shank, four frames for one network evaluation. :doc:`/rolling` has the method, :doc:`/rolling_motion` the measurements. The four
seconds are from the part of the recording that the model was not trained on (Daphnet Freezing of Gait, CC BY 4.0, UCI Machine
Learning Repository, doi 10.24432/C56K78).
"""

import csv

import torch

from diffusers_ext import RollingLadderPipeline
from diffusers_ext.hub import load_pipeline, resolve_model
from diffusers_ext.training.plots import line_panels


with open("walk.csv") as file:
    rows = list(csv.DictReader(file))


def recorded(*names):
    return torch.tensor([[float(row[name]) for name in names] for row in rows])


def sensor():
    """64 readings a second of three accelerations in mg, one at a time."""
    yield from recorded("ankle_horiz_fwd", "ankle_vert", "ankle_horiz_lateral")


pipe = load_pipeline(RollingLadderPipeline, resolve_model(default="rolling-motion"))
pipe.set_progress_bar_config(disable=True)

# %%
# A generator: frames come as soon as they are made, and memory does not grow. The window looks 40 readings ahead.
chunks = list(pipe.stream(sensor(), num_inference_steps=10, generator=torch.Generator().manual_seed(0)))
print(len(chunks), "chunks of", tuple(chunks[0].shape))
stream = torch.cat(chunks, 1)[0]  # thigh first, trunk then, in mg

# %%
shown = [("leg_horiz_fwd", 0), ("leg_vert", 1), ("trunk_vert", 4)]
channels = [channel for _, channel in shown]
picture = line_panels(
    [f"{name} (mg)" for name, _ in shown],
    [("recorded", "#999999", recorded(*(name for name, _ in shown))), ("streamed", "#c0392b", stream[:, channels])],
    height=110,
)

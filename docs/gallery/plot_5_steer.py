"""
A flow steered to a measurement
===============================

`FlowChefPipeline` bends what a flow model samples towards what was measured, without differentiating the network. The demo flow is begun from
the same noise each time; :doc:`/flowchef` has the method and its measurements.
"""

import torch
from PIL import Image

from diffusers_ext import FlowChefPipeline, SuperResolution
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline, resolve_model
from diffusers_ext.imaging import to_pil
from diffusers_ext.sheets import Tile, contact_sheet


pipe = load_pipeline(FlowChefPipeline, resolve_model(default="emoji-scenes-flow"))
pipe.set_progress_bar_config(disable=True)
world = EmojiScenes(objects=DEMO_OBJECTS)
scene = world.sample(1, seed=10, split="held_out")  # never trained on
(prompt,), clean = world.captions(scene), world.render(scene)[0]
truth = to_pil(clean[0])
print(prompt)


def sample(**steering):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=30, guidance_scale=3.0, generator=generator, **steering).images[0]


free = sample()

# %%
# A square is missing: white of the mask is painted. What lies under it is grey, so that nothing of it can be seen.
mask = Image.new("L", (64, 64), 0)
mask.paste(255, (16, 16, 48, 48))
holed = truth.copy()
holed.paste("gray", mask=mask)
rows = [[holed, free, sample(image=holed, mask_image=mask), truth]]

# %%
# A sixteenth of the pixels is left: the gradient goes through the decoder.
operator = SuperResolution(4)
small = operator.A(clean)
enlarged = sample(measurement=small, operator=operator, noise_std=0.02)
rows += [[to_pil(small[0]).resize((64, 64), Image.Resampling.NEAREST), free, enlarged, truth]]

columns = ["given", "not steered", "steered", "truth"]
picture = contact_sheet([[Tile(image) for image in row] for row in rows], title="Steered flows", columns=columns)

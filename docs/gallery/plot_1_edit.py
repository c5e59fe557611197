"""
A picture edited by words
=========================

`NullTextInversionPipeline` puts a picture into the model and edits it with prompt-to-prompt, `GuideAndRescalePipeline` by guiding the
sampling with energies. Neither trains anything. :doc:`/inversion` and :doc:`/guide_and_rescale` say how.
"""

from diffusers_ext import AttentionReplace, GuideAndRescalePipeline, LocalBlend, NullTextInversionPipeline
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline
from diffusers_ext.sheets import Tile, contact_sheet


pipe = load_pipeline(NullTextInversionPipeline)
pipe.set_progress_bar_config(disable=True)
pair = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", 1, 0)
before, wanted = pipe.image_processor.postprocess(pair.source) + pipe.image_processor.postprocess(pair.target)
source, target = pair.source_prompts[0], pair.target_prompts[0]
print(source, "->", target)

# %%
# The inversion is made once and can be saved. The word that is not exchanged keeps its place, and outside of it the picture stays.
inversion = pipe.invert(before, source, num_inference_steps=20)
blend = LocalBlend(pipe.tokenizer, [source, target], ["guitar", "guitar"])
controller = AttentionReplace(pipe.tokenizer, [source, target], cross_replace_steps=0.6, local_blend=blend)
replaced = pipe(target, inversion=inversion, controller=controller, guidance_scale=5.0).images[0]

# %%
# The other pipeline takes the parts of the first.
guided = GuideAndRescalePipeline(**pipe.components, requires_safety_checker=False)
guided.set_progress_bar_config(disable=True)
rescaled = guided(image=before, source_prompt=source, prompt=target, num_inference_steps=20).images[0]

picture = contact_sheet(
    [
        [
            Tile(before, source),
            Tile(replaced, target, compare=source),
            Tile(rescaled, target, compare=source),
            Tile(wanted, target, compare=source),
        ]
    ],
    title="A guitar",
    columns=["source", "prompt-to-prompt", "Guide-and-Rescale", "true edit"],
)

"""What an edit costs beside the network passes that it cannot do without.

    python benchmarks/guidance_cost.py [--repeats 5]

The floor is the sum of the passes, each measured by itself with the same inputs: forward passes of the inversion and of the
reference, the source pass with its backward pass and the energies in place, pairs of negative and target prompt. The edit is then
measured as a whole. Both in one process and in turn, in processor seconds of one thread, so that a busy machine does not matter.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import summary, write_result

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, SelfAttentionEnergy
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.guidance import GuidanceState, join_conditions, text_condition
from diffusers_ext.guidance.guided_step import frozen
from diffusers_ext.hub import load_pipeline


STEPS = 50


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline(GuideAndRescalePipeline, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    pairs = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", 1, 0)
    picture, source, target = (pairs.source + 1) / 2, pairs.source_prompts[0], pairs.target_prompts[0]
    unet, latents = pipe.unet, torch.randn(1, 4, 16, 16)
    words = [text_condition(pipe.encode_prompt(text, "cpu", 1, False)[0]) for text in ("", source, target)]
    level, both = torch.tensor(0.3), join_conditions([words[0], words[2]])

    @torch.no_grad()
    def forward(condition: Any = words[1], batch: int = 1) -> torch.Tensor:
        return unet(latents.repeat(batch, 1, 1, 1), 500, return_dict=False, **condition)[0]

    def guided_passes() -> None:
        """Reference, source and backward pass, with the energies reading along."""
        attention, features = SelfAttentionEnergy(), FeatureEnergy()
        with frozen(unet), attention.attach(unet) as first, features.attach(unet) as second:
            for probe in (first, second):
                probe.begin("reference")
            forward()
            for probe in (first, second):
                probe.begin("source")
            leaf = latents.clone().requires_grad_(True)
            prediction = unet(leaf + 0.1, 500, return_dict=False, **words[1])[0]
            state = GuidanceState(leaf, latents, prediction, prediction.detach(), level, torch.tensor(500))
            energy = (3e5 * first.energy(state) + 500 * second.energy(state)).sum()
            torch.autograd.grad(energy, leaf)

    def edit() -> None:
        pipe(picture, source, target, num_inference_steps=STEPS)

    for warm in (forward, guided_passes, edit):
        warm()
    times: dict[str, list[float]] = {"forward": [], "pair": [], "reference + source + backward": [], "edit": []}
    for _ in range(options.repeats):
        times["edit"].append(seconds_of(edit))
        for _ in range(20):
            times["forward"].append(seconds_of(forward))
            times["pair"].append(seconds_of(lambda: forward(both, 2)))
            times["reference + source + backward"].append(seconds_of(guided_passes))
    median = {name: statistics.median(values) for name, values in times.items()}
    guided = round(0.6 * STEPS) - 1
    floor = STEPS * (median["forward"] + median["pair"]) + guided * median["reference + source + backward"]
    ratio = median["edit"] / floor
    print({name: round(value, 4) for name, value in median.items()}, f"floor {floor:.3f} s, edit / floor {ratio:.3f}")
    write_result(
        "guidance_cost",
        {
            "steps": STEPS,
            "seconds": {name: summary(values) for name, values in times.items()},
            "floor": round(floor, 4),
            "edit_to_floor": round(ratio, 4),
        },
    )


if __name__ == "__main__":
    main()

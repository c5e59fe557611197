"""Peak memory and time of one guided step on a network of the size of Stable Diffusion 1.x, at 512 pixels.

    python benchmarks/guidance_memory.py                  # a few minutes a row on two cores, 16 GB
    python benchmarks/guidance_memory.py --size 256 --only "float32"

The network has random weights: memory and time do not depend on them. Every row runs in a process of its own, which does
nothing but build the network and take one step, and the figure is the largest resident set of that process, weights, libraries and
all (on a GPU: what torch had allocated at most). "all maps kept" is the method without our processors, as a user would write it
down from the paper: every probability of both passes is stored. It needs more than 24 GB at 512 pixels and is run at 256.

Rows marked "shapes only" leave the arithmetic out (`stand_in_arithmetic.py`): processors without instructions for half precision would
need hours. The float32 row among them shows how far such a figure is from the real one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from common import write_result
from diffusers import UNet2DConditionModel
from stand_in_arithmetic import StandInArithmetic

from diffusers_ext.guidance import FeatureEnergy, GuidedStep, SelfAttentionEnergy, text_condition


ROOT = Path(__file__).resolve().parents[1]

SHAPES_ONLY = "shapes only"
# name -> (dtype, gradient checkpointing, largest attention resolution, all maps kept); SHAPES_ONLY in a name leaves out the arithmetic
ROWS: dict[str, tuple[str, bool, int | None, bool]] = {
    "float32": ("float32", False, None, False),
    "float32, checkpointing": ("float32", True, None, False),
    "float32, checkpointing, attention up to 32": ("float32", True, 32, False),
    "float16": ("float16", False, None, False),
    "float16, checkpointing": ("float16", True, None, False),
    f"float32, {SHAPES_ONLY}": ("float32", False, None, False),
    f"float16, {SHAPES_ONLY}": ("float16", False, None, False),
    f"float16, checkpointing, {SHAPES_ONLY}": ("float16", True, None, False),
    "float32, all maps kept": ("float32", False, None, True),
}


def one_step(name: str, size: int, device: str) -> dict[str, float]:
    """Builds the network and takes one guided step; returns gigabytes and seconds."""
    dtype_name, checkpointing, resolution, keep_all = ROWS[name]
    dtype = getattr(torch, dtype_name)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        ).eval()  # fmt: skip
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    latents, reference = noise(1, 4, size // 8, size // 8), noise(1, 4, size // 8, size // 8)
    negative, target, source = (noise(1, 77, 768) for _ in range(3))
    began = time.perf_counter()
    if keep_all:
        sys.path.insert(0, str(ROOT))
        from tests.guidance.plain_reference import PlainSettings, plain_noise

        settings = PlainSettings(feature_layer="up_blocks.3")
        plain_noise(unet, latents, reference, 500, (negative, source, target), settings, guided=True)
    else:
        guiders = [SelfAttentionEnergy(max_attention_resolution=resolution), FeatureEnergy()]
        with StandInArithmetic() if SHAPES_ONLY in name else nullcontext():
            GuidedStep(unet, guiders)(
                latents, 500, torch.tensor(0.3, device=device), 7.5, text_condition(negative), text_condition(target),
                text_condition(source), reference,
            )  # fmt: skip
    seconds = time.perf_counter() - began
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"peak_gb": round(peak / 1e9, 2), "weights_gb": round(weights / 1e9, 2), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help="run this one here and print it as JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(one_step(options.row, options.size, options.device)))
        return
    wanted = options.only or [name for name in ROWS if not ROWS[name][3] or options.size <= 256]
    table = {}
    for name in wanted:
        command = [sys.executable, __file__, "--row", name, "--size", str(options.size), "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            table[name] = {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
        else:
            table[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name:45s} {table[name]}", flush=True)
    write_result(f"guidance_memory_{options.size}", {"size": options.size, "device": options.device, "rows": table})


if __name__ == "__main__":
    main()

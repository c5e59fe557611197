"""Peak memory and time of one guided step on a network of the size of Stable Diffusion 1.x, at 512 pixels.

    python benchmarks/guidance_memory.py                  # ten minutes on two cores, 16 GB
    python benchmarks/guidance_memory.py --size 256 --compute "float32" "float32, all maps kept"

The network has random weights: memory and time do not depend on them. Every row runs in a process of its own, which does
nothing but build the network and take one step, and the figure is the largest resident set of that process, weights, libraries and
all (on a GPU: what torch had allocated at most). "all maps kept" is the method without our processors, as a user would write it
down from the paper: every probability of both passes is stored. It needs more than 24 GB at 512 pixels and is run at 256.

On a CPU every row is run without its arithmetic (`stand_in_arithmetic.py`), since processors without instructions for half precision
would need hours, and those named by --compute also with it, which shows how far the two are apart.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from common import write_result
from diffusers import UNet2DConditionModel
from stand_in_arithmetic import StandInArithmetic

from diffusers_ext.guidance import FeatureEnergy, GuidedStep, SelfAttentionEnergy, text_condition


# name -> (dtype, gradient checkpointing, largest attention resolution, all maps kept)
ROWS: dict[str, tuple[str, bool, int | None, bool]] = {
    "float32": ("float32", False, None, False),
    "float32, checkpointing": ("float32", True, None, False),
    "float32, checkpointing, attention up to 32": ("float32", True, 32, False),
    "float16": ("float16", False, None, False),
    "float16, checkpointing": ("float16", True, None, False),
    "float32, all maps kept": ("float32", False, None, True),
}


def one_step(name: str, size: int, device: str, stand_in: bool) -> dict[str, float]:
    """Builds the network and takes one guided step; returns gigabytes and seconds."""
    arithmetic: Any = StandInArithmetic() if stand_in else nullcontext()
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
        from tests.guidance.plain_reference import PlainSettings, plain_noise

        settings = PlainSettings(feature_layer="up_blocks.3")
        with arithmetic:
            plain_noise(unet, latents, reference, 500, (negative, source, target), settings, guided=True)
    else:
        guiders = [SelfAttentionEnergy(max_attention_resolution=resolution), FeatureEnergy()]
        with arithmetic:
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
    memory = {"peak_gb": round(peak / 1e9, 2), "weights_gb": round(weights / 1e9, 2)}
    return memory if stand_in else {**memory, "seconds": round(seconds, 1)}


def in_own_process(name: str, size: int, device: str, stand_in: bool) -> dict[str, Any]:
    """`one_step` in a process that does nothing else."""
    command = [sys.executable, __file__, "--row", name, "--size", str(size), "--device", device]
    done = subprocess.run(command + ["--stand-in"] * stand_in, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute", nargs="*", choices=list(ROWS), default=["float32"], help="rows that are computed")
    parser.add_argument("--row", choices=list(ROWS), help="run this one here and print it as JSON")
    parser.add_argument("--stand-in", action="store_true", help="with --row: leave out the arithmetic")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(one_step(options.row, options.size, options.device, options.stand_in)))
        return
    on_cpu = torch.device(options.device).type == "cpu"
    table: dict[str, dict[str, Any]] = {}
    for name in [name for name in ROWS if not ROWS[name][3] or options.size <= 256]:
        kinds = {"without arithmetic": True} if on_cpu else {}
        kinds |= {"computed": False} if name in options.compute or not on_cpu else {}
        table[name] = {
            kind: in_own_process(name, options.size, options.device, stand_in) for kind, stand_in in kinds.items()
        }
        print(f"{name:45s} {table[name]}", flush=True)
    write_result(f"guidance_memory_{options.size}", {"size": options.size, "device": options.device, "rows": table})


if __name__ == "__main__":
    main()

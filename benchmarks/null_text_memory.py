"""Peak memory of null-text optimisation: on the demo model, and on a network of the size of Stable Diffusion 1.x at 512 pixels.

    python benchmarks/null_text_memory.py                 # five minutes on two cores, 16 GB

Every row runs in a process of its own that does nothing else, and the figure is the largest resident set of that process, weights,
libraries and all (on a GPU: what torch had allocated at most). The demo model is computed, whole pipeline included. The large
network has random weights, on which memory does not depend, and does one step, after which memory grows no more; on a CPU it is
run without its arithmetic (`stand_in_arithmetic.py`), which holds the same tensors. The text encoder and the autoencoder of the
large model are not built: with `enable_model_cpu_offload()` they are away while the optimisation runs, else they add 0.8 GB
in float32.
"""

import argparse
import json
import resource
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch
from common import MODEL, write_result
from diffusers import DDIMScheduler, UNet2DConditionModel
from stand_in_arithmetic import StandInArithmetic

from diffusers_ext import NullTextInversionPipeline
from diffusers_ext.inversion import DDIMLadder, Denoiser, null_text_inversion


# name -> (whether it is the demo model, dtype, gradient checkpointing)
ROWS: dict[str, tuple[bool, str, bool]] = {
    "demo model, float32": (True, "float32", False),
    "demo model, float32, checkpointing": (True, "float32", True),
    "Stable Diffusion 1.x, float32": (False, "float32", False),
    "Stable Diffusion 1.x, float32, checkpointing": (False, "float32", True),
    "Stable Diffusion 1.x, float16": (False, "float16", False),
    "Stable Diffusion 1.x, float16, checkpointing": (False, "float16", True),
}


def peak(device: str) -> int:
    if torch.device(device).type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def of_demo_model(device: str, checkpointing: bool) -> dict[str, float]:
    pipe = NullTextInversionPipeline.from_pretrained(MODEL, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))

    def invert(method: str) -> None:
        pipe.invert(picture, "a red star on a blue background", method, 2, gradient_checkpointing=checkpointing)

    invert("ddim")
    before = peak(device)
    invert("null_text")
    return {"peak_gb": round(peak(device) / 1e9, 3), "over_ddim_gb": round((peak(device) - before) / 1e9, 3)}


def of_large_network(device: str, dtype_name: str, checkpointing: bool) -> dict[str, float]:
    dtype = getattr(torch, dtype_name)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        ).eval().requires_grad_(False)  # fmt: skip
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return unet(latents, timestep, embeddings).sample

    generator = torch.Generator().manual_seed(0)
    latents, source, null = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((1, 4, 64, 64), (1, 77, 768), (1, 77, 768))
    )
    ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 1)
    arithmetic: Any = StandInArithmetic() if torch.device(device).type == "cpu" else nullcontext()
    with arithmetic:
        null_text_inversion(Denoiser(network, source, null, dtype), latents, ladder, early_stop=0.0)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"peak_gb": round(peak(device) / 1e9, 2), "weights_gb": round(weights / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--row", choices=list(ROWS), help="run this one here and print it as JSON")
    options = parser.parse_args()
    if options.row:
        is_demo, dtype_name, checkpointing = ROWS[options.row]
        if is_demo:
            print(json.dumps(of_demo_model(options.device, checkpointing)))
        else:
            print(json.dumps(of_large_network(options.device, dtype_name, checkpointing)))
        return
    table: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name, "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            table[name] = {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "killed"}
        else:
            table[name] = dict(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{name:50s} {table[name]}", flush=True)
    write_result("null_text_memory", {"device": options.device, "rows": table})


if __name__ == "__main__":
    main()

r"""What a student of guidance distillation learns from, and the student, in the layouts of Stable Diffusion and SDXL.

Their pipelines guide by uncond + s (cond - uncond) with s = `guidance_scale`, in two passes. To a UNet with
a `time_cond_proj_dim` they tell w = s - 1 instead and make one pass. The student has this input, so that they run it:
    loss = mean ||student(x_t, t, prompt, w) - (uncond + (w + 1) (cond - uncond))||^2 over points x_t of guided runs.
"""

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from ...integrity import atomic_write
from ..data import Source
from ..latents import digest_name, read_kept
from ..objectives import stratified_uniform
from ..streams import stream
from .checks import check_levels, check_range
from .families.unets import own_settings
from .guidance import guided_trajectory
from .teachers import DistilledUNet, Teacher, with_guidance_input


logger = logging.getLogger(__name__)

HELD_OUT_RUNS = 24
SAMPLE_BATCH = 64


class PointBatch(NamedTuple):
    """Points of guided runs: what the network reads, and what guidance makes of its two predictions."""

    sample: torch.Tensor
    timesteps: torch.Tensor
    input_ids: torch.Tensor
    scale: torch.Tensor
    guided: torch.Tensor

    def rows(self, chosen: slice) -> "PointBatch":
        """Some of the points."""
        return PointBatch(*(part[chosen] for part in self))


def sample_runs(
    teacher: Teacher,
    input_ids: torch.Tensor,
    scale: torch.Tensor,
    num_inference_steps: int,
    latent_shape: tuple[int, int, int],
    seed: int,
) -> dict[str, torch.Tensor]:
    """Runs the teacher with guidance and its own scheduler, and keeps every point.

    Args:
        teacher: The frozen teacher.
        input_ids: Token ids of the prompts (n, length).
        scale: `guidance_scale` of each run (n,), 1 or more.
        num_inference_steps: Steps of a run.
        latent_shape: Channels, height and width of the latents.
        seed: Of the noise that the runs begin with.

    Returns:
        `sample` and `guided` (n, points, c, h, w), in half precision: its rounding is about 1e-7 of the squared norm, and
        a student is content with 1e-2. `timesteps` (points,), `scale` (n,), both float32, and `input_ids` (n, length).

    Raises:
        ValueError: For arguments out of range, or if a run leaves the numbers that half precision has.
    """
    pipeline, device = teacher.pipeline, teacher.pipeline.device
    scheduler = pipeline.scheduler
    check_range("num_inference_steps", num_inference_steps, 1, teacher.schedule.num_train_timesteps)
    check_levels(input_ids, scale=scale)
    check_range("scale", float(scale.min()), 1.0)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.float()
    noise = torch.randn((len(scale), *latent_shape), generator=stream(seed, 0, "runs")) * scheduler.init_noise_sigma
    sample = torch.empty((len(scale), len(timesteps), *latent_shape), dtype=torch.float16)
    guided = torch.empty_like(sample)
    for first in range(0, len(scale), SAMPLE_BATCH):
        rows = slice(first, first + SAMPLE_BATCH)
        words = teacher.embeddings(input_ids[rows])

        def denoise(latents: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return teacher.predictions(latents, timestep.to(device).repeat(len(latents)), words)  # noqa: B023

        run = guided_trajectory(
            scheduler, denoise, noise[rows].to(device), scale[rows].to(device), num_inference_steps,
            pipeline.prepare_extra_step_kwargs(stream(seed, first, "runs-steps"), 0.0),
        )  # fmt: skip
        for i, point in enumerate(run):
            sample[rows, i], guided[rows, i] = point.sample.half().cpu(), point.guided.half().cpu()
        if not bool(torch.isfinite(sample[rows]).all() and torch.isfinite(guided[rows]).all()):
            raise ValueError(
                f"guided runs of the teacher with a guidance_scale of up to {float(scale[rows].max()):g} are not finite "
                f"in half precision; lower w_max"
            )
    return {
        "sample": sample, "guided": guided, "timesteps": timesteps.cpu(), "scale": scale.float(), "input_ids": input_ids
    }  # fmt: skip


class GuidedPoints:
    """The points of guided runs, sampled once and kept in a file; the last runs are held out.

    Args:
        file: Where they are kept between runs of the script; the name should tell all that they depend on.
        accelerator: One process samples, the others wait.
        teacher: The frozen teacher.
        input_ids: Token ids of the prompts (n, length).
        scale: `guidance_scale` of each run (n,).
        num_inference_steps: Steps of a run.
        latent_shape: Channels, height and width of the latents.
        seed: Of the noise that the runs begin with.
        held_out: Number of runs, at the end, that are not trained on; less than n.

    Raises:
        ValueError: If `file` is not what it should be.
    """

    def __init__(
        self,
        file: Path,
        accelerator: Accelerator,
        teacher: Teacher,
        input_ids: torch.Tensor,
        scale: torch.Tensor,
        num_inference_steps: int,
        latent_shape: tuple[int, int, int],
        seed: int,
        held_out: int,
    ):
        check_range("held_out", held_out, 0, len(scale) - 1)
        if accelerator.is_main_process and not file.is_file():
            began = time.monotonic()
            logger.info("sampling %d guided runs of %d steps", len(scale), num_inference_steps)
            runs = sample_runs(teacher, input_ids, scale, num_inference_steps, latent_shape, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, save({name: value.contiguous() for name, value in runs.items()}))
            logger.info("sampled them in %.0f s", time.monotonic() - began)
        accelerator.wait_for_everyone()
        teacher.pipeline.scheduler.set_timesteps(num_inference_steps)
        points = len(teacher.pipeline.scheduler.timesteps)
        shape = (len(scale), points, *latent_shape)
        wanted = {
            "sample": shape, "guided": shape, "timesteps": (points,), "scale": (len(scale),),
            "input_ids": tuple(input_ids.shape),
        }  # fmt: skip
        self._runs = read_kept(file, "sample the guided runs again")
        found = {name: tuple(value.shape) for name, value in self._runs.items()}
        if found != wanted:
            odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))[0]
            raise ValueError(
                f"{file} holds {odd} of shape {found.get(odd)}, not {wanted.get(odd)}; "
                f"remove it to sample the guided runs again"
            )
        if not all(bool(torch.isfinite(self._runs[name]).all()) for name in ("sample", "guided", "scale")):
            raise ValueError(f"{file} holds numbers that are not finite; remove it to sample the guided runs again")
        self._points = points
        self._trained = (len(scale) - held_out) * points

    def __len__(self) -> int:
        """Number of points to train on."""
        return self._trained

    def __getitem__(self, keys: torch.Tensor) -> PointBatch:
        """The points of these numbers, float32."""
        runs = self._runs
        run, step = keys // self._points, keys % self._points
        return PointBatch(
            runs["sample"][run, step].float(), runs["timesteps"][step], runs["input_ids"][run], runs["scale"][run],
            runs["guided"][run, step].float(),
        )  # fmt: skip

    def held_out(self) -> PointBatch:
        """All points of the runs that are not trained on."""
        return self[torch.arange(self._trained, len(self._runs["scale"]) * self._points)]


def make_points(args: Namespace, teacher: Teacher, source: Source, accelerator: Accelerator) -> GuidedPoints:
    """The points that the script trains on: `--num_trajectories` runs of training captions, some of held-out ones."""
    factor = teacher.pipeline.vae_scale_factor
    if args.resolution % factor:
        raise ValueError(f"resolution={args.resolution} must be a multiple of the autoencoder's factor {factor}")
    latent_shape = (teacher.unet.config.in_channels, args.resolution // factor, args.resolution // factor)
    prompts = source.captions(source.draw(0, args.num_trajectories), 0)
    prompts += source.captions(source.draw(0, HELD_OUT_RUNS, "held_out"))
    input_ids = teacher.tokens(prompts)
    uniform = torch.cat(
        [
            stratified_uniform(count, stream(args.seed, 0, f"guidance-{split}"))
            for split, count in (("train", args.num_trajectories), ("held_out", HELD_OUT_RUNS))
        ]
    )
    scale = (args.w_min + uniform * (args.w_max - args.w_min)).float()
    scheduler = teacher.pipeline.scheduler
    settings = {
        "input_ids": input_ids.tolist(), "empty": teacher.tokens([""]).tolist(), "scale": scale.tolist(),
        "seed": args.seed, "steps": args.trajectory_steps, "latent_shape": latent_shape,
        "scheduler": type(scheduler).__name__,
        "config": own_settings(scheduler),
    }  # fmt: skip
    name = digest_name("guided", settings, teacher.unet, *teacher.text_encoders)
    return GuidedPoints(
        Path(args.output_dir) / name, accelerator, teacher, input_ids, scale, args.trajectory_steps, latent_shape,
        args.seed, HELD_OUT_RUNS,
    )  # fmt: skip


class GuidanceStudent(DistilledUNet):
    """The teacher's UNet with an input for the guidance: a full copy, or a LoRA and the input's projection on top of it.

    Before training it ignores the input and predicts what the teacher predicts with the prompt.

    Args:
        teacher: The frozen teacher; with a LoRA its UNet is exchanged for the one that student and teacher share.
        lora_rank: Rank of the LoRA; `None` trains a full copy.
        time_cond_proj_dim: Width of the guidance embedding, 4 or more.
        seed: Seed of the LoRA's initial weights.
    """

    def __init__(self, teacher: Teacher, lora_rank: int | None, time_cond_proj_dim: int = 256, seed: int = 0):
        check_range("time_cond_proj_dim", time_cond_proj_dim, 4)
        if lora_rank is not None:
            teacher.pipeline.unet = with_guidance_input(teacher.unet, time_cond_proj_dim).eval()
        super().__init__(teacher, lora_rank, time_cond_proj_dim, seed)
        projection: nn.Module = self.unet.time_embedding.cond_proj
        projection.requires_grad_(True)

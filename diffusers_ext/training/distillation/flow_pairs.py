r"""Pairs (eps, x_0) that the ODE of a flow connects: what ReFlow (arXiv 2209.03003) trains the next flow on.

With v = v(x, 1) + g (v(x, c) - v(x, 1)) the guided velocity of the teacher and sigma_0 = 1 > ... > sigma_N = 0 the levels of its solver,
    x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v(x_k, sigma_k),     x_0 = eps  ->  x_N = the clean sample.
A student of the pairs has the guidance g in its weights. Pairs of real samples (Simple ReFlow, arXiv 2410.07815) come from the same ODE
backwards, and only without guidance. Real samples are none of a guided ODE: run backwards from them it ends in noise that is not normal
(on emoji-scenes-flow with g = 3 of deviation 1.7 and correlation .5 between neighbours, with g = 1 of .9 and .04). Another ODE, one without
guidance, is no way out: it connects the same noise with other samples, and a flow learns the mean of paths that cross.
"""

import copy
import hashlib
import logging
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..data import Source
from ..latents import digest_name, read_kept
from ..parts import make_in_parts
from ..streams import epoch_rows, stream
from .checks import check_range, check_same_shape
from .families import StableDiffusion
from .lcm import guided
from .reflow import mixed_pairs, straightness
from .teachers import Teacher


logger = logging.getLogger(__name__)

# (sample, timesteps (n,)) -> velocity
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PAIR_BATCH = 64
# what an interrupted simulation loses at most, in seconds
SAVE_SECONDS = 60.0


def euler_path(
    velocity: Velocity, start: torch.Tensor, sigmas: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler's method along a flow, towards the sample (falling levels) or the noise (rising).

    Args:
        velocity: From samples (n, ...) and timesteps (n,) to d x / d sigma.
        start: Where the paths begin (n, ...).
        sigmas: Levels of the path (steps + 1,), in [0, 1].
        timesteps: What the network is told at the beginning of each step (steps,).

    Returns:
        The ends (n, ...) and the velocities that were used (steps, n, ...).

    Raises:
        ValueError: If `sigmas` is not one longer than `timesteps`, or there is no step.

    Example:
        >>> end, velocities = euler_path(lambda x, t: x, torch.ones(1, 1), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1000, 500]))
        >>> end.item(), velocities.flatten().tolist()
        (0.25, [1.0, 0.5])
    """
    if timesteps.ndim != 1 or not len(timesteps) or sigmas.shape != (len(timesteps) + 1,):
        raise ValueError(
            f"sigmas of shape {tuple(sigmas.shape)} and timesteps of shape {tuple(timesteps.shape)} are no path; "
            f"give one timestep a step, 1 or more, and one level more than that"
        )
    sample, used = start, []
    for timestep, length in zip(timesteps.tolist(), sigmas.double().diff().tolist()):
        used.append(velocity(sample, torch.full((len(sample),), timestep, device=sample.device)))
        sample = sample + length * used[-1]
    return sample, torch.stack(used)


def even_levels(steps: int, num_train_timesteps: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Falling levels 1 ... 0 of equally long steps, (steps + 1,), and the timesteps they begin at, (steps,).

    Example:
        >>> [part.tolist() for part in even_levels(2)]
        [[1.0, 0.5, 0.0], [1000.0, 500.0]]
    """
    check_range("steps", steps, 1)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    return sigmas, sigmas[:-1] * num_train_timesteps


def solver_levels(
    scheduler: Any, steps: int, family: StableDiffusion | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (steps + 1,) and timesteps (steps,) that a pipeline of this family, default Stable Diffusion, goes through."""
    check_range("steps", steps, 1, scheduler.config.num_train_timesteps)
    scheduler = copy.deepcopy(scheduler)
    (family or StableDiffusion()).set_timesteps(scheduler, steps)
    return scheduler.sigmas, scheduler.timesteps


def euler_scheduler(teacher: Teacher) -> SchedulerMixin:
    """The stock scheduler that runs Euler's method on the levels of a teacher's flow.

    Raises:
        ValueError: If the teacher is no flow.
    """
    if not teacher.schedule.is_flow:
        raise ValueError(
            f"the teacher predicts {teacher.schedule.prediction_type} on a diffusion schedule, and ReFlow straightens flows; "
            f"give a teacher of flow_prediction, for example of train_text_to_image.py --prediction_type flow"
        )
    return teacher.family.euler_scheduler(teacher.pipeline)


def guided_velocity(teacher: Teacher, words: torch.Tensor, guidance_scale: float) -> Velocity:
    """The velocity of a flow teacher for prompts.

    Args:
        teacher: A flow.
        words: Embeddings of the prompts (n, length, width).
        guidance_scale: As in the pipeline; 1 is one pass without guidance. A teacher that reads the guidance makes one pass with
            its own.
    """

    def velocity(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if guidance_scale == 1.0 or teacher.reads_guidance:
            return teacher.denoise(sample, timesteps, words)
        w = torch.full((len(sample),), guidance_scale - 1.0, device=sample.device)
        return guided(*teacher.predictions(sample, timesteps, words), w)

    return velocity


@torch.no_grad()
def measure_flow(
    velocity: Velocity,
    noise: torch.Tensor,
    steps: int,
    levels: tuple[torch.Tensor, torch.Tensor],
    wanted: torch.Tensor | None = None,
    num_train_timesteps: int = 1000,
) -> tuple[dict[str, float], torch.Tensor]:
    """How straight a flow is, and how far a few steps lead astray.

    Args:
        velocity: The flow.
        noise: Where its paths begin (n, ...).
        steps: Equal steps that stand for the exact path.
        levels: Levels and timesteps of the few steps.
        wanted: Where they should end, same shape as `noise`; default the flow's own ends.
        num_train_timesteps: Timestep of the noise.

    Returns:
        "straightness" S and "few_step_error", the mean squared distance from `wanted`; and the ends of the exact paths.

    Example:
        >>> metrics, _ = measure_flow(lambda x, t: torch.ones_like(x), torch.zeros(2, 1), 4, even_levels(1))
        >>> metrics
        {'straightness': 0.0, 'few_step_error': 0.0}
    """
    ends, velocities = euler_path(velocity, noise, *even_levels(steps, num_train_timesteps))
    wanted = ends if wanted is None else wanted
    check_same_shape(noise=noise, wanted=wanted)
    reached, _ = euler_path(velocity, noise, *levels)
    error = (reached - wanted).square().mean()
    return {"straightness": float(straightness(velocities, ends, noise)), "few_step_error": float(error)}, ends


class FlowPairs:
    """Pairs of noise and clean latents with their prompts, simulated once and kept in one file of the run's folder.

    The name of the file tells all that the pairs depend on. What is done while they are simulated is kept beside it, and an
    interrupted simulation goes on there. All processes share the work.

    Args:
        args: `output_dir`, `seed`, `num_pairs`, `teacher_steps`, `teacher_guidance_scale`, `inverted_share` and those of
            `add_data_arguments`.
        source: Where prompts come from, and pictures to invert.
        teacher: A flow, still without adapters: its weights are part of the name.
        scheduler: Its solver, of `euler_scheduler`.
        shape: Of one latent (c, h, w).

    Raises:
        ValueError: For pairs of real pictures with guidance.
    """

    def __init__(
        self,
        args: Namespace,
        source: Source,
        teacher: Teacher,
        scheduler: SchedulerMixin,
        shape: tuple[int, ...],
    ):
        if args.inverted_share and args.teacher_guidance_scale != 1.0:
            raise ValueError(
                f"inverted_share={args.inverted_share:g} needs teacher_guidance_scale=1, not {args.teacher_guidance_scale:g}: real "
                f"pictures are no samples of a guided flow; set either"
            )
        self.seed, self.length, self.share = args.seed, args.num_pairs, args.inverted_share
        self.source, self.teacher, self.shape = source, teacher, tuple(shape)
        self.guidance_scale = args.teacher_guidance_scale
        self.sigmas, self.timesteps = solver_levels(scheduler, args.teacher_steps, teacher.family)
        # a pair of either kind is seen about equally often
        self.inverted = math.ceil(self.share * self.length)
        prompts = source.captions(source.draw(0, self.length), 0)
        if self.inverted:
            self._pictures = source.draw(1, self.inverted)
            prompts += source.captions(self._pictures, 1)
        self.input_ids = teacher.tokens(prompts)
        settings = {
            "levels": [self.sigmas.tolist(), self.timesteps.tolist()],
            "prompts": hashlib.sha256(self.input_ids.numpy().tobytes()).hexdigest(),
            "shape": self.shape,
            **{
                name: getattr(args, name) for name in ("seed", "num_pairs", "teacher_guidance_scale", "inverted_share")
            },
        }
        models = [teacher.unet, *teacher.text_encoders]
        if self.inverted:
            names = ("dataset_name", "train_data_dir", "vendors", "objects", "resolution", "image_column")
            settings.update({name: getattr(args, name) for name in names})
            models.append(teacher.pipeline.vae)
        self.file = Path(args.output_dir) / digest_name("pairs", settings, *models)

    def prepare(self, accelerator: Accelerator) -> None:
        """Simulates what is not there yet, and loads the pairs.

        Raises:
            ValueError: If the file is not what it should be, or the teacher's samples are not finite.
            OSError: If it cannot be written.
        """
        if not self.file.is_file():
            self._simulate(accelerator)
        accelerator.wait_for_everyone()
        tensors = self._read(self.file, ("clean", "noise", "input_ids"), len(self.input_ids))
        self._clean, self._noise = tensors["clean"], tensors["noise"]
        logger.info("%d pairs in %s", len(self.input_ids), self.file.name)

    def draw(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The global batch of a step: clean latents and their noise (n, c, h, w), float32, and token ids (n, length)."""
        rows = epoch_rows(self.seed, step * count, count, self.length, "pairs")
        clean, noise, input_ids = self._clean[rows].float(), self._noise[rows].float(), self.input_ids[rows]
        if self.inverted:
            rows = self.length + epoch_rows(self.seed, step * count, count, self.inverted, "inverted-pairs")
            take = torch.rand(count, generator=stream(self.seed, step, "take-inverted")) < self.share
            real = self._clean[rows].float(), self._noise[rows].float()
            clean, noise = mixed_pairs((clean, noise), real, take)
            input_ids = torch.where(take[:, None], self.input_ids[rows], input_ids)
        return clean, noise, input_ids

    @torch.no_grad()
    def _pairs(self, rows: torch.Tensor) -> torch.Tensor:
        """Clean latents and noise of rows that are all simulated or all inverted, (n, 2, c, h, w), rounded as they are kept."""
        device = self.teacher.pipeline.device
        velocity = guided_velocity(self.teacher, self.teacher.embeddings(self.input_ids[rows]), self.guidance_scale)
        # the end that is given is rounded first, so that the other one belongs to exactly what is kept
        if rows[0] < self.length:
            drawn = [torch.randn(self.shape, generator=stream(self.seed, row, "pair-noise")) for row in rows.tolist()]
            noise = torch.stack(drawn).half().float().to(device)
            clean, _ = euler_path(velocity, noise, self.sigmas, self.timesteps)
        else:
            pictures = self.source.images(self._pictures[rows - self.length])
            clean = self.teacher.encode(pictures).half().float()
            rising = self.sigmas.flip(0)
            noise, _ = euler_path(velocity, clean, rising, rising[:-1] * self.teacher.schedule.num_train_timesteps)
        return torch.stack([clean, noise], 1).half()

    def _simulate(self, accelerator: Accelerator) -> None:
        def finish(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            clean, noise = made["pairs"].unbind(1)
            return {"clean": clean, "noise": noise, "input_ids": self.input_ids}

        make_in_parts(
            self.file, lambda rows: {"pairs": self._pairs(rows)}, finish, (self.length, len(self.input_ids)),
            accelerator, what="pairs", size=PAIR_BATCH, save_seconds=SAVE_SECONDS,
        )  # fmt: skip

    def _read(self, file: Path, names: tuple[str, ...], length: int) -> dict[str, torch.Tensor]:
        tensors = read_kept(file, "simulate the pairs again")
        lengths = {len(tensors[name]) if name in tensors and tensors[name].ndim else None for name in names}
        if lengths != {length}:
            raise ValueError(f"{file} does not hold {length} pairs of this run; remove it to simulate them again")
        return tensors

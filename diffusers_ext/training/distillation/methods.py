"""The consistency methods of `training/train_consistency.py`: what each draws for a batch, and its loss on networks in latent space.

Everything random is drawn for the global batch from counter-based streams, as tensors with one row a sample, and sliced by the processes.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from ..coupling import couple, draw_noise
from ..objectives import stratified_uniform
from ..streams import stream
from .ctm import latent_ctm_loss
from .lcm import lcm_loss
from .slct import LevelPairs, draw_pairs, slct_loss
from .teachers import Teacher


# (noisy latents, timesteps, embeddings of the prompts, number told a sample or None) -> prediction
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# what the input for guidance is told of a timestep, so that the embedding is that of the timestep itself
TIMESTEP_SHARE = 1e-3


class ConsistencyMethod(Protocol):
    """What the script asks of a method."""

    averaged_target: bool
    """Whether the target is the moving average of the student, where there is one, or the student itself."""

    def draws(self, shape: tuple[int, ...], step: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """The random numbers of a step, each (n, ...), for latents of this shape (n, c, h, w)."""

    def loss(
        self, student: Network, target: Network, latents: torch.Tensor, words: torch.Tensor, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """Loss of a batch of clean latents (n, c, h, w) with embeddings (n, length, width) of their prompts."""


class LatentConsistencyDistillation:
    """LCM: the student follows one guided step of the teacher's solver.

    Args:
        teacher: The frozen teacher.
        seed: Seed of the run.
        w_min: Least guidance.
        w_max: Most guidance.
        num_ddim_timesteps: Steps of the solver.
        huber_c: c of the loss.
        timestep_scaling: Of the boundary condition.
    """

    averaged_target = True

    def __init__(
        self,
        teacher: Teacher,
        seed: int,
        w_min: float,
        w_max: float,
        num_ddim_timesteps: int,
        huber_c: float,
        timestep_scaling: float,
    ):
        self.teacher, self.seed, self.guidance = teacher, seed, (w_min, w_max)
        self.steps, self.huber_c, self.timestep_scaling = num_ddim_timesteps, huber_c, timestep_scaling

    def draws(self, shape: tuple[int, ...], step: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """Noise, solver steps and guidance."""
        noise = torch.randn(shape, generator=stream(self.seed, step, f"{name}noise"))
        rows = stratified_rows(shape[0], self.steps, self.seed, step, name)
        low, high = self.guidance
        w = torch.rand(shape[0], generator=stream(self.seed, step, f"{name}guidance"))
        return noise, rows, low + w * (high - low)

    def loss(
        self, student: Network, target: Network, latents: torch.Tensor, words: torch.Tensor, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """As `lcm_loss`."""
        noise, rows, w = drawn
        return lcm_loss(
            self.teacher.schedule, lambda x, t: student(x, t, words, w), lambda x, t: target(x, t, words, w),
            lambda x, t: self.teacher.predictions(x, t, words), latents, noise, rows, w, self.steps, self.huber_c,
            self.timestep_scaling,
        )  # fmt: skip


class LatentConsistencyTraining:
    """sLCT: two noise levels of one picture stand in for the teacher's solver, on ever more levels.

    Args:
        teacher: Gives the schedule; its network is where the student started and is not asked again.
        seed: Seed of the run.
        total: Steps of the run.
        start_levels: Intervals at the start.
        end_levels: Intervals at the end.
        kind: The distance, "cauchy" or "pseudo_huber".
        noise_coupling: A word of `COUPLINGS`.
        timestep_scaling: Of the boundary condition.
    """

    averaged_target = False

    def __init__(
        self,
        teacher: Teacher,
        seed: int,
        total: int,
        start_levels: int,
        end_levels: int,
        kind: str,
        noise_coupling: str,
        timestep_scaling: float,
    ):
        self.schedule, self.seed, self.total, self.levels = teacher.schedule, seed, total, (start_levels, end_levels)
        self.kind, self.noise_coupling, self.timestep_scaling = kind, noise_coupling, timestep_scaling

    def draws(self, shape: tuple[int, ...], step: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """Noise, neighbouring timesteps, weights, and the number of levels."""
        noise = draw_noise(self.noise_coupling, shape, stream(self.seed, step, f"{name}noise"))
        generator = stream(self.seed, step, f"{name}timesteps")
        pairs = draw_pairs(self.schedule, shape[0], step, self.total, generator, *self.levels)
        return noise, pairs.timesteps, pairs.earlier, pairs.weights, torch.full((shape[0],), pairs.levels)

    def loss(
        self, student: Network, target: Network, latents: torch.Tensor, words: torch.Tensor, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """As `slct_loss`."""
        noise, timesteps, earlier, weights, levels = drawn
        noise = couple(self.noise_coupling, latents, noise)
        return slct_loss(
            self.schedule, lambda x, t: student(x, t, words, None), lambda x, t: target(x, t, words, None), latents,
            noise, LevelPairs(timesteps, earlier, weights, int(levels[0])), self.kind, self.timestep_scaling,
        )  # fmt: skip


class ConsistencyTrajectory:
    """CTM: the student jumps from any of the solver's timesteps to any lower one, of which it is told.

    Args:
        teacher: The frozen teacher.
        seed: Seed of the run.
        w: Guidance that is built in.
        num_ddim_timesteps: Steps of the solver.
        huber_c: c of the loss.
        denoising_weight: Weight of the denoiser's loss.
    """

    averaged_target = True

    def __init__(
        self,
        teacher: Teacher,
        seed: int,
        w: float,
        num_ddim_timesteps: int,
        huber_c: float,
        denoising_weight: float,
    ):
        self.teacher, self.seed, self.w, self.steps = teacher, seed, w, num_ddim_timesteps
        self.huber_c, self.denoising_weight = huber_c, denoising_weight

    def draws(self, shape: tuple[int, ...], step: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """Noise, where jumps start, and where they end."""
        noise = torch.randn(shape, generator=stream(self.seed, step, f"{name}noise"))
        rows = stratified_rows(shape[0], self.steps, self.seed, step, name)
        uniform = torch.rand(shape[0], generator=stream(self.seed, step, f"{name}ends"))
        return noise, rows, torch.minimum((uniform * (rows + 1)).long(), rows)

    def loss(
        self, student: Network, target: Network, latents: torch.Tensor, words: torch.Tensor, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """As `latent_ctm_loss`."""
        noise, rows, ends = drawn
        twice = words.repeat(2, 1, 1)
        return latent_ctm_loss(
            self.teacher.schedule, lambda x, t, s: student(x, t, twice, s * TIMESTEP_SHARE),
            lambda x, t, s: target(x, t, words, s * TIMESTEP_SHARE), lambda x, t: self.teacher.predictions(x, t, words),
            latents, noise, rows, ends, torch.full_like(rows, self.w, dtype=torch.float32), self.steps, self.huber_c,
            self.denoising_weight,
        )  # fmt: skip


def stratified_rows(count: int, steps: int, seed: int, step: int, name: str) -> torch.Tensor:
    """Solver steps of a batch (count,), from 0 to `steps` - 1, that together cover it evenly."""
    uniform = stratified_uniform(count, stream(seed, step, f"{name}timesteps"))
    return (uniform * steps).long().clamp(max=steps - 1)

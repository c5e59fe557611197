"""The methods of `training/train_dmd.py`: what each draws for a batch, its two losses, and what samples its student.

Everything random is drawn for the global batch from counter-based streams, as tensors with one row a sample, and sliced by
the processes.
"""

from argparse import Namespace
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from ..objectives import per_sample, stratified_uniform
from ..streams import stream
from .cdm import (
    clamp_sigma,
    covering_range,
    direction_loss,
    dynamic_schedule,
    extrapolate,
    guidance_direction,
    matching_direction,
    schedule_length,
)
from .checks import check_range
from .dmd import few_step_timesteps
from .f_divergence import DensityRatioWeights
from .flow_pairs import euler_scheduler, solver_levels
from .matching import MatchingBatch, MatchingNetworks, fake_loss, student_loss
from .teachers import Teacher, few_step_scheduler


# of the noise added to the student's samples in the student's turn: for the three terms
GUIDANCE, ON, OFF = range(3)


class MatchingMethod(Protocol):
    """What the script asks of a method. `real` are latents of pictures (n, c, h, w), or `None` if it needs none."""

    scheduler: SchedulerMixin
    """What the student is sampled with."""
    family: type[DiffusionPipeline] | None
    """Class of the pipeline that samples it; `None` for the teacher's."""
    timesteps: list[float]
    """Of the student, from the noisiest on."""
    needs_pictures: bool
    backward_simulation: bool
    """As `MatchingNetworks` asks."""

    def draws(self, shape: tuple[int, ...], step: int) -> tuple[torch.Tensor, ...]:
        """The random numbers of a turn, each (n, ...), for latents of this shape (n, c, h, w)."""

    def fake_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """Loss of fake score and discriminator, with embeddings (n, length, width) of the prompts."""

    def student_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """Loss of the student."""


class DistributionMatching:
    """DMD2 and f-distill: the losses of `matching`.

    Args:
        teacher: The frozen teacher.
        seed: Seed of the run.
        num_denoising_steps: Steps of the student.
        guidance_scale: Of the teacher.
        gan_weight: Weight of the adversarial loss, 0 or more.
        discriminator_weight: Weight of the discriminator's loss.
        backward_simulation: As in `MatchingNetworks`.
        weights: Of an f-divergence; `None` is reverse KL.

    Raises:
        ValueError: If diffusers has no scheduler that samples such a student.
    """

    family: type[DiffusionPipeline] | None = None
    transport_lambda = 0.0

    def __init__(
        self,
        teacher: Teacher,
        seed: int,
        num_denoising_steps: int,
        guidance_scale: float,
        gan_weight: float,
        discriminator_weight: float,
        backward_simulation: bool = True,
        weights: DensityRatioWeights | None = None,
    ):
        self.scheduler, self.timesteps = matching_sampler(teacher, num_denoising_steps)
        self.backward_simulation = backward_simulation
        self.needs_pictures = bool(gan_weight) or not backward_simulation
        self.teacher, self.seed, self.steps, self.guidance_scale = teacher, seed, num_denoising_steps, guidance_scale
        self.gan_weight, self.discriminator_weight, self.weights = gan_weight, discriminator_weight, weights

    def draws(self, shape: tuple[int, ...], step: int) -> tuple[torch.Tensor, ...]:
        """Noise of the path, the step that is trained, noise for samples and pictures, and timesteps."""
        path = torch.randn((self.steps, *shape), generator=stream(self.seed, step, "path"), dtype=torch.float32)
        last = int(torch.randint(self.steps, (), generator=stream(self.seed, step, "last")))
        noise, real_noise = torch.randn((2, *shape), generator=stream(self.seed, step, "noise"))
        uniform = stratified_uniform(shape[0], stream(self.seed, step, "timesteps"))
        return path.transpose(0, 1), torch.full((shape[0],), last), noise, uniform, real_noise

    def fake_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """As `matching.fake_loss`."""
        return fake_loss(networks, self._batch(words, real, *drawn), self.discriminator_weight)

    def student_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """As `matching.student_loss`."""
        batch = self._batch(words, real, *drawn)
        return student_loss(
            networks, self.teacher, batch, self.guidance_scale, self.gan_weight, self.weights, self.transport_lambda
        )

    @staticmethod
    def _batch(words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor) -> MatchingBatch:
        path, last, noise, uniform, real_noise = drawn
        return MatchingBatch(words, path.transpose(0, 1), int(last[0]), noise, uniform, real, real_noise)


class RegularizedMatching(DistributionMatching):
    """RDMD: one step that translates a picture into one that the teacher's prompt fits, at a cost of transport.

    The step is the last of `num_denoising_steps`, from the picture noised to its timestep: what the image-to-image pipeline of the
    teacher's family does with a strength of 1 / `num_denoising_steps`. The paper's generator reads the picture without noise, which no stock
    pipeline does. `real` are latents of the pictures that are translated.

    Args:
        teacher: The frozen teacher, which knows the wanted pictures.
        seed: Seed of the run.
        num_denoising_steps: 2 or more; the more, the less a picture is noised.
        guidance_scale: Of the teacher.
        transport_lambda: Weight of the mean squared distance between latents and their translation, 0 or more.

    Raises:
        ValueError: If the teacher is a flow, or for numbers out of range.
    """

    def __init__(
        self, teacher: Teacher, seed: int, num_denoising_steps: int, guidance_scale: float, transport_lambda: float
    ):
        check_range("num_denoising_steps", num_denoising_steps, 2)
        check_range("transport_lambda", transport_lambda, 0.0)
        # refuses a flow, which no scheduler of diffusers noises again in its translating pipeline
        few_step_scheduler(teacher, num_denoising_steps, 10.0)
        super().__init__(teacher, seed, num_denoising_steps, guidance_scale, 0.0, 0.0, backward_simulation=False)
        self.transport_lambda, self.family = transport_lambda, teacher.family.translator_class

    def draws(self, shape: tuple[int, ...], step: int) -> tuple[torch.Tensor, ...]:
        """As in `DistributionMatching`, always with the last step."""
        path, last, *others = super().draws(shape, step)
        return path, torch.full_like(last, self.steps - 1), *others


class ContinuousMatching:
    r"""CDM: a student of a flow walks another schedule in every batch, and the terms of `cdm` train it at one of the steps.

    The walk is what the stock scheduler does, Euler's method from its first level on,
        x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v(x_k, sigma_k),
    and the inner levels are drawn from a range that holds those of the scheduler. Levels and step are drawn for each sample by
    itself; x_i and the point off the trajectory are inputs, through which no gradient goes. The guidance s of the teacher is in
    the first term: D_cond + (s - 1) (D_cond - D_uncond) is the sample that guidance leads to, so alpha = s - 1. A teacher that is
    told the guidance has it in its one pass, and there is no such term.

    Args:
        teacher: The frozen teacher, a flow.
        seed: Seed of the run.
        num_denoising_steps: Steps that the student is sampled with.
        guidance_scale: That the student learns to have built in, 1 or more; 1 leaves the first term out.
        longest_schedule: Most steps of a walk; each number from 1 on is as likely.

    Raises:
        ValueError: If the teacher is no flow, or for numbers out of range.
    """

    family: type[DiffusionPipeline] | None = None
    needs_pictures = False
    backward_simulation = True

    def __init__(
        self, teacher: Teacher, seed: int, num_denoising_steps: int, guidance_scale: float, longest_schedule: int = 28
    ):
        if not teacher.schedule.is_flow:
            raise ValueError(
                f"the teacher predicts {teacher.schedule.prediction_type} on a diffusion schedule, and CDM matches flows; give a "
                f"teacher of flow_prediction, for example of train_text_to_image.py --prediction_type flow"
            )
        check_range("guidance_scale", guidance_scale, 1.0)
        check_range("longest_schedule", longest_schedule, 1)
        self.scheduler = euler_scheduler(teacher)
        levels, timesteps = solver_levels(self.scheduler, num_denoising_steps, teacher.family)
        self.timesteps = timesteps.tolist()
        self.first, self.inner = float(levels[0]), covering_range(levels)
        self.teacher, self.seed, self.longest = teacher, seed, longest_schedule
        self.alpha = 0.0 if teacher.reads_guidance else guidance_scale - 1.0

    def draws(self, shape: tuple[int, ...], step: int) -> tuple[torch.Tensor, ...]:
        """Levels (n, K + 1) of the walks, the step of each that is trained, their starts, and for the terms noise
        (n, 3, c, h, w) and uniform draws (n, 4)."""
        count, steps = shape[0], schedule_length(self.seed, step, self.longest)
        generator = stream(self.seed, step, "levels")
        levels = torch.stack([dynamic_schedule(steps, generator, self.inner) for _ in range(count)])
        levels[:, 0] = self.first
        index = (stratified_uniform(count, stream(self.seed, step, "index")) * steps).long().clamp(max=steps - 1)
        start, *noise = torch.randn((4, *shape), generator=stream(self.seed, step, "noise"))
        uniform = [stratified_uniform(count, stream(self.seed, step, f"uniform-{i}")) for i in range(4)]
        return levels, index, start, torch.stack(noise, 1), torch.stack(uniform, 1)

    def fake_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """Flow matching on the student's clean samples at the trained steps of their walks."""
        levels, index, start, noise, uniform = drawn
        sample, sigma = self.walk(networks, words, levels, index, start)
        with torch.no_grad():
            clean, _ = self._clean(networks, sample, sigma, words)
        timesteps = self._timesteps(clamp_sigma(uniform[:, ON]))
        schedule = self.teacher.schedule
        prediction, _ = networks.judge(schedule.noisy(clean, noise[:, ON], timesteps), timesteps, words)
        return (prediction - schedule.target(clean, noise[:, ON], timesteps)).square().mean()

    def student_loss(
        self, networks: MatchingNetworks, words: torch.Tensor, real: torch.Tensor | None, *drawn: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the three terms."""
        return torch.stack(list(self.terms(networks, words, *drawn).values())).sum()

    def terms(self, networks: MatchingNetworks, words: torch.Tensor, *drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of each term by its name in the paper: "CA" (with guidance), "DM" and "CDM"."""
        levels, index, start, noise, uniform = drawn
        sample, sigma = self.walk(networks, words, levels, index, start)
        clean, velocity = self._clean(networks, sample, sigma, words)
        found = {}
        if self.alpha:
            noisy, timesteps = self._noised(clean, noise[:, GUIDANCE], uniform[:, GUIDANCE] * sigma)
            with torch.no_grad():
                both = [
                    self.teacher.schedule.clean(prediction.float(), noisy, timesteps)
                    for prediction in self.teacher.predictions(noisy, timesteps, words)
                ]
            found["CA"] = direction_loss(clean, guidance_direction(clean, both[0], both[1], self.alpha))
        found["DM"] = self._match(networks, clean, noise[:, ON], uniform[:, ON], words)
        off = clamp_sigma(uniform[:, 3])
        sample = extrapolate(sample, velocity.detach(), sigma, off)
        clean, _ = self._clean(networks, sample, off, words)
        found["CDM"] = self._match(networks, clean, noise[:, OFF], uniform[:, OFF], words)
        return found

    @torch.no_grad()
    def walk(
        self,
        networks: MatchingNetworks,
        words: torch.Tensor,
        levels: torch.Tensor,
        index: torch.Tensor,
        start: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Follows the student to one step of each walk.

        Args:
            networks: With the student.
            words: Embeddings of the prompts (n, length, width).
            levels: Falling levels of the walks (n, K + 1).
            index: The step to stop before, 0 ... K - 1, (n,).
            start: Noise (n, c, h, w).

        Returns:
            x_i (n, c, h, w) and sigma_i (n,).
        """
        sample = start
        # all the way, so that all processes make the same number of passes
        for k in range(levels.shape[1] - 2):
            _, velocity = self._clean(networks, sample, levels[:, k], words)
            moved = extrapolate(sample, velocity, levels[:, k], levels[:, k + 1])
            sample = torch.where(per_sample(k < index, sample).bool(), moved, sample)
        return sample, levels.gather(1, index[:, None])[:, 0]

    def _clean(
        self, networks: MatchingNetworks, sample: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's clean sample and its velocity."""
        timesteps = self._timesteps(sigma)
        velocity = networks.predict(sample, timesteps, words)
        return self.teacher.schedule.clean(velocity, sample, timesteps), velocity

    def _match(
        self,
        networks: MatchingNetworks,
        clean: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        words: torch.Tensor,
    ) -> torch.Tensor:
        noisy, timesteps = self._noised(clean, noise, sigma)
        with torch.no_grad():
            real = self.teacher.denoise(noisy, timesteps, words).float()
            fake, _ = networks.judge(noisy, timesteps, words)
        real, fake = (self.teacher.schedule.clean(velocity, noisy, timesteps) for velocity in (real, fake))
        return direction_loss(clean, matching_direction(clean, real, fake))

    def _noised(
        self, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        timesteps = self._timesteps(clamp_sigma(sigma))
        return self.teacher.schedule.noisy(clean.detach(), noise, timesteps), timesteps

    def _timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.teacher.schedule.num_train_timesteps


def matching_sampler(teacher: Teacher, num_denoising_steps: int) -> tuple[SchedulerMixin, list[float]]:
    """The stock scheduler that takes the student's clean sample and adds new noise to it, and the timesteps of its steps.

    Raises:
        ValueError: If the teacher is a flow, and diffusers has none for its pipeline.
    """
    if teacher.schedule.is_flow:
        scheduler = teacher.family.renoising_scheduler(teacher.pipeline, num_denoising_steps)
        _, timesteps = solver_levels(scheduler, num_denoising_steps, teacher.family)
        return scheduler, timesteps.tolist()
    # with as many original steps as it takes, the stock scheduler has the student's timesteps
    whole: list[float] = list(few_step_timesteps(num_denoising_steps, teacher.schedule.num_train_timesteps))
    return few_step_scheduler(teacher, num_denoising_steps, 10.0), whole


def make_matching_method(args: Namespace, teacher: Teacher, weights: DensityRatioWeights | None) -> MatchingMethod:
    """The method that the arguments of `training/train_dmd.py` name; `weights` are those of `--method fdistill`."""
    common = teacher, args.seed, args.num_denoising_steps, args.real_guidance_scale
    if args.method == "cdm":
        return ContinuousMatching(*common, args.longest_schedule)
    if args.method == "rdmd":
        return RegularizedMatching(*common, args.transport_lambda)
    return DistributionMatching(*common, args.gan_weight, args.discriminator_weight, args.backward_simulation, weights)

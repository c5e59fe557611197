r"""Training of a one- to four-step student by distribution matching: DMD2 (arXiv 2405.14867) and f-distill (arXiv 2502.15681).

The student maps noisy latents at the timesteps t_1 > ... > t_N to clean ones. What it meets at t_k in training is what it meets at
inference: its own output at t_{k-1}, noised (backward simulation). Student, fake score and teacher are three networks, or one frozen
network with two LoRA adapters. The head of the discriminator reads the bottleneck of the fake score.
    student: DMD gradient at a random timestep of [0.02 T, 0.98 T] + gan_weight softplus(-D)
    fake score and head: its own objective on the student's samples + discriminator_weight (softplus(D) + softplus(-D(real)))
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters import SharedBase
from ..alternating import Player
from .checks import check_range
from .dmd import dmd_gradient, few_step_timesteps, surrogate_loss, transport_cost
from .f_divergence import DensityRatioWeights
from .gan import DiscriminatorHead, captured, discriminator_loss, generator_loss
from .lcm import guided
from .teachers import STUDENT, Teacher, merged_unet


FAKE = "fake"
# of the training schedule, for the gradient of the student; the fake score learns all of it
TIMESTEP_SHARE = (0.02, 0.98)


@dataclass(frozen=True)
class MatchingBatch:
    """What a loss draws at random, and the prompts.

    Args:
        words: Embeddings of the prompts (n, length, width).
        path: Noise of the student's path, (steps, n, c, h, w): its start, and what is added before each later step.
        last: Step of the path that is trained, 0 ... steps - 1; the same on all processes.
        noise: Added to the student's samples, (n, c, h, w).
        uniform: Draws from [0, 1) for their timesteps, (n,).
        real: Latents of pictures (n, c, h, w); for the discriminator, or for paths that start from them.
        real_noise: Added to `real` for the discriminator.
    """

    words: torch.Tensor
    path: torch.Tensor
    last: int
    noise: torch.Tensor
    uniform: torch.Tensor
    real: torch.Tensor | None = None
    real_noise: torch.Tensor | None = None


class MatchingNetworks(nn.Module):
    """Student, fake score and discriminator.

    Args:
        teacher: The frozen teacher; with a LoRA its denoiser carries the adapters.
        num_denoising_steps: Steps of the student, 1 or more.
        lora_rank: Rank of both adapters; `None` trains two full copies.
        gan: Whether there is a discriminator.
        backward_simulation: Whether paths start from noise and follow the student; else from noised pictures.
        seed: Seed of the initial weights of adapters and head.
        timesteps: Of these steps, from the noisiest on; default those of `LCMScheduler`.

    Raises:
        ValueError: For a discriminator on a transformer.
    """

    def __init__(
        self,
        teacher: Teacher,
        num_denoising_steps: int,
        lora_rank: int | None,
        gan: bool = False,
        backward_simulation: bool = True,
        seed: int = 0,
        timesteps: Sequence[float] | None = None,
    ):
        super().__init__()
        if gan and not hasattr(teacher.unet, "mid_block"):
            raise ValueError(
                f"gan=True needs the bottleneck of a UNet, which a {type(teacher.unet).__name__} lacks; leave the discriminator out (--gan_weight 0)"
            )
        self.backward_simulation = backward_simulation
        self.family, self.schedule = teacher.family, teacher.schedule
        self.shift = teacher.family.shift(teacher.pipeline) if self.schedule.is_flow else 1.0
        self.timesteps = (
            few_step_timesteps(num_denoising_steps, self.schedule.num_train_timesteps)
            if timesteps is None
            else timesteps
        )
        self.base: SharedBase | None = None
        if lora_rank is None:
            self.student = copy.deepcopy(teacher.unet).requires_grad_(True)
            self.fake = copy.deepcopy(teacher.unet).requires_grad_(True)
        else:
            self.student = self.fake = teacher.unet
            self.base = SharedBase(teacher.unet, [STUDENT, FAKE], lora_rank, self.family.lora_layers, seed)
        self.head: DiscriminatorHead | None = None
        if gan:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head = DiscriminatorHead(teacher.unet.config.block_out_channels[-1]).to(teacher.unet.device)

    def players(
        self, learning_rate: float, fake_learning_rate: float, fake_update_ratio: int, fake_pull: float = 0.0
    ) -> dict[str, Player]:
        """Who learns what, in the order of a round.

        Args:
            learning_rate: Of the student.
            fake_learning_rate: Of fake score and discriminator.
            fake_update_ratio: Steps of the fake score for one of the student.
            fake_pull: Share of the way to the student that the fake score goes after each of its steps, in [0, 1].
        """
        trainable = [name for name, value in self.named_parameters() if value.requires_grad]
        if self.base:
            # the network has two names here, of which torch lists the first
            own = self.base.parameter_names(STUDENT, "student.")
        else:
            own = frozenset(name for name in trainable if name.startswith("student."))
        others = frozenset(trainable) - own
        return {
            FAKE: Player(
                others,
                fake_learning_rate,
                turns=fake_update_ratio,
                after_turn=partial(self.pull_fake, fake_pull) if fake_pull else None,
            ),
            STUDENT: Player(own, learning_rate, averaged=True),
        }

    @torch.no_grad()
    def pull_fake(self, share: float) -> None:
        """Moves the weights of the fake score towards the student's, fake + share (student - fake); of a LoRA both factors."""
        check_range("fake_pull", share, 0.0, 1.0)
        if self.base:
            named = dict(self.base.network.named_parameters())
            pairs = [
                (named[name.replace(f".{STUDENT}.", f".{FAKE}.")], named[name])
                for name in sorted(self.base.parameter_names(STUDENT))
            ]
        else:
            pairs = list(zip(self.fake.parameters(), self.student.parameters(), strict=True))
        for fake, student in pairs:
            fake.lerp_(student, share)

    def active(self, name: str) -> AbstractContextManager[None]:
        """A context in which the shared network is the student or the fake score."""
        return self.base.using(name) if self.base else nullcontext()

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The student's prediction, in float32."""
        with self.active(STUDENT):
            return self.family.denoise(self.student, sample, timesteps, words).float()

    def clean(self, sample: torch.Tensor, timestep: float, words: torch.Tensor) -> torch.Tensor:
        """The student's clean latents for noisy ones at one timestep."""
        timesteps = torch.full((len(sample),), timestep, device=sample.device)
        return self.schedule.clean(self.predict(sample, timesteps, words), sample, timesteps)

    def judge(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fake score's prediction, and logits (n, 1) of the discriminator if there is one."""
        watched: AbstractContextManager[list[torch.Tensor]] = (
            captured(self.fake.mid_block) if self.head else nullcontext([])
        )
        with self.active(FAKE), watched as features:
            prediction = self.family.denoise(self.fake, sample, timesteps, words).float()
        return prediction, self.head(features[0]) if self.head else None

    def generated(self, batch: MatchingBatch) -> torch.Tensor:
        """The student's clean latents at the step of the batch; only that step has a graph."""
        sample, timestep = batch.path[0], self.timesteps[batch.last]
        if not self.backward_simulation:
            if batch.real is None:
                raise ValueError("without backward_simulation paths start from pictures; give real")
            return self.clean(self._noised(batch.real, sample, timestep), timestep, batch.words)
        with torch.no_grad():
            for i in range(batch.last):
                done = self.clean(sample, self.timesteps[i], batch.words)
                sample = self._noised(done, batch.path[i + 1], self.timesteps[i + 1])
        return self.clean(sample, timestep, batch.words)

    def plain_unet(self) -> Any:
        """The student as a stock network; a LoRA is merged into a copy."""
        return merged_unet(self.base, STUDENT) if self.base else self.student

    def random_timesteps(self, uniform: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Timesteps (n,) between two shares of the schedule for draws (n,) from [0, 1): whole ones of a diffusion, and
        levels of a flow as its own scheduler shifts them."""
        low, high = (int(share * self.schedule.num_train_timesteps) for share in (low, high))
        timesteps = low + uniform * (high - low)
        if not self.schedule.is_flow:
            return timesteps.long()
        share = timesteps / self.schedule.num_train_timesteps
        return self.shift * timesteps / (1.0 + (self.shift - 1.0) * share)

    def _noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.schedule.noisy(clean, noise, torch.full((len(clean),), timestep, device=clean.device))


def student_loss(
    networks: MatchingNetworks,
    teacher: Teacher,
    batch: MatchingBatch,
    guidance_scale: float = 1.0,
    gan_weight: float = 0.0,
    weights: DensityRatioWeights | None = None,
    transport_lambda: float = 0.0,
) -> torch.Tensor:
    """Loss of the student; its value tells how far teacher and fake score are apart.

    Args:
        networks: Student, fake score and discriminator.
        teacher: The frozen teacher.
        batch: Draws and prompts.
        guidance_scale: Classifier-free guidance of the teacher, which the student learns to have built in.
        gan_weight: Weight of the adversarial loss, 0 or more; needs a discriminator.
        weights: Of an f-divergence; `None` is reverse KL. Needs a discriminator.
        transport_lambda: Weight of the cost of moving `real`, from which the path starts, to the student's samples, 0 or more.
    """
    if networks.head is None and (gan_weight or weights):
        raise ValueError("gan_weight and weights need a discriminator; make MatchingNetworks with gan=True")
    if transport_lambda and batch.real is None:
        raise ValueError("transport_lambda needs the latents that are moved; give real")
    schedule = networks.schedule
    timesteps = networks.random_timesteps(batch.uniform, *TIMESTEP_SHARE)
    clean = networks.generated(batch)
    sample = schedule.noisy(clean, batch.noise, timesteps)
    with torch.no_grad():
        scale = torch.full_like(batch.uniform, guidance_scale - 1.0)
        real = guided(*teacher.predictions(sample, timesteps, batch.words), scale)
    with nullcontext() if gan_weight else torch.no_grad():
        prediction, logits = networks.judge(sample, timesteps, batch.words)
    weight = None
    if weights is not None and logits is not None:
        weight = weights(logits.detach(), timesteps / schedule.num_train_timesteps)
    gradient = dmd_gradient(
        clean,
        schedule.clean(real.float(), sample, timesteps),
        schedule.clean(prediction, sample, timesteps),
        weight=weight,
    )
    loss = surrogate_loss(clean, gradient)
    if batch.real is not None and transport_lambda:
        loss = loss + transport_lambda * transport_cost(batch.real, clean).mean()
    return loss + gan_weight * generator_loss(logits) if gan_weight and logits is not None else loss


def fake_loss(networks: MatchingNetworks, batch: MatchingBatch, discriminator_weight: float = 0.0) -> torch.Tensor:
    """Loss of fake score and discriminator: the objective of the teacher's family on the student's samples.

    Args:
        networks: Student, fake score and discriminator.
        batch: Draws and prompts; with `real` and `real_noise` if there is a discriminator.
        discriminator_weight: Weight of its loss, 0 or more.
    """
    schedule = networks.schedule
    timesteps = networks.random_timesteps(batch.uniform)
    with torch.no_grad():
        clean = networks.generated(batch)
    prediction, logits = networks.judge(schedule.noisy(clean, batch.noise, timesteps), timesteps, batch.words)
    loss = (prediction - schedule.target(clean, batch.noise, timesteps)).square().mean()
    if logits is None:
        return loss
    if batch.real is None or batch.real_noise is None:
        raise ValueError("the discriminator needs latents of pictures; give real and real_noise")
    real_sample = schedule.noisy(batch.real, batch.real_noise, timesteps)
    _, real_logits = networks.judge(real_sample, timesteps, batch.words)
    return loss + discriminator_weight * (0.0 if real_logits is None else discriminator_loss(real_logits, logits))

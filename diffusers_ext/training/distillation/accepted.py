"""Samples of a teacher that a reward accepts: what P-GRAFT (`pgraft.py`, arXiv 2510.02692) trains on.

A teacher in the layout of Stable Diffusion paints several pictures of each prompt in its own pipeline, with its own
scheduler. A reward scores the final pictures, and of each prompt the best are kept, or those that rejection sampling
with p = exp((reward - best of the prompt) / temperature) lets through.
"""

import hashlib
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import Source
from ..latents import digest_name, read_kept
from ..parts import make_in_parts
from ..streams import epoch_rows, stream
from .families.unets import own_settings
from .pgraft import accepted, best_of
from .rewards import Reward
from .teachers import Teacher


logger = logging.getLogger(__name__)

SAMPLE_BATCH = 32
# what an interrupted sampling loses at most, in seconds
SAVE_SECONDS = 60.0


def chosen_samples(rewards: torch.Tensor, keep: int | None, temperature: float | None, seed: int) -> torch.Tensor:
    """Which samples of each prompt are trained on.

    Args:
        rewards: (prompts, samples), finite.
        keep: Number of best ones of each prompt, or `None`.
        temperature: Of rejection sampling within each prompt, where `keep` is `None`; the best one always stays.
        seed: Seed of the run, for the rejection.

    Returns:
        Boolean mask of that shape.

    Raises:
        ValueError: If both or neither of `keep` and `temperature` are given, or one is out of range.
    """
    if keep is not None and temperature is None:
        return best_of(rewards, keep)
    if keep is None and temperature is not None:
        uniform = torch.rand(rewards.shape, generator=stream(seed, 0, "accept"))
        return torch.stack([accepted(row, draws, temperature) for row, draws in zip(rewards, uniform)])
    raise ValueError(f"keep={keep} and temperature={temperature} are two ways to choose; give one of them")


@torch.no_grad()
def mean_reward(pipeline: Any, reward: Reward, prompts: Sequence[str], seed: int, **arguments: Any) -> float:
    """Mean reward of one picture a prompt, from the same noise in every call.

    Args:
        pipeline: One that takes prompts.
        reward: Scores the pictures.
        prompts: One or more.
        seed: Seed of the run.
        arguments: Of the pipeline's call.
    """
    scores = []
    for first in range(0, len(prompts), SAMPLE_BATCH):
        part = list(prompts[first : first + SAMPLE_BATCH])
        generators = [stream(seed, first + row, "scored-samples") for row in range(len(part))]
        images = pipeline(part, generator=generators, output_type="pt", **arguments).images
        scores.append(reward(images * 2.0 - 1.0, part).cpu())
    return float(torch.cat(scores).mean())


class AcceptedSamples:
    """Clean latents of accepted samples with their prompts, made once and kept in one file of the run's folder.

    The name of the file tells all that the samples depend on. An interrupted sampling goes on; all processes share it.

    Args:
        args: `output_dir`, `seed`, `num_prompts`, `samples_per_prompt`, `keep`, `temperature`, `teacher_steps`,
            `teacher_guidance_scale` and `resolution`.
        source: Where the prompts come from.
        teacher: Still without adapters: its weights are part of the name.
        reward: Scores the pictures.

    Raises:
        ValueError: If the resolution does not fit the autoencoder.
    """

    def __init__(self, args: Namespace, source: Source, teacher: Teacher, reward: Reward):
        factor = teacher.pipeline.vae_scale_factor
        if args.resolution % factor:
            raise ValueError(f"resolution={args.resolution} must be a multiple of the autoencoder's factor {factor}")
        self.args, self.teacher, self.reward = args, teacher, reward
        self.shape = (teacher.unet.config.in_channels, args.resolution // factor, args.resolution // factor)
        self.prompts = source.captions(source.draw(0, args.num_prompts), 0)
        self.input_ids = teacher.tokens(self.prompts)
        scheduler = teacher.pipeline.scheduler
        names = (
            "seed", "num_prompts", "samples_per_prompt", "keep", "temperature", "teacher_steps",
            "teacher_guidance_scale",
        )  # fmt: skip
        settings = {
            **{name: getattr(args, name) for name in names},
            "reward": reward.score.__name__ if not reward.models else "judge",
            # the reward reads the words themselves
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "tokens": teacher.tokens([*self.prompts[:1], ""]).tolist(),
            "shape": self.shape,
            "scheduler": type(scheduler).__name__,
            "config": own_settings(scheduler),
        }
        parts = (teacher.unet, teacher.pipeline.text_encoder, teacher.pipeline.vae)
        self.file = Path(args.output_dir) / digest_name("accepted", settings, *parts, *reward.models)

    def prepare(self, accelerator: Accelerator) -> None:
        """Samples what is not there yet, and loads what was accepted.

        Raises:
            ValueError: If the file is not what it should be, or samples or rewards are not finite.
            OSError: If it cannot be written.
        """
        args = self.args
        total = args.num_prompts * args.samples_per_prompt
        if not self.file.is_file():
            logger.info("sampling %d pictures of %d prompts", total, args.num_prompts)
            make_in_parts(
                self.file, self._sample, self._choose, (total,), accelerator, what="samples", size=SAMPLE_BATCH,
                save_seconds=SAVE_SECONDS,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        cure = "sample the teacher again"
        tensors = read_kept(self.file, cure, "latents", "rows", "rewards")
        self._latents, self._rows, self.rewards = (tensors[name] for name in ("latents", "rows", "rewards"))
        fits = self.rewards.shape == (args.num_prompts, args.samples_per_prompt) and len(self._rows) > 0
        if not fits or self._latents.shape != (len(self._rows), *self.shape) or int(self._rows.max()) >= total:
            raise ValueError(f"{self.file} does not hold the accepted samples of this run; remove it to {cure}")
        logger.info(
            "%d of %d samples accepted, of mean reward %.4g against %.4g", len(self), total, *self.mean_rewards()
        )

    def __len__(self) -> int:
        """Number of accepted samples."""
        return len(self._rows)

    def mean_rewards(self) -> tuple[float, float]:
        """Mean reward of the accepted samples, and of all."""
        return float(self.rewards.flatten()[self._rows].mean()), float(self.rewards.mean())

    def draw(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The global batch of a step: clean latents (n, c, h, w), float32, and token ids (n, length)."""
        keys = epoch_rows(self.args.seed, step * count, count, len(self), "accepted")
        return self._latents[keys].float(), self.input_ids[self._rows[keys] // self.args.samples_per_prompt]

    @torch.no_grad()
    def _sample(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents of the samples with these numbers as they are kept, and the rewards of their pictures."""
        args, pipeline = self.args, self.teacher.pipeline
        prompts = [self.prompts[row] for row in (rows // args.samples_per_prompt).tolist()]
        noise = [torch.randn(self.shape, generator=stream(args.seed, row, "sample-noise")) for row in rows.tolist()]
        steps = [stream(args.seed, row, "sample-steps") for row in rows.tolist()]
        latents = pipeline(
            prompts, latents=torch.stack(noise), generator=steps, num_inference_steps=args.teacher_steps,
            guidance_scale=args.teacher_guidance_scale,
            height=args.resolution, width=args.resolution, output_type="latent",
        ).images.half()  # fmt: skip
        if not bool(torch.isfinite(latents).all()):
            # refused by whoever gathers them; pictures of them would have no reward
            return {"latents": latents, "rewards": torch.zeros(len(rows))}
        images = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample.clamp(-1.0, 1.0)
        return {"latents": latents, "rewards": self.reward(images, prompts)}

    def _choose(self, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        args = self.args
        rewards = made["rewards"].reshape(args.num_prompts, args.samples_per_prompt)
        rows = chosen_samples(rewards, args.keep, args.temperature, args.seed).flatten().nonzero().flatten()
        return {"latents": made["latents"][rows], "rows": rows, "rewards": rewards}


def switching(tuned: torch.nn.Module, base: torch.nn.Module, switch: int) -> Callable[..., dict[str, Any]]:
    """For `callback_on_step_end` of a stock text-to-image pipeline: `tuned` from timestep `switch` on, `base` below.

    Args:
        tuned: The pipeline's own UNet; after the last step it is in its place again.
        base: What it is exchanged for.
        switch: t_I.
    """

    def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # by number, not by value: solvers of two stages have each timestep twice
        left = pipe.scheduler.timesteps[step + 1 :]
        pipe.unet = base if len(left) and left[0] < switch else tuned
        return tensors

    return at_step_end

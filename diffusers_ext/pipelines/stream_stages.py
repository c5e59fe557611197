"""Pictures at different stages of denoising in one batch of the network: the inner loop of [`StreamBatch`].

StreamDiffusion, 2023, arXiv 2312.12491; the formulas are in `schedulers/residual_guidance.py`. A picture is one row; `advance` takes
every row one stage on with one call of the network, whose batch also holds rows without words where the guidance needs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, LCMScheduler

from ..guidance import Condition
from ..schedulers.residual_guidance import boundary_scalings, guided_noise, next_residual, predicted_data


UPDATES = ("ddim", "lcm")
GUIDANCES = ("self", "initialize", "full", "none")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

Predict = Callable[[torch.Tensor, torch.Tensor, Sequence[Condition | None]], torch.Tensor]


@dataclass(frozen=True)
class StreamStages:
    """The noise levels that each picture goes through; one more level than timesteps, the last is that of the result.

    Args:
        timesteps (`tuple[int, ...]`): Timesteps of the model, descending.
        alphas (`tuple[float, ...]`): a of each stage, and of the result.
        sigmas (`tuple[float, ...]`): b of each stage, and of the result.
        update (`str`): `"ddim"` or `"lcm"`.
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`.
        scalings (`tuple[tuple[float, float], ...]`): c_skip and c_out of each stage.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    update: str
    prediction_type: str
    scalings: tuple[tuple[float, float], ...]

    @classmethod
    def from_config(cls, config: Any, num_inference_steps: int, indices: Sequence[int], update: str) -> Self:
        """The stages at some places of the schedule that DDIM, or an LCM, has with a scheduler's config.

        Args:
            config (`dict`): Config of a scheduler of diffusion models.
            num_inference_steps (`int`): Steps of the whole schedule.
            indices (`Sequence[int]`): Places in it, ascending.
            update (`str`): `"ddim"` or `"lcm"`.

        Raises:
            ValueError: If the schedule is not that of such a model, or has not so many steps.
        """
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(
                f"prediction_type={kind!r} of the scheduler is not known; use a model of one of {', '.join(PREDICTIONS)}"
            )
        trained = config.get("num_train_timesteps", 1000)
        if num_inference_steps > trained:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is more than the {trained} steps the model was trained with; use "
                "fewer"
            )
        schedule: Any = (DDIMScheduler if update == "ddim" else LCMScheduler).from_config(config)
        schedule.set_timesteps(num_inference_steps)
        timesteps = tuple(int(schedule.timesteps[index]) for index in indices)
        bars = [float(schedule.alphas_cumprod[timestep]) for timestep in timesteps]
        if update == "ddim":
            last = float(schedule.final_alpha_cumprod)
            scalings = [(0.0, 1.0)] * len(timesteps)
        else:
            last = 1.0
            scalings = [boundary_scalings(timestep, schedule.config.timestep_scaling) for timestep in timesteps]
        bars.append(last)
        alphas, sigmas = (tuple(max(0.0, value) ** 0.5 for value in part) for part in (bars, [1 - b for b in bars]))
        return cls(timesteps, alphas, sigmas, update, kind, tuple(scalings))

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def noises(self) -> int:
        """How many noises a picture needs: one to begin with, and with `"lcm"` one for each further stage."""
        return len(self) if self.update == "lcm" else 1

    def check_guidance(self, guidance: str) -> None:
        """Raises if the first stage is pure noise and the network or the guidance can say nothing of it."""
        if self.alphas[0] == 0.0 and (self.prediction_type == "epsilon" or guidance in ("self", "initialize")):
            raise ValueError(
                f"guidance={guidance!r} cannot start from pure noise at timestep {self.timesteps[0]}; use a lower strength, or a "
                'v_prediction model with guidance="full"'
            )


@dataclass(frozen=True)
class StreamRow:
    """A picture on its way.

    Args:
        latents (`torch.Tensor` of shape `(1, channels, height, width)`): z at its stage; the result after the last one.
        condition (`dict`): What the network gets with the prompt.
        negative (`dict`, *optional*): What it gets without.
        stage (`int`, *optional*, defaults to 0): Stages behind it.
        residual (`torch.Tensor`, *optional*): Virtual residual noise, of the shape of `latents`.
    """

    latents: torch.Tensor
    condition: Condition | None
    negative: Condition | None
    stage: int = 0
    residual: torch.Tensor | None = None


def entering(
    data: torch.Tensor,
    stages: StreamStages,
    noise: torch.Tensor,
    condition: Condition | None,
    negative: Condition | None,
) -> StreamRow:
    """A picture before its first stage: its latents, `(1, channels, height, width)`, noised with the first of the noises."""
    start = stages.alphas[0] * data + stages.sigmas[0] * noise[:1]
    return StreamRow(start, condition, negative, residual=noise[:1])


def advance(
    rows: Sequence[StreamRow],
    stages: StreamStages,
    noise: torch.Tensor,
    predict: Predict,
    guidance: str,
    guidance_scale: float,
    delta: float = 1.0,
) -> list[StreamRow]:
    """Takes every picture one stage on, with one call of the network.

    Args:
        rows (`Sequence[StreamRow]`): Pictures at any stages, at least one.
        stages ([`StreamStages`]): Their levels.
        noise (`torch.Tensor` of shape `(stages.noises, channels, height, width)`): The noises, the same for all pictures.
        predict (`Callable`): `predict(latents, timesteps, conditions)` is the network.
        guidance (`str`): `"none"`; `"full"`, two rows a picture; `"self"`, one row; `"initialize"`, two rows at the first stage.
        guidance_scale (`float`): g.
        delta (`float`, *optional*, defaults to 1.0): d of residual guidance.

    Returns:
        `list[StreamRow]`: The same pictures at their next stages; the rows that were given are not changed.
    """
    latents = torch.cat([row.latents for row in rows])

    def per_row(table: Sequence[float], after: int = 0) -> torch.Tensor:
        return latents.new_tensor([table[row.stage + after] for row in rows]).view(-1, 1, 1, 1)

    times = [stages.timesteps[row.stage] for row in rows]
    without = [number for number, row in enumerate(rows) if guidance == "full" or row.stage == 0]
    without = without if guidance in ("full", "initialize") else []
    places = [*without, *range(len(rows))]
    outputs = predict(
        latents[places],
        torch.tensor([times[place] for place in places], device=latents.device),
        [*(rows[place].negative for place in without), *(row.condition for row in rows)],
    ).to(latents.dtype)
    unconditional, output = outputs.split([len(without), len(rows)])
    if guidance == "full":
        output = guided_noise(output, unconditional, guidance_scale)

    alpha, sigma = per_row(stages.alphas), per_row(stages.sigmas)
    c_skip, c_out = (per_row([pair[place] for pair in stages.scalings]) for place in (0, 1))
    data, noise_found = _data_and_noise(output, latents, alpha, sigma, stages.prediction_type)
    residual = torch.cat([row.latents if row.residual is None else row.residual for row in rows])
    if guidance in ("self", "initialize"):
        if without:
            of_first = (alpha[without], sigma[without])
            found = _data_and_noise(unconditional, latents[without], *of_first, stages.prediction_type)[1]
            residual = residual.index_copy(0, torch.tensor(without, device=residual.device), found)
        noise_found = guided_noise(noise_found, residual, guidance_scale, delta)
        data = predicted_data(latents, noise_found, alpha, sigma)
    data = c_out * data + c_skip * latents

    if stages.update == "lcm":
        # the last stage has none after it; its factor is 0
        new_noise = noise[[min(row.stage + 1, len(stages) - 1) for row in rows]]
    else:
        new_noise = noise_found
    next_alpha, next_sigma = per_row(stages.alphas, 1), per_row(stages.sigmas, 1)
    moved = next_alpha * data + next_sigma * new_noise
    results = []
    for number, row in enumerate(rows):
        one = slice(number, number + 1)
        following = None
        if guidance in ("self", "initialize") and row.stage + 1 < len(stages):
            following = next_residual(
                residual[one], noise_found[one], new_noise[one], (alpha[one], sigma[one]),
                (next_alpha[one], next_sigma[one]), c_skip[one], c_out[one],
            )  # fmt: skip
        results.append(replace(row, latents=moved[one], stage=row.stage + 1, residual=following))
    return results


def _data_and_noise(
    output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and noise that a network's answer stands for."""
    if prediction_type == "epsilon":
        return (sample - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (sample - alpha * output) / sigma
    return alpha * sample - sigma * output, alpha * output + sigma * sample

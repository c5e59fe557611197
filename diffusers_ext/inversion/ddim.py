"""Deterministic DDIM between two noise levels, in both directions.

Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502, eq. 12 with eta = 0. With alpha-bar `a` before and `b` after:

    x0  = (z - sqrt(1 - a) eps) / sqrt(a)
    z'  = sqrt(b) x0 + sqrt(1 - b) eps

The same two lines take noise away (b > a) and, read backwards along the trajectory, put it there (b < a): inversion.

Which two levels belong to a timestep when inverting is a choice ("alignment"). With t_1 < ... < t_T the timesteps and a_0
the level of the clean picture:

    matched   step k:  a_{k-1} -> a_k,         network asked at t_k; ends at the level where sampling starts
    official  step k:  a_k     -> a_{k+1},     network asked at t_k; the code of Guide-and-Rescale does this, and so ends
                                               one step beyond the level where its sampling starts
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler

from .denoiser import Denoiser, InversionCallback, InversionProgress, Inverted, check_callback, checked_start, finite


ALIGNMENTS = ("matched", "official")
PREDICTION_TYPES = ("epsilon", "v_prediction")

# The part of a DDIM config that decides timesteps and noise levels.
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
)


def epsilon_from_v(v: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Noise prediction from a v prediction: `eps = sqrt(a) v + sqrt(1 - a) z`.

    Args:
        v (`torch.Tensor`): The network's v prediction.
        sample (`torch.Tensor`): The noisy latents z, shape of `v`.
        alpha_bar (`torch.Tensor`): Scalar in [0, 1].

    Returns:
        `torch.Tensor`: The noise prediction, shape of `v`.
    """
    return (alpha_bar**0.5) * v + ((1 - alpha_bar) ** 0.5) * sample


def v_from_epsilon(epsilon: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Inverse of [`epsilon_from_v`]: `v = (eps - sqrt(1 - a) z) / sqrt(a)`.

    Args:
        epsilon (`torch.Tensor`): The noise prediction.
        sample (`torch.Tensor`): The noisy latents z, shape of `epsilon`.
        alpha_bar (`torch.Tensor`): Scalar in (0, 1]: at 0 the noise says nothing about v.

    Returns:
        `torch.Tensor`: The v prediction, shape of `epsilon`.
    """
    return (epsilon - ((1 - alpha_bar) ** 0.5) * sample) / (alpha_bar**0.5)


def clean_and_epsilon(
    model_output: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: str = "epsilon"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents and the noise that a network's output stands for; arguments as of [`ddim_step`].

    Raises:
        ValueError: If `prediction_type` is neither `"epsilon"` nor `"v_prediction"`.
    """
    if prediction_type == "epsilon":
        clean = (sample - (1 - alpha_bar) ** 0.5 * model_output) / alpha_bar**0.5
        epsilon = model_output
    elif prediction_type == "v_prediction":
        clean = (alpha_bar**0.5) * sample - ((1 - alpha_bar) ** 0.5) * model_output
        epsilon = epsilon_from_v(model_output, sample, alpha_bar)
    else:
        raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
    return clean, epsilon


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    alpha_bar: torch.Tensor,
    alpha_bar_next: torch.Tensor,
    prediction_type: str = "epsilon",
) -> torch.Tensor:
    """Moves latents from one noise level to another; towards the picture or away from it.

    The operations and their order are those of `DDIMScheduler.step`, so the result is the same to the last bit.

    Args:
        model_output (`torch.Tensor`): The network's prediction.
        sample (`torch.Tensor`): The latents at level `alpha_bar`.
        alpha_bar (`torch.Tensor`): Scalar alpha-bar of `sample`.
        alpha_bar_next (`torch.Tensor`): Scalar alpha-bar of the result.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor`: The latents at level `alpha_bar_next`.

    Raises:
        ValueError: If `prediction_type` is neither of the two.

    Example:
        ```python
        import torch
        from diffusers_ext.inversion import ddim_step

        z, eps, a, b = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor(0.2), torch.tensor(0.6)
        assert torch.allclose(ddim_step(eps, ddim_step(eps, z, a, b), b, a), z, atol=1e-5)
        ```
    """
    clean, epsilon = clean_and_epsilon(model_output, sample, alpha_bar, prediction_type)
    return alpha_bar_next**0.5 * clean + (1 - alpha_bar_next) ** 0.5 * epsilon


@dataclass(frozen=True)
class DDIMLadder:
    """The timesteps of a DDIM run and the noise level of each, looked up once and valid for both directions.

    Attributes:
        timesteps (`torch.Tensor` of shape `(steps,)`): Descending, as sampling walks them.
        alpha_bars (`torch.Tensor` of shape `(steps + 1,)`): From the clean picture's level to the noisiest, so
            `alpha_bars[k]` is the level after k inversion steps.
        beyond (`torch.Tensor`): Scalar, the level one step beyond the noisiest: where official inversion ends.
        config (`dict`): The settings all this follows from, as plain values.
    """

    timesteps: torch.Tensor
    alpha_bars: torch.Tensor
    beyond: torch.Tensor
    config: dict[str, Any]

    @classmethod
    def from_scheduler_config(
        cls, config: Any, num_inference_steps: int, timesteps: Sequence[int] | None = None
    ) -> "DDIMLadder":
        """Builds the ladder from the config of any scheduler that diffuses with betas.

        Args:
            config (`dict`): A scheduler's config. Clipping and thresholding of the predicted picture are left out: both
                would make a step impossible to undo.
            num_inference_steps (`int`): Steps, from 1 to the number of training timesteps.
            timesteps (list of `int`, *optional*): Descending timesteps to use instead of evenly spaced ones.

        Returns:
            [`DDIMLadder`]: The ladder.

        Raises:
            ValueError: If the config describes another kind of process or the steps do not fit on it.
        """
        missing = [key for key in ("num_train_timesteps", "beta_schedule", "prediction_type") if key not in config]
        if missing:
            raise ValueError(
                f"the scheduler {config.get('_class_name', 'of this model')} has no {missing[0]} in its config; DDIM "
                "inversion needs one that diffuses with betas, such as DDIMScheduler"
            )
        if config["prediction_type"] not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={config['prediction_type']!r} of the scheduler is not supported; "
                f"use a model that predicts one of {', '.join(PREDICTION_TYPES)}"
            )
        trained = config["num_train_timesteps"]
        scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
        if timesteps is not None:
            if not 0 <= min(timesteps) <= max(timesteps) < trained:
                raise ValueError(f"timesteps={list(timesteps)} leave the range of this model, 0 to {trained - 1}")
            chosen = torch.tensor(timesteps)
        else:
            if not 1 <= num_inference_steps <= trained:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} is out of range; this model allows 1 to {trained}"
                )
            try:
                scheduler.set_timesteps(num_inference_steps)
            except (ValueError, TypeError) as error:
                raise ValueError(f"the config of the scheduler cannot be used: {error}") from error
            chosen = scheduler.timesteps
            if int(chosen.max()) >= trained or int(chosen.min()) < 0:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} asks for timestep {int(chosen.max())}, but the model "
                    f"knows 0 to {trained - 1}; use fewer steps"
                )
        alpha_bars = torch.cat([scheduler.final_alpha_cumprod[None], scheduler.alphas_cumprod[chosen.flip(0)]])
        if config["prediction_type"] == "epsilon" and alpha_bars[-1] == 0:
            raise ValueError(
                f"timestep {int(chosen[0])} is pure noise, which a network that predicts noise cannot undo; use a model that predicts v"
            )
        beyond = min(int(chosen[0]) + trained // len(chosen), trained - 1)
        settings = {key: scheduler.config[key] for key in SCHEDULE_KEYS}
        if settings["trained_betas"] is not None:
            settings["trained_betas"] = [float(beta) for beta in settings["trained_betas"]]
        if timesteps is not None:
            settings["timesteps"] = [int(timestep) for timestep in timesteps]
        return cls(chosen, alpha_bars, scheduler.alphas_cumprod[beyond], settings)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def prediction_type(self) -> str:
        """What the network predicts, `"epsilon"` or `"v_prediction"`."""
        return str(self.config["prediction_type"])

    def sampling_levels(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Alpha-bar before and after sampling step `step`, counted from 0 at the noisy end."""
        top = len(self) - step
        return self.alpha_bars[top], self.alpha_bars[top - 1]

    def inversion_levels(self, step: int, alignment: str = "matched") -> tuple[torch.Tensor, torch.Tensor]:
        """Alpha-bar before and after inversion step `step`, counted from 0 at the picture."""
        if alignment == "matched":
            return self.alpha_bars[step], self.alpha_bars[step + 1]
        if alignment == "official":
            last = step + 1 == len(self)
            return self.alpha_bars[step + 1], self.beyond if last else self.alpha_bars[step + 2]
        raise ValueError(f"alignment={alignment!r} is not one of {', '.join(ALIGNMENTS)}")


def ddim_inversion_states(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    ladder: DDIMLadder,
    alignment: str = "matched",
) -> Iterator[torch.Tensor]:
    """Yields the latents of a picture at every level, from the picture to the noise.

    Args:
        predict (`Callable`): Network output for `(latents, timestep)`.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded picture.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        alignment (`str`, *optional*, defaults to `"matched"`): `"matched"` or `"official"`, see the module's head.

    Yields:
        `torch.Tensor` of the shape of `latents`: `len(ladder) + 1` states, the first is `latents` itself.
    """
    yield latents
    for step, timestep in enumerate(ladder.timesteps.flip(0)):
        levels = ladder.inversion_levels(step, alignment)
        latents = ddim_step(predict(latents, timestep), latents, *levels, ladder.prediction_type)
        yield latents


def sampling_factors(
    alpha_bar: torch.Tensor, alpha_bar_next: torch.Tensor, prediction_type: str = "epsilon"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a DDIM step, which is linear in the latents and in the network's output: `z' = A z + B output`.

    Args:
        alpha_bar (`torch.Tensor`): Scalar alpha-bar before the step; above 0 for `"epsilon"`.
        alpha_bar_next (`torch.Tensor`): Scalar alpha-bar after it.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): As in [`ddim_step`].

    Returns:
        `tuple` of two scalar `torch.Tensor`: A and B.
    """
    one, none = torch.ones_like(alpha_bar), torch.zeros_like(alpha_bar)
    return (
        ddim_step(none, one, alpha_bar, alpha_bar_next, prediction_type),
        ddim_step(one, none, alpha_bar, alpha_bar_next, prediction_type),
    )


@torch.no_grad()
def ddim_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    alignment: str = "matched",
    callback: InversionCallback | None = None,
) -> Inverted:
    """Inverts pictures by DDIM with their own prompts, without guidance: one network evaluation a step.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        alignment (`str`, *optional*, defaults to `"matched"`): `"matched"` or `"official"`, see the module's head.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step.

    Returns:
        [`Inverted`]: The states.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.
    """
    check_callback(callback)
    start = checked_start(denoiser, latents, ladder)
    states: list[torch.Tensor] = []
    for state in ddim_inversion_states(denoiser.source, start, ladder, alignment):
        finite(state, f"the latents after {len(states)} of {len(ladder)} steps of the inversion")
        if states and callback is not None:
            step = len(states) - 1
            callback(InversionProgress("inversion", step, len(ladder), int(ladder.timesteps[-1 - step])))
        states.append(state)
    settings, passes = {"alignment": alignment}, len(ladder) * len(start)
    return Inverted("ddim", torch.stack(states), ladder.timesteps.flip(0), settings, forward_passes=passes)

r"""What a network predicts, turned into any other prediction, on diffusion and on flow schedules.

With x_t = a x_0 + s eps, every prediction together with x_t fixes the pair (x_0, eps), and every other prediction follows:
    epsilon: eps,    sample: x_0,    v_prediction: a eps - s x_0,    flow: eps - x_0 (where a = 1 - s),
and the score of the noisy density is (a x_0 - x_t) / s^2 with x_0 the posterior mean (Tweedie).
The formulas for x_0 and for the targets are those of `diffusers_ext.training.objectives`.
"""

from typing import Any

import torch

from ..objectives import PREDICTION_TYPES, clean_from_prediction, noisy, per_sample, target
from .checks import check_levels, check_same_shape, check_word


PREDICTIONS = (*PREDICTION_TYPES, "sample")


def clean_from(
    prediction_type: str, prediction: torch.Tensor, sample: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """The clean sample x_0 that a prediction stands for.

    Args:
        prediction_type: "epsilon", "v_prediction", "flow" or "sample".
        prediction: Output of the network (n, ...).
        sample: Its noisy input, same shape.
        signal: Signal level a of each sample (n,); above 0 for "epsilon", 1 - spread for "flow".
        spread: Noise level s of each sample (n,).

    Returns:
        Estimate of the clean samples (n, ...).

    Raises:
        ValueError: For an unknown `prediction_type` or shapes that do not fit.
    """
    check_word("prediction_type", prediction_type, PREDICTIONS)
    check_same_shape(sample=sample, prediction=prediction)
    check_levels(sample, signal=signal, spread=spread)
    if prediction_type == "sample":
        return prediction
    return clean_from_prediction(prediction_type, prediction, sample, signal, spread)


def noise_from(
    prediction_type: str, prediction: torch.Tensor, sample: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """The noise eps that a prediction stands for; arguments and errors as in `clean_from`.

    Only "sample" divides by the noise level, which must then be above 0.
    """
    check_word("prediction_type", prediction_type, PREDICTIONS)
    check_same_shape(sample=sample, prediction=prediction)
    check_levels(sample, signal=signal, spread=spread)
    if prediction_type == "epsilon":
        return prediction
    signal, spread = per_sample(signal, sample), per_sample(spread, sample)
    if prediction_type == "v_prediction":
        return spread * sample + signal * prediction
    if prediction_type == "flow":
        return sample + signal * prediction
    return (sample - signal * prediction) / spread


def convert(
    prediction: torch.Tensor,
    given: str,
    wanted: str,
    sample: torch.Tensor,
    signal: torch.Tensor,
    spread: torch.Tensor,
) -> torch.Tensor:
    """A prediction of one type as that of another type.

    Args:
        prediction: Output of the network (n, ...).
        given: What it is: "epsilon", "v_prediction", "flow" or "sample".
        wanted: What it shall be.
        sample: The noisy input of the network, same shape.
        signal: Signal level a of each sample (n,).
        spread: Noise level s of each sample (n,).

    Returns:
        The prediction (n, ...) as `wanted`; the very same tensor if that is what it is already.

    Raises:
        ValueError: For unknown types or shapes that do not fit.

    Example:
        >>> x, half = torch.ones(1, 2), torch.tensor([0.5])
        >>> convert(torch.zeros(1, 2), "flow", "sample", x, half, half).tolist()
        [[1.0, 1.0]]
    """
    check_word("wanted", wanted, PREDICTIONS)
    clean = clean_from(given, prediction, sample, signal, spread)
    if wanted == given:
        return prediction
    if wanted == "sample":
        return clean
    noise = noise_from(given, prediction, sample, signal, spread)
    return target(wanted, clean, noise, signal, spread)


def score_from_clean(
    clean: torch.Tensor, sample: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Score of the noisy density at `sample`, (a x_0 - x_t) / s^2, of the posterior mean x_0 = `clean`.

    Args:
        clean: Posterior mean of the clean sample (n, ...).
        sample: Noisy sample, same shape.
        signal: Signal level a of each sample (n,).
        spread: Noise level s of each sample (n,), above 0.

    Returns:
        Score (n, ...).
    """
    check_same_shape(sample=sample, clean=clean)
    check_levels(sample, signal=signal, spread=spread)
    return (per_sample(signal, sample) * clean - sample) / per_sample(spread, sample).square()


class NoiseSchedule:
    """Signal and noise level at each training timestep, and what the network predicts there.

    Args:
        prediction_type: "epsilon", "v_prediction", "flow" or "sample".
        alphas_cumprod: alpha_bar of the integer timesteps (T,); `None` for flows, where a = 1 - t / T and s = t / T for
            real t.
        num_train_timesteps: T.

    Raises:
        ValueError: For an unknown `prediction_type`.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
        >>> signal, spread = schedule.levels(torch.tensor([0, 999]))
        >>> round(float(spread[1]), 3)
        1.0
    """

    def __init__(self, prediction_type: str, alphas_cumprod: torch.Tensor | None, num_train_timesteps: int = 1000):
        check_word("prediction_type", prediction_type, PREDICTIONS)
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        # where a is nearly 1, 1 - a^2 loses its digits in float32
        self._alphas = None if alphas_cumprod is None else alphas_cumprod.double().cpu()

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule that a model with this scheduler was trained on.

        Args:
            scheduler: A scheduler of diffusers: flow matching, or with a table `alphas_cumprod`.

        Raises:
            ValueError: If it has neither.
        """
        config = scheduler.config
        steps = config.get("num_train_timesteps", 1000)
        prediction_type = config.get("prediction_type", "flow_prediction")
        if config.get("use_flow_sigmas") or prediction_type == "flow_prediction":
            return cls("flow", None, steps)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} has no alphas_cumprod and is no flow; give a teacher with a "
                f"scheduler like DDIMScheduler or FlowMatchEulerDiscreteScheduler"
            )
        return cls(prediction_type, scheduler.alphas_cumprod, steps)

    @property
    def is_flow(self) -> bool:
        """Whether the path is a straight line from sample to noise."""
        return self._alphas is None

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level at timesteps (n,), each (n,) in float64.

        Raises:
            ValueError: If a timestep is outside [0, T), for flows [0, T].
        """
        top = self.num_train_timesteps - (0 if self.is_flow else 1)
        if timesteps.numel() and not (0 <= float(timesteps.min()) and float(timesteps.max()) <= top):
            raise ValueError(
                f"timesteps reach from {float(timesteps.min()):g} to {float(timesteps.max()):g}; "
                f"this schedule has those from 0 to {top}"
            )
        if self._alphas is None:
            spread = timesteps.double() / self.num_train_timesteps
            return 1.0 - spread, spread
        alphas = self._alphas.to(timesteps.device)[timesteps.long()]
        return alphas.sqrt(), (1.0 - alphas).sqrt()

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples (n, ...) with noise of that shape at timesteps (n,)."""
        check_same_shape(clean=clean, noise=noise)
        check_levels(clean, timesteps=timesteps)
        return noisy(clean, noise, *self.levels(timesteps))

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network shall predict at `noisy(clean, noise, timesteps)`."""
        check_same_shape(clean=clean, noise=noise)
        check_levels(clean, timesteps=timesteps)
        if self.prediction_type == "sample":
            return clean
        return target(self.prediction_type, clean, noise, *self.levels(timesteps))

    def clean(self, prediction: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean sample that a prediction at `sample` stands for."""
        check_levels(sample, timesteps=timesteps)
        return clean_from(self.prediction_type, prediction, sample, *self.levels(timesteps))

    def noise(self, prediction: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise that a prediction at `sample` stands for."""
        check_levels(sample, timesteps=timesteps)
        return noise_from(self.prediction_type, prediction, sample, *self.levels(timesteps))

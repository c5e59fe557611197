"""What every scheduler of mean-reverting diffusion has: its process, the mean it reverts to, noise, and training targets.

The equations are at the top of `mean_reverting.py`.
"""

from typing import Any

import torch

from . import mean_reverting as process_of
from .checks import check_choice, check_number
from .multistep import check_steps_trained
from .noise import Generators, check_same, check_tensor, drawn_noise


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class MeanRevertingMixin:
    """Mean, noise and targets. A subclass registers the configuration that `_make_process` reads."""

    config: Any
    process: process_of.Process
    _mean: torch.Tensor | None = None

    # -- the process -----------------------------------------------------------------------------------------------

    def _make_process(self) -> process_of.Process:
        config = self.config
        check_choice("theta_schedule", config.theta_schedule, process_of.THETA_SCHEDULES)
        interpolation = config.get("schedule_interpolation", "consistent")
        check_choice("schedule_interpolation", interpolation, process_of.INTERPOLATIONS)
        trained = check_steps_trained(config.num_train_timesteps)
        if config.theta_schedule == "ouve":
            if "ouve_theta" not in config:
                raise ValueError("theta_schedule='ouve' is not variance-preserving; use MRScheduler for it")
            low = check_number("ouve_sigma_min", config.ouve_sigma_min, 0.0)
            return process_of.OUVEProcess(
                check_number("ouve_theta", config.ouve_theta, 0.0),
                low,
                check_number("ouve_sigma_max", config.ouve_sigma_max, low),
                check_number("ouve_t_eps", config.ouve_t_eps, 0.0, 1.0),
            )
        thetas = process_of.theta_table(
            config.theta_schedule, trained, check_number("cosine_s", config.cosine_s, 0.0), config.trained_thetas
        )
        return process_of.TableProcess(
            thetas,
            check_number("sigma_inf", config.sigma_inf, 0.0),
            check_number("alpha_min", config.alpha_min, 0.0, 1.0),
            config.zero_start,
            interpolation,
        )

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise around the mean that a run starts from."""
        return self.process.start_sigma

    def _levels(self, timesteps: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of each sample, shaped to multiply a batch."""
        given = torch.as_tensor(timesteps, dtype=torch.float64).reshape(-1).tolist()
        if len(given) not in (1, like.shape[0]):
            raise ValueError(
                f"timesteps has {len(given)} entries for a batch of {like.shape[0]}; give one, or one for each sample"
            )
        if not all(0.0 <= timestep <= self.process.first for timestep in given):
            raise ValueError(f"timesteps={given!r} leaves the process; give numbers from 0 to {self.process.first:g}")
        levels = [self.process.level(timestep) for timestep in given]
        shape = (-1, *[1] * (like.ndim - 1))
        options: Any = {
            "dtype": torch.float64 if like.dtype == torch.float64 else torch.float32,
            "device": like.device,
        }
        alpha = torch.tensor([level.alpha for level in levels], **options).reshape(shape)
        return alpha, torch.tensor([level.sigma for level in levels], **options).reshape(shape)

    # -- the mean --------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> torch.Tensor | None:
        """The mean of `set_mean`, if one is set."""
        return self._mean

    def set_mean(self, mean: torch.Tensor) -> None:
        """Sets the mean that every method uses when it gets none. `set_timesteps` forgets it.

        Args:
            mean (`torch.Tensor` of shape `(batch, ...)`): The degraded pictures.

        Raises:
            TypeError: If it is not a tensor of floats.
        """
        check_tensor("mean", mean)
        self._mean = mean

    def _mean_for(self, sample: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        check_tensor("sample", sample)
        mean = self._mean if mean is None else mean
        if mean is None:
            raise ValueError(
                "mean=None is missing: give the degraded picture as mean=..., or call set_mean after set_timesteps"
            )
        if not isinstance(mean, torch.Tensor) or not mean.is_floating_point():
            found = mean.dtype if isinstance(mean, torch.Tensor) else type(mean).__name__
            raise TypeError(f"mean is {found}; give a tensor of floats")
        if mean.shape != sample.shape:
            raise ValueError(
                f"mean of shape {tuple(mean.shape)} does not fit sample of shape {tuple(sample.shape)}; both must have the same shape"
            )
        return mean

    def prepare_initial(
        self,
        mean: torch.Tensor,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        timestep: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where a run starts: the mean with noise.

        Args:
            mean (`torch.Tensor` of shape `(batch, ...)`): The degraded pictures.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise.
            noise (`torch.Tensor`, *optional*): Unit noise of the shape of `mean`, instead of drawn noise.
            timestep (`float`, *optional*): The timestep that a shortened run starts at; by default the whole process, with noise
                of standard deviation `init_noise_sigma`.

        Returns:
            `torch.Tensor`: Samples of the shape and dtype of `mean`.

        Raises:
            ValueError: If `noise` or `timestep` does not fit.
            TypeError: If `mean` is not a tensor of floats.
        """
        if not isinstance(mean, torch.Tensor) or not mean.is_floating_point() or mean.ndim < 1:
            found = mean.dtype if isinstance(mean, torch.Tensor) else type(mean).__name__
            raise TypeError(f"mean is {found}; give a tensor of floats, batch first")
        if noise is None:
            noise = drawn_noise(mean, generator)
        elif noise.shape != mean.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} does not fit mean of shape {tuple(mean.shape)}; give the same"
            )
        if timestep is None:
            return mean + noise.to(mean) * self.init_noise_sigma
        return mean + noise.to(mean) * self._levels(timestep, mean)[1].to(mean.dtype)

    def model_input(
        self, sample: torch.Tensor, mean: torch.Tensor | None = None, timestep: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the network sees: x - mu and mu, one after the other along the channels.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, ...)`): The noisy sample.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.
            timestep (`float` or `torch.Tensor`, *optional*): The entry of `timesteps` that `sample` is at. Only a
                [`MeanRevertingAdapter`] makes use of it.

        Returns:
            `torch.Tensor` of shape `(batch, 2 * channels, ...)`.

        Raises:
            ValueError: If there is no mean or it has another shape.
        """
        mean = self._mean_for(sample, mean).to(sample)
        return torch.cat([sample - mean, mean], dim=1)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself; `model_input` adds the mean."""
        return sample

    # -- noise and targets -----------------------------------------------------------------------------------------

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """mu + alpha_t (x0 - mu) + sigma_t eps, each sample at its own timestep.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): Clean pictures.
            noise (`torch.Tensor`): Unit noise of the same shape.
            timesteps (`torch.Tensor` of shape `(batch,)`): Whole or fractional timesteps from 0 to the last.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.

        Returns:
            `torch.Tensor` of the shape and dtype of `original_samples`.

        Raises:
            ValueError: If an argument does not fit.
        """
        mean = self._mean_for(original_samples, mean).to(original_samples)
        check_same(original_samples, noise)
        alpha, sigma = self._levels(timesteps, original_samples)
        return (mean + alpha * (original_samples - mean) + sigma * noise).to(original_samples.dtype)

    def get_velocity(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocity sigma_inf alpha eps - (sigma / sigma_inf) (x0 - mu) of clean samples and their noise.

        Args:
            sample (`torch.Tensor` of shape `(batch, ...)`): Clean pictures.
            noise (`torch.Tensor`): Unit noise of the same shape.
            timesteps (`torch.Tensor` of shape `(batch,)`): Their timesteps.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.

        Returns:
            `torch.Tensor` of the shape and dtype of `sample`.

        Raises:
            ValueError: If an argument does not fit.
        """
        mean = self._mean_for(sample, mean).to(sample)
        check_same(sample, noise)
        alpha, sigma = self._levels(timesteps, sample)
        scale = self.process.sigma_inf
        return (scale * alpha * noise - sigma / scale * (sample - mean)).to(sample.dtype)

    def get_target(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a network of this `prediction_type` shall answer: the noise, the clean picture, or the velocity.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): Clean pictures.
            noise (`torch.Tensor`): The noise in the network's input.
            timesteps (`torch.Tensor` of shape `(batch,)`): Their timesteps.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.

        Returns:
            `torch.Tensor` of the shape of `original_samples`.

        Raises:
            ValueError: If `prediction_type` is not known or an argument does not fit.
        """
        kind = self.config.prediction_type
        check_choice("prediction_type", kind, PREDICTION_TYPES)
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return original_samples
        return self.get_velocity(original_samples, noise, timesteps, mean)

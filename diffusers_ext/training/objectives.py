r"""Targets and weights of diffusion and flow training, as pure functions of tensors.

Diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239; v-prediction, Salimans & Ho 2022, arXiv 2202.00512), with
a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t):
    x_t = a x_0 + s eps,     v = a eps - s x_0,     x_0 = a x_t - s v,     eps = s x_t + a v.
Rectified flow (Liu et al. 2022, arXiv 2209.03003), sigma in [0, 1]:
    x_sigma = (1 - sigma) x_0 + sigma eps,     u = eps - x_0,     x_0 = x_sigma - sigma u.
Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), SNR = a^2 / s^2: the loss in x_0 is weighted with min(SNR, gamma),
which in terms of the loss of the prediction itself is
    epsilon: min(SNR, gamma) / SNR,     v: min(SNR, gamma) / (SNR + 1).
"""

import torch


DIFFUSION = ("epsilon", "v_prediction")
PREDICTION_TYPES = (*DIFFUSION, "flow")


def noisy(clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """`signal * clean + spread * noise`.

    Args:
        clean: Clean samples (n, ...).
        noise: Standard normal noise of the same shape.
        signal: Signal level of each sample (n,): sqrt(alpha_bar), or 1 - sigma for flows.
        spread: Noise level of each sample (n,): sqrt(1 - alpha_bar), or sigma for flows.

    Returns:
        Noisy samples (n, ...).
    """
    return per_sample(signal, clean) * clean + per_sample(spread, clean) * noise


def target(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """What the network shall predict.

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
        clean: Clean samples (n, ...).
        noise: The noise in the network's input, same shape.
        signal: As in `noisy`.
        spread: As in `noisy`.

    Returns:
        Target (n, ...).

    Raises:
        ValueError: For an unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return per_sample(signal, clean) * noise - per_sample(spread, clean) * clean
    if prediction_type == "flow":
        return noise - clean
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def clean_from_prediction(
    prediction_type: str, prediction: torch.Tensor, sample: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """The clean sample that a prediction stands for; the inverse of `noisy` and `target`.

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
        prediction: Output of the network (n, ...).
        sample: Its noisy input, same shape.
        signal: As in `noisy`; above 0 for "epsilon".
        spread: As in `noisy`.

    Returns:
        Estimate of the clean samples (n, ...).

    Raises:
        ValueError: For an unknown `prediction_type`.
    """
    signal, spread = per_sample(signal, sample), per_sample(spread, sample)
    if prediction_type == "epsilon":
        return (sample - spread * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * sample - spread * prediction
    if prediction_type == "flow":
        return sample - spread * prediction
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def min_snr_weights(
    prediction_type: str, signal: torch.Tensor, spread: torch.Tensor, gamma: float | None
) -> torch.Tensor:
    """Weight of each sample's loss.

    Args:
        prediction_type: "epsilon" or "v_prediction"; with `gamma=None` any.
        signal: sqrt(alpha_bar) of each sample (n,). 0 (zero terminal SNR) is allowed for "v_prediction".
        spread: sqrt(1 - alpha_bar) of each sample (n,), above 0.
        gamma: Cap of the signal-to-noise ratio, usually 5; `None` weighs all alike.

    Returns:
        Weights (n,), at most 1.

    Raises:
        ValueError: For "flow" with a `gamma`: the paper's weighting is not defined for it.
    """
    if gamma is None:
        return torch.ones_like(signal)
    if prediction_type not in DIFFUSION:
        raise ValueError(f"snr_gamma={gamma} is not defined for prediction_type={prediction_type!r}; leave it out")
    snr = (signal / spread) ** 2
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1.0) if prediction_type == "v_prediction" else capped / snr


def stratified_uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` draws, each uniform on [0, 1), that together cover it evenly: one in every interval of 1 / count, shuffled.

    Independent draws leave gaps and clusters in a batch, and with them the loss jumps from step to step.

    Example:
        >>> draws = stratified_uniform(4, torch.Generator().manual_seed(0))
        >>> sorted((draws * 4).long().tolist())
        [0, 1, 2, 3]
    """
    order = torch.randperm(count, generator=generator)
    # in float32 the largest draws would round up to 1
    return ((order + torch.rand(count, generator=generator)) / count).clamp(max=1.0 - 2.0**-24)


def logit_normal(uniform: torch.Tensor) -> torch.Tensor:
    """Noise levels of flows, logit-normal (Esser et al. 2024, arXiv 2403.03206): sigma = 1 / (1 + exp(-z)), z ~ N(0, 1).

    Args:
        uniform: Draws from [0, 1), shape (n,).

    Returns:
        sigma in (0, 1), most of them in the middle where the direction is hardest to predict.
    """
    return torch.sigmoid(torch.special.ndtri(uniform.double().clamp(1e-6, 1.0 - 1e-6))).float()


def weighted_mse(prediction: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over samples of `weights` (n,) times the mean squared error of each; computed in float32."""
    error = (prediction.float() - wanted.float()).square().flatten(1).mean(1)
    return (error * weights).mean()


def per_sample(levels: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """One number a sample, (n,), in the shape (n, 1, ...) that multiplies `samples` (n, ...), in their type and place."""
    return levels.to(samples).reshape(-1, *[1] * (samples.ndim - 1))

"""Training of small KL autoencoders: loss, and normalisation of the latents.

Loss of a reconstruction y of x with posterior N(mu, sigma^2):
    L = |x - y| + (x - y)^2 + 0.5 |grad x - grad y| + w * KL(N(mu, sigma^2) || N(0, 1)),
each a mean over pixels (KL: over latent elements). L1 keeps flat areas flat, the gradient term keeps edges sharp.
"""

import torch
from diffusers import AutoencoderKL
from torch import nn


class Autoencoding(nn.Module):
    """Encode, sample with given noise, decode, as one module for data-parallel training."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction, posterior mean and log variance of `images` (n, 3, H, W); `noise` has the shape of the latents."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def new_autoencoder(
    channels: tuple[int, ...], layers_per_block: int = 1, norm_num_groups: int = 2, latent_channels: int = 4
) -> AutoencoderKL:
    """An untrained AutoencoderKL without mid attention: fully convolutional, so that crops train the whole picture.

    Args:
        channels: Width of each level, each a multiple of `norm_num_groups`; n levels give the factor 2^(n-1).
        layers_per_block: Residual blocks a level.
        norm_num_groups: Groups of the normalisation. Few (2 to 4): many groups of few channels destroy absolute colour.
        latent_channels: Channels of the latents.

    Raises:
        ValueError: If a width is not a multiple of `norm_num_groups`.
    """
    odd = [width for width in channels if width % norm_num_groups]
    if odd:
        raise ValueError(f"block_out_channels={list(channels)} must be multiples of norm_num_groups={norm_num_groups}")
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=False,
        sample_size=32,
    )


def reconstruction_loss(
    images: torch.Tensor, restored: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor, kl_weight: float
) -> torch.Tensor:
    """The loss of this module's head line; all tensors float32, `images` and `restored` of equal shape.

    Returns:
        A scalar.
    """
    error = restored - images
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * (across + down) + kl_weight * kl


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Moves mean and scale of every latent channel into the network's 1x1 convolutions, and sets `scaling_factor = 1`.

    Pipelines of the Stable Diffusion family multiply latents by one `scaling_factor` and ignore a shift, while a diffusion
    model wants every channel centred and of unit variance. The last encoder layer therefore gives (z - mean) / std, and
    the first decoder layer W z + b becomes W diag(std) z + (b + W mean): reconstructions stay what they were.

    Args:
        vae: Autoencoder with `quant_conv` and `post_quant_conv`.
        mean: Mean of each latent channel, (latent_channels,).
        std: Standard deviation of each latent channel, (latent_channels,), above 0.

    Raises:
        ValueError: If a channel does not vary.
    """
    if not bool((std > 0.0).all()):
        raise ValueError(f"std={std.tolist()} must be above 0 in every channel; a channel that never varies is unused")
    channels = vae.config.latent_channels
    mean, std = mean.to(vae.quant_conv.bias), std.to(vae.quant_conv.bias)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.bias[:channels] -= mean
    vae.quant_conv.bias[:channels] /= std
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[channels:] -= 2.0 * std.log()
    vae.register_to_config(scaling_factor=1.0)

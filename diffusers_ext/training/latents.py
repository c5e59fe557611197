"""Latents of a frozen autoencoder: on the fly, or encoded once for a fixed number of items."""

import hashlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ..integrity import atomic_write
from .data import Source
from .streams import epoch_rows


logger = logging.getLogger(__name__)

ENCODE_BATCH = 64


class FreshLatents:
    """Latents of new items in every step; pictures are encoded when they are needed.

    Args:
        source: Where the items come from.
        encode: From pictures (n, 3, R, R) to scaled latents (n, c, h, w).
    """

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor]):
        self.source = source
        self.encode = encode

    def draw(self, step: int, count: int) -> tuple[Any, Any]:
        """The global batch of a step: items to caption, and keys for `latents`."""
        items = self.source.draw(step, count)
        return items, items

    def latents(self, keys: Any) -> torch.Tensor:
        """Scaled latents (n, c, h, w), float32."""
        return self.encode(self.source.images(keys))


class CachedLatents:
    """Latents of a fixed number of items, shuffled anew in every epoch; captions are still drawn anew in every step.

    Args:
        source: Where the items come from.
        encode: From pictures (n, 3, R, R) to scaled latents (n, c, h, w).
        length: Number of items to encode.
        seed: Seed of the run.
        file: Where the latents are kept between runs; the name should tell all that they depend on.
        accelerator: One process encodes, the others wait.

    Raises:
        ValueError: If `file` is not what it should be.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[torch.Tensor], torch.Tensor],
        length: int,
        seed: int,
        file: Path,
        accelerator: Accelerator,
    ):
        self.seed, self.length = seed, length
        self.items = source.draw(0, length)
        if accelerator.is_main_process and not file.is_file():
            began = time.monotonic()
            parts = [
                # half the memory; the rounding is far below the autoencoder's error
                encode(source.images(self.items[first : first + ENCODE_BATCH])).half().cpu()
                for first in range(0, length, ENCODE_BATCH)
            ]
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, save({"latents": torch.cat(parts).contiguous()}))
            logger.info("encoded %d pictures in %.0f s", length, time.monotonic() - began)
        accelerator.wait_for_everyone()
        self._latents = read_kept(file, "encode the pictures again", "latents")["latents"]
        if len(self._latents) != length:
            raise ValueError(
                f"{file} holds {len(self._latents)} latents, not {length}; remove it to encode them again"
            )

    def draw(self, step: int, count: int) -> tuple[Any, Any]:
        """The global batch of a step: items to caption, and keys for `latents`."""
        rows = epoch_rows(self.seed, step * count, count, self.length, "cache")
        return self.items[rows], rows

    def latents(self, keys: torch.Tensor) -> torch.Tensor:
        """Scaled latents (n, c, h, w), float32."""
        return self._latents[keys].float()


def make_latents(
    args: Namespace,
    source: Source,
    vae: AutoencoderKL,
    encode: Callable[[torch.Tensor], torch.Tensor],
    accelerator: Accelerator,
) -> FreshLatents | CachedLatents:
    """The latents that a script trains on: with `--cache_latents` those of so many pictures, otherwise new ones every step."""
    if not args.cache_latents:
        return FreshLatents(source, encode)
    settings = {name: getattr(args, name) for name in (
        "cache_latents", "seed", "dataset_name", "train_data_dir", "vendors", "objects", "resolution", "image_column"
    )}  # fmt: skip
    file = Path(args.output_dir) / cache_name(vae, **settings)
    return CachedLatents(source, encode, args.cache_latents, args.seed, file, accelerator)


def read_kept(file: Path, cure: str, *names: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that a run has made for itself and keeps.

    Args:
        file: A safetensors file.
        cure: What its removal leads to, for the message.
        names: Tensors that it must hold.

    Raises:
        ValueError: If it cannot be read or does not hold them.
        OSError: If it is not there.
    """
    try:
        tensors = load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged; remove it to {cure}") from error
    if missing := set(names) - tensors.keys():
        raise ValueError(f"{file} is damaged, it holds no {', '.join(sorted(missing))}; remove it to {cure}")
    return tensors


def encoder_of(vae: AutoencoderKL) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from pictures to scaled latents (the mode of the posterior), without gradients.

    Mean and deviation of the channels, or a shift, are taken out first where the autoencoder's config has them: the inverse of
    what the stock pipelines do.
    """
    mean, deviation = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    shift = vae.config.get("shift_factor")

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
        if mean is not None and deviation is not None:
            latents = (latents - per_channel(mean, latents)) / per_channel(deviation, latents)
        elif shift:
            latents = latents - shift
        return latents * vae.config.scaling_factor

    return encode


def per_channel(values: Sequence[float], latents: torch.Tensor) -> torch.Tensor:
    """A number for each channel of latents (n, c, h, w), as (1, c, 1, 1)."""
    return latents.new_tensor(values).reshape(1, -1, 1, 1)


def cache_name(vae: AutoencoderKL, **settings: Any) -> str:
    """File name that changes with the autoencoder's weights and with every setting."""
    return digest_name("latents", settings, vae)


def digest_name(kind: str, settings: Mapping[str, Any], *models: nn.Module) -> str:
    """Name of a safetensors file that changes with the weights of every model and with every setting."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    for model in models:
        digest.update(str(getattr(model.config, "scaling_factor", None)).encode())
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if getattr(model.config, name, None):
                digest.update(f"{name} {getattr(model.config, name)}".encode())
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"{kind}-{digest.hexdigest()[:16]}.safetensors"

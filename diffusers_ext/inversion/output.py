"""The result of an inversion, and its two files.

`inversion_config.json` names the file with the latents and its digest, and that name contains the digest. So each file is
replaced in one step, and a kill between the two leaves the former inversion in force.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from diffusers.utils import BaseOutput
from safetensors import SafetensorError
from torch import nn

from ..atomic import atomic_write
from ..manifest import DamagedFileError, first_line, read_json_object
from .denoiser import Inverted


CONFIG_NAME = "inversion_config.json"
CONFIG_KEYS = ("method", "alignment", "num_inference_steps", "image_size", "scheduler", "model")
# Version 1 had latents and timesteps alone and is read as well.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

# What a method may store besides the latents, and of which shape; the first axis is that of the steps.
EXTRAS = ("null_embeddings", "noise_maps", "offsets")

# Values kept of each network to recognise it by, and how far two of them may differ when the dtype does.
PROBES = 16
PROBE_TOLERANCE = 8e-3


@dataclass
class InversionOutput(BaseOutput):
    """Latents of pictures at every noise level, with what is needed to know where they may be used.

    Attributes:
        latents (`torch.Tensor` of shape `(steps + 1, batch, channels, height, width)`):
            From the encoded pictures, `latents[0]`, to the noisiest level, `latents[-1]`, where sampling starts.
        timesteps (`torch.Tensor` of shape `(steps,)`): Ascending; the network was asked at `timesteps[k]` to get
            `latents[k + 1]`.
        prompt (`list[str]`): The source prompt of every picture.
        config (`dict`): `method`, `alignment`, `num_inference_steps`, `image_size` as `[height, width]`, `scheduler` and
            `model`, and `settings` of the method, such as its `guidance_scale`: plain values, as written to the file.
        network_evaluations (`int`): What it cost, each picture counted.
        backward_passes (`int`): Gradients through the network, counted in the same way.
        null_embeddings (`torch.Tensor` of shape `(steps or 1, batch, tokens, width)`, *optional*):
            To be used in place of the empty prompt's. Entry k belongs to `timesteps[k]`, here and below.
        noise_maps (`torch.Tensor` of shape `(steps, batch, channels, height, width)`, *optional*):
            The noise of each stochastic step.
        offsets (`torch.Tensor` of shape `(steps, batch, channels, height, width)`, *optional*):
            To be added to the source branch after each step.

    Example:
        ```python
        from PIL import Image
        from diffusers_ext import GuideAndRescalePipeline, InversionOutput

        pipe = GuideAndRescalePipeline.from_pretrained("pipelines/emoji-scenes-64")
        inversion = pipe.invert(Image.new("RGB", (64, 64), "red"), "a red wall", num_inference_steps=4)
        inversion.save_pretrained("inverted")
        again = InversionOutput.from_pretrained("inverted")
        pipe(inversion=again, prompt="a blue wall", num_inference_steps=4).images[0].save("blue.png")
        ```
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompt: list[str]
    config: dict[str, Any]
    network_evaluations: int = 0
    backward_passes: int = 0
    null_embeddings: torch.Tensor | None = None
    noise_maps: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @classmethod
    def of(cls, inverted: Inverted, prompt: list[str], config: Mapping[str, Any]) -> Self:
        """What a method found, with the prompts and the model it belongs to.

        Args:
            inverted ([`Inverted`]): What the method returned.
            prompt (`list[str]`): The source prompt of every picture.
            config (`dict`): `image_size`, `scheduler` and `model`; the rest is known from `inverted`.

        Returns:
            [`InversionOutput`]: To be kept.

        Raises:
            ValueError: If the parts do not fit together.
        """
        settings = dict(inverted.settings)
        whole = {
            "method": inverted.method,
            "alignment": settings.pop("alignment", "matched"),
            "num_inference_steps": len(inverted.timesteps),
            **config,
        }
        if settings:
            whole["settings"] = settings
        output = cls(
            inverted.latents, inverted.timesteps, list(prompt), whole, inverted.forward_passes, inverted.backward_passes,
            **{name: getattr(inverted, name) for name in EXTRAS},
        )  # fmt: skip
        if problem := output.problem():
            raise ValueError(f"the inversion is not whole: {problem}")
        return output

    @property
    def inverted(self) -> Inverted:
        """What the method found, as [`regenerate`] takes it."""
        return Inverted(
            self.config["method"], self.latents, self.timesteps,
            {"alignment": self.config["alignment"], **self.config.get("settings", {})},
            **{name: getattr(self, name) for name in EXTRAS},
            forward_passes=self.network_evaluations, backward_passes=self.backward_passes,
        )  # fmt: skip

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes the inversion to a folder.

        A kill or a full disk at any moment leaves the folder's former inversion, if there was one, as it was.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; it is made if it is not there. Only files of an earlier
                inversion are ever replaced or removed in it.

        Raises:
            OSError: If it cannot be written.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"save_directory={str(folder)!r} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents, "timesteps": self.timesteps}
        tensors |= {name: getattr(self, name) for name in EXTRAS if getattr(self, name) is not None}
        data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        weights = f"inversion-{digest[:12]}.safetensors"
        content = {
            "format_version": FORMAT_VERSION,
            "file": weights,
            "sha256": digest,
            "prompt": self.prompt,
            "network_evaluations": self.network_evaluations,
            "backward_passes": self.backward_passes,
            **self.config,
        }
        former = _weights_named_in(folder)
        atomic_write(folder / weights, data)
        atomic_write(folder / CONFIG_NAME, (json.dumps(content, indent=2) + "\n").encode())
        if former is not None and former.name != weights:
            former.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads an inversion from a folder and checks that it is whole.

        Args:
            directory (`str` or `os.PathLike`): A folder that [`InversionOutput.save_pretrained`] wrote.

        Returns:
            [`InversionOutput`]: The inversion, on the CPU. Whether it fits a pipeline is checked when it is used.

        Raises:
            DamagedFileError: If a file is missing, damaged, or not what the other says.
        """
        folder = Path(directory)
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise DamagedFileError(
                f"{folder} holds no inversion: {CONFIG_NAME} is missing; use a folder that InversionOutput.save_pretrained wrote"
            )
        content = read_json_object(path)
        missing = [key for key in ("file", "sha256", "prompt", *CONFIG_KEYS) if key not in content]
        if missing or content.get("format_version") not in READABLE_VERSIONS:
            reason = f"{missing[0]} is missing" if missing else f"format_version={content.get('format_version')!r}"
            raise DamagedFileError(f"{path} is damaged or of another version ({reason}); invert the picture again")
        weights = folder / Path(str(content["file"])).name
        try:
            data = weights.read_bytes()
        except OSError as error:
            raise DamagedFileError(f"{weights} cannot be read ({error.strerror}); invert the picture again") from error
        if hashlib.sha256(data).hexdigest() != content["sha256"]:
            raise DamagedFileError(
                f"{weights} is damaged: it is not the file that was saved; invert the picture again"
            )
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedFileError(f"{weights} is damaged ({first_line(error)}); invert the picture again") from error
        output = cls(
            latents=tensors.get("latents", torch.empty(0)),
            timesteps=tensors.get("timesteps", torch.empty(0)),
            prompt=content["prompt"],
            config={key: content[key] for key in (*CONFIG_KEYS, "settings") if key in content},
            network_evaluations=content.get("network_evaluations", 0),
            backward_passes=content.get("backward_passes", 0),
            **{name: tensors.get(name) for name in EXTRAS},
        )
        if problem := output.problem():
            raise DamagedFileError(
                f"{path} and {weights.name} do not fit together: {problem}; invert the picture again"
            )
        return output

    def problem(self) -> str | None:
        """What is wrong with this object in itself, in words; None if nothing is."""
        missing = [key for key in CONFIG_KEYS if key not in self.config]
        if missing:
            return f"config has no {missing[0]!r}"
        size = self.config["image_size"]
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 2
            or not all(isinstance(n, int) and n > 0 for n in size)
        ):
            return f"image_size={size!r} is not [height, width]"
        if not isinstance(self.config["scheduler"], dict) or not isinstance(self.config["model"], dict):
            return "scheduler or model in config is not a dict"
        if not isinstance(self.latents, torch.Tensor) or self.latents.ndim != 5:
            return "latents is not a tensor of shape (steps + 1, batch, channels, height, width)"
        if not isinstance(self.timesteps, torch.Tensor) or self.timesteps.ndim != 1:
            return "timesteps is not a tensor of shape (steps,)"
        steps = self.config["num_inference_steps"]
        if self.latents.shape[0] != len(self.timesteps) + 1 or len(self.timesteps) != steps:
            return f"there are {self.latents.shape[0]} states and {len(self.timesteps)} timesteps for {steps} steps"
        if not isinstance(self.prompt, list) or not all(isinstance(text, str) for text in self.prompt):
            return "prompt is not a list of str"
        if len(self.prompt) != self.latents.shape[1]:
            return f"there are {len(self.prompt)} prompts for {self.latents.shape[1]} pictures"
        if not bool(torch.isfinite(self.latents).all()):
            return "latents holds values that are not finite"
        for name in ("network_evaluations", "backward_passes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                return f"{name}={getattr(self, name)!r} is not a number of passes"
        if not isinstance(self.config.get("settings", {}), dict):
            return "settings in config is not a dict"
        return self._problem_of_extras(len(self.timesteps))

    def _problem_of_extras(self, steps: int) -> str | None:
        batch = self.latents.shape[1]
        for name in EXTRAS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                return f"{name} is not a tensor"
            if name == "null_embeddings":
                fits = value.ndim == 4 and value.shape[0] in (1, steps) and value.shape[1] == batch
            else:
                fits = value.shape == (steps, *self.latents.shape[1:])
            if not fits:
                return f"{name} of shape {tuple(value.shape)} does not belong to {steps} steps of {batch} pictures"
            if not bool(torch.isfinite(value).all()):
                return f"{name} holds values that are not finite"
        for method, name in (("null_text", "null_embeddings"), ("edit_friendly", "noise_maps")):
            if self.config["method"] == method and getattr(self, name) is None:
                return f"method={method!r} has {name}, which are missing"
        return None

    def check_fits(
        self, config: dict[str, Any], prompt: list[str] | None, guidance_scale: float | None = None
    ) -> None:
        """Checks that the inversion can be used where `config` holds.

        Args:
            config (`dict`): What an inversion made there would have; `image_size` is not compared.
            prompt (`list[str]`, *optional*): The source prompt given there.
            guidance_scale (`float`, *optional*): That of the sampling, to be compared where the inversion was made for one.

        Raises:
            ValueError: If not; the message says what differs.
        """
        if problem := self.problem():
            raise ValueError(f"inversion cannot be used: {problem}")
        for key in ("num_inference_steps", "alignment"):
            if self.config[key] != config[key]:
                raise ValueError(
                    f"inversion was made with {key}={self.config[key]!r}, the call has {config[key]!r}; "
                    "use the same value, or invert again"
                )
        theirs, ours = self.config["scheduler"], config["scheduler"]
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if theirs.get(key) != ours.get(key):
                raise ValueError(
                    f"inversion was made with another scheduler: {key}={theirs.get(key)!r} there, {ours.get(key)!r} here; "
                    "invert again"
                )
        if component := differing_component(self.config["model"], config["model"]):
            raise ValueError(f"inversion was made with another model: its {component} differs; invert again")
        if prompt is not None and prompt != self.prompt:
            raise ValueError(f"inversion was made for source_prompt={self.prompt!r}, the call has {prompt!r}")
        own = self.config.get("settings", {}).get("guidance_scale")
        if None not in (own, guidance_scale) and own != guidance_scale:
            raise ValueError(
                f"inversion was made for guidance_scale={own!r}, the call has {guidance_scale!r}; use the same value, or "
                "invert again"
            )


def model_fingerprint(components: dict[str, nn.Module]) -> dict[str, Any]:
    """A few plain numbers by which networks are recognised, whatever their dtype and device.

    Args:
        components (`dict[str, torch.nn.Module]`): Networks by name.

    Returns:
        `dict`: For each its class, dtype, number of weights, and values read at fixed places.
    """
    result = {}
    for component, module in components.items():
        matrices = sorted((name, p) for name, p in module.named_parameters() if p.ndim > 1)
        chosen = matrices[:: max(1, len(matrices) // PROBES)]
        result[component] = {
            "class": type(module).__name__,
            "dtype": str(matrices[0][1].dtype) if matrices else "",
            "parameters": sum(p.numel() for p in module.parameters()),
            "values": [float(p.detach().flatten()[p.numel() // 2]) for _, p in chosen if not p.is_meta],
        }
    return result


def differing_component(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first component in which two fingerprints differ by more than a change of dtype explains."""
    for component in theirs:
        a, b = ours.get(component), theirs[component]
        if not isinstance(a, dict) or any(a.get(key) != b[key] for key in ("class", "parameters")):
            return component
        values = a.get("values")
        if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
            return component
        tolerance = 0.0 if a.get("dtype") == b["dtype"] else PROBE_TOLERANCE
        # Weights that are offloaded cannot be read and are left out of the lists.
        if len(values) == len(b["values"]) and any(
            abs(x - y) > tolerance * max(abs(x), abs(y)) + (1e-7 if tolerance else 0.0)
            for x, y in zip(values, b["values"], strict=True)
        ):
            return component
    return None


def _weights_named_in(folder: Path) -> Path | None:
    """The latents file that a former inversion in this folder names; None if there is no sound one."""
    try:
        name = str(read_json_object(folder / CONFIG_NAME).get("file", ""))
    except DamagedFileError:
        return None
    ours = name.startswith("inversion-") and name.endswith(".safetensors") and Path(name).name == name
    return folder / name if ours else None

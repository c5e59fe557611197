"""Image-to-image on a stream of pictures: one enters, one leaves, and the network is called once.

StreamDiffusion, 2023, arXiv 2312.12491. A picture needs n stages of denoising. In place of n calls of the network for each picture, the
last n pictures share a batch, each at another stage:

    call k:     stage 0 of picture k,   stage 1 of picture k - 1,   ...,   stage n - 1 of picture k - n + 1, which leaves

The stages are in `stream_stages.py`, the guidance that does not double the batch in `schedulers/residual_guidance.py`. Pictures do
not see each other: each one is what image-to-image would make of it alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers import LCMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..guidance import Condition, join_conditions
from ..schedulers.residual_guidance import strength_indices
from .inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_size,
    checked_choice,
    checked_number,
    checked_prompts,
    checked_steps,
    images_to_tensor,
)
from .similarity_filter import SimilarityFilter
from .stream_networks import networks_of
from .stream_stages import GUIDANCES, UPDATES, StreamRow, StreamStages, advance, entering


Picture = PIL.Image.Image | np.ndarray | torch.Tensor


class _Same:
    """Stands for a picture that was left out: its result is the one before it."""


@dataclass
class _Run:
    """One stream: what is on its way at the stages 1 to n - 1, and what is remembered of what has left."""

    slots: list[StreamRow | _Same | None]
    filter: SimilarityFilter | None
    size: tuple[int, int] | None = None
    last: Any = None
    conditions: dict[tuple[str, str | None], tuple[Condition, Condition | None]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return all(slot is None for slot in self.slots)


class StreamBatch:
    """Image-to-image on a stream of pictures with any Stable Diffusion 1.x, 2.x or SDXL model.

    It is used on any iterator of pictures, `for picture in stream(pictures)`, or picture by picture with `push` and `drain`. Every picture
    that enters leaves once, in order, `latency` pictures later. The networks are those of the pipeline, not copies, with
    whatever LoRA or attention processors they carry.

    Args:
        pipe ([`DiffusionPipeline`]):
            A pipeline with the components of a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`. The scheduler lends its
            config only.
        prompt (`str`, *optional*, defaults to `""`):
            What the pictures shall show. `stream.prompt = "..."` at any moment holds for the pictures that enter after it; a
            picture keeps the prompt that it entered with.
        negative_prompt (`str`, *optional*):
            What they shall not show; likewise. Without effect where guidance is `"self"` or `"none"`, which never ask for it.
        num_inference_steps (`int`, *optional*, defaults to 8):
            Steps of the whole schedule, from noise to data.
        strength (`float`, *optional*, defaults to 0.5):
            Share of the steps that is made, as in diffusers: above 0 and up to 1. Less keeps more of the picture.
        t_index_list (`list[int]`, *optional*):
            Places in the schedule instead of `strength`, ascending from 0 to `num_inference_steps - 1`, such as `[18, 26, 35, 45]`
            of 50.
        guidance_scale (`float`, *optional*, defaults to 1.2):
            Strength of the prompt, at least 1, which is none.
        guidance (`str`, *optional*, defaults to `"self"`):
            What stands for the prediction without words: `"full"` asks the network for it, 2n rows a call; `"initialize"`
            asks once a picture, n + 1 rows; `"self"` never, n rows; `"none"` leaves guidance out, n rows.
        delta (`float`, *optional*, defaults to 1.0):
            How much the virtual residual noise counts in `"self"` and `"initialize"`; less is milder.
        update (`str`, *optional*):
            `"ddim"` for ordinary models, `"lcm"` for latent consistency models. By default `"lcm"` if the pipeline has an `LCMScheduler`.
        similarity_filter ([`SimilarityFilter`], *optional*): Leaves out pictures that hardly differ.
        height (`int`, *optional*): Scale pictures to this height in pixels. Defaults to their own.
        width (`int`, *optional*): Scale pictures to this width in pixels. Defaults to their own.
        generator (`torch.Generator`, *optional*):
            Source of the noise. It is drawn once and serves all pictures, so that what stands still does not flicker.
        noise (`torch.Tensor`, *optional*):
            That noise itself, `(1, channels, height, width)` in latents; with `"lcm"` one for each stage.
        output_type (`str`, *optional*, defaults to `"pil"`):
            `"pil"`, `"np"` of shape `(height, width, 3)`, `"pt"` of shape `(3, height, width)`, or `"latent"`.

    Attributes:
        unet_calls (`int`): Calls of the network so far.
        network_evaluations (`int`): Rows of their batches.
        pictures_skipped (`int`): Pictures that the filter left out.

    Raises:
        ValueError: If an argument is out of range, or the pipeline is of another family.
        TypeError: If an argument is of a wrong type.

    Example:
        ```python
        from diffusers import StableDiffusionPipeline
        from PIL import Image
        from diffusers_ext import StreamBatch

        pipe = StableDiffusionPipeline.from_pretrained("pipelines/emoji-scenes-64")
        stream = StreamBatch.from_pipe(pipe, prompt="a red apple on a blue background", num_inference_steps=4)
        camera = (Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (200, 210, 220))
        pictures = list(stream(camera))
        assert len(pictures) == 3 and stream.unet_calls == 3 + stream.latency
        ```
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompt: str = "",
        negative_prompt: str | None = None,
        num_inference_steps: int = 8,
        strength: float = 0.5,
        t_index_list: Sequence[int] | None = None,
        guidance_scale: float = 1.2,
        guidance: str = "self",
        delta: float = 1.0,
        update: str | None = None,
        similarity_filter: SimilarityFilter | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> None:
        self._networks: Any = networks_of(pipe)
        self._dtype = torch.float64 if self._networks.unet.dtype == torch.float64 else torch.float32
        self.prompt, self.negative_prompt = prompt, negative_prompt
        steps = checked_steps(num_inference_steps)
        indices: Sequence[int]
        if t_index_list is None:
            indices = strength_indices(steps, checked_number(strength, "strength", 0.0, 1.0))
        else:
            indices = _checked_indices(t_index_list, steps)
        self._guidance = checked_choice(guidance, "guidance", GUIDANCES)
        self._scale = checked_number(guidance_scale, "guidance_scale", 1.0, float("inf"))
        self._delta = checked_number(delta, "delta", 0.0, 10.0)
        if self._networks._is_guidance_distilled and guidance != "none":
            raise ValueError(
                f'guidance={guidance!r}, but this network takes the guidance scale as an input; use guidance="none"'
            )
        if update is None:
            update = "lcm" if isinstance(pipe.scheduler, LCMScheduler) else "ddim"
        self._stages = StreamStages.from_config(
            pipe.scheduler.config, steps, indices, checked_choice(update, "update", UPDATES)
        )
        self._stages.check_guidance(guidance)
        if similarity_filter is not None and not isinstance(similarity_filter, SimilarityFilter):
            raise TypeError(f"similarity_filter={similarity_filter!r} is none; give a SimilarityFilter()")
        check_size(height, width)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r} is not a torch.Generator; give one, or leave it out")
        if noise is not None:
            if not isinstance(noise, torch.Tensor) or noise.ndim != 4 or len(noise) != self._stages.noises:
                found = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
                raise ValueError(
                    f"noise={found} does not fit; give a tensor of shape ({self._stages.noises}, channels, height, width)"
                )
            check_finite(noise, "noise", torch.float32)
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        self._filter, self._output_type = similarity_filter, output_type
        self._height, self._width = height, width
        self._generator = None if generator is None else generator.clone_state()
        self._given_noise, self._noise = noise, None if noise is None else noise.clone()
        self.unet_calls = self.network_evaluations = self.pictures_skipped = 0
        self._run = self._new_run()

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **settings: Any) -> Self:
        """A stream with the networks of a pipeline.

        Args:
            pipe ([`DiffusionPipeline`]): The pipeline.
            settings: The other arguments of the class.

        Returns:
            [`StreamBatch`]: The stream.
        """
        return cls(pipe, **settings)

    @property
    def prompt(self) -> str:
        """What pictures that enter from now on shall show."""
        return self._prompt

    @prompt.setter
    def prompt(self, value: str) -> None:
        self._prompt = _checked_prompt(value, "prompt")

    @property
    def negative_prompt(self) -> str | None:
        """What pictures that enter from now on shall not show."""
        return self._negative_prompt

    @negative_prompt.setter
    def negative_prompt(self, value: str | None) -> None:
        self._negative_prompt = None if value is None else _checked_prompt(value, "negative_prompt")

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the stages."""
        return self._stages.timesteps

    @property
    def latency(self) -> int:
        """Pictures that enter before the first one leaves: stages less one."""
        return len(self._stages) - 1

    def __call__(self, pictures: Iterable[Picture] | torch.Tensor | np.ndarray) -> Iterator[Any]:
        """Yields the results of pictures as they become ready.

        Args:
            pictures (iterable): Pictures from anywhere: PIL pictures, arrays `(height, width, 3)` or tensors `(3, height, width)`, or
                one array or tensor with an axis before those; all of one size, unless `height` and `width` are given. They are
                pulled one at a time, and the last ones leave when it ends.

        Returns:
            `Iterator`: As many results as pictures, in their order.

        Raises:
            TypeError: If it cannot be iterated over.
            ValueError: After all earlier pictures were delivered, if it raised, or yielded something that is not a picture of the
                stream's size. At once if the network's answer is not finite.
        """
        single = isinstance(pictures, (str, bytes, Mapping, PIL.Image.Image))
        if isinstance(pictures, (np.ndarray, torch.Tensor)):
            single = pictures.ndim != 4
        if single or not isinstance(pictures, Iterable):
            raise TypeError(
                f"pictures={type(pictures).__name__} is not an iterable of pictures; give a list or an iterator of them"
            )
        return self._results(iter(pictures))

    def push(self, picture: Picture) -> Any:
        """Takes one picture in, and gives the one back that is ready.

        Args:
            picture (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The next picture.

        Returns:
            The result of the picture that entered `latency` pictures earlier; None while there is none.

        Raises:
            TypeError: If it is not a picture.
            ValueError: If it has another size than those before it, or a value becomes infinite or NaN. What is on its way is then as
                before the call.
        """
        return self._push(self._run, self._pixels(self._run, picture))

    def drain(self) -> Iterator[Any]:
        """Yields what is still on its way from `push`; afterwards the stream may go on."""
        return self._drained(self._run)

    def reset(self) -> None:
        """Drops what is on its way from `push`, and the size of the pictures with it."""
        self._run = self._new_run()

    # -- the loop --------------------------------------------------------------------------------------------------

    def _new_run(self) -> _Run:
        return _Run([None] * self.latency, None if self._filter is None else self._filter.fresh())

    def _results(self, pictures: Iterator[Picture]) -> Iterator[Any]:
        run, count, failure = self._new_run(), 0, None
        while failure is None:
            try:
                pixels = self._pixels(run, next(pictures))
            except StopIteration:
                break
            except Exception as error:
                failure = ValueError(
                    f"pictures: number {count} failed ({type(error).__name__}: {error}); the {count} before it were delivered, give "
                    "a new iterator to go on"
                )
                failure.__cause__ = error
                break
            result = self._push(run, pixels)
            count += 1
            if result is not None:
                yield result
        yield from self._drained(run)
        if failure is not None:
            raise failure

    def _drained(self, run: _Run) -> Iterator[Any]:
        while not run.is_empty:
            result = self._shift(run, None)
            if result is not None:
                yield result

    def _pixels(self, run: _Run, picture: Any) -> torch.Tensor:
        """A picture, checked: (1, 3, height, width) in [-1, 1]."""
        if isinstance(picture, (list, tuple)):
            raise TypeError(f"picture is a {type(picture).__name__}; give one picture at a time")
        pixels = images_to_tensor(picture, self._height, self._width, name="picture")
        if len(pixels) != 1:
            raise ValueError(f"picture has a batch of {len(pixels)}; give one picture at a time")
        size = (pixels.shape[-2], pixels.shape[-1])
        if run.size not in (None, size):
            raise ValueError(
                f"picture is {size[1]}x{size[0]} in a stream of {run.size[1]}x{run.size[0]}; give height and width, or call reset()"
            )
        return pixels

    @torch.no_grad()
    def _push(self, run: _Run, pixels: torch.Tensor) -> Any:
        if run.filter is not None and run.filter.skips(pixels):
            result = self._shift(run, _Same())
            run.filter.skipped()
            self.pictures_skipped += 1
            return result
        size = (pixels.shape[-2], pixels.shape[-1])
        data = self._networks._encode(pixels).to(self._dtype)
        check_finite(data, "the encoded picture", self._networks.vae.dtype)
        condition, negative = self._conditions(run, size)
        row = entering(data, self._stages, self._noise_like(data), condition, negative)
        before, run.size = run.size, size
        try:
            result = self._shift(run, row)
        except BaseException:
            run.size = before
            raise
        if run.filter is not None:
            run.filter.passed(pixels)
        return result

    @torch.no_grad()
    def _shift(self, run: _Run, new: StreamRow | _Same | None) -> Any:
        """One call: everything moves one stage on, and what was at the last one leaves. Nothing changes if it fails."""
        slots = [new, *run.slots]
        places = [place for place, slot in enumerate(slots) if isinstance(slot, StreamRow)]
        rows = [slot for slot in slots if isinstance(slot, StreamRow)]
        if rows:
            noise = self._noise_like(rows[0].latents)
            moved = advance(rows, self._stages, noise, self._predict, self._guidance, self._scale, self._delta)
            for place, row in zip(places, moved, strict=True):
                if not bool(torch.isfinite(row.latents).all()):
                    raise ValueError(
                        f"the latents after stage {row.stage} of {len(self._stages)} are infinite or not a number; load the model in "
                        "float32, or lower guidance_scale"
                    )
                slots[place] = row
        leaving = slots.pop()
        result = _copied(run.last) if isinstance(leaving, _Same) else None
        if isinstance(leaving, StreamRow):
            result = self._decoded(leaving.latents, run.size)
            run.last = _copied(result)
        run.slots = slots
        return result

    def _predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Condition | None]
    ) -> torch.Tensor:
        unet = self._networks.unet
        dtype = unet.dtype
        condition = join_conditions([item for item in conditions if item is not None])
        answer = unet(latents.to(dtype), timesteps, return_dict=False, **condition)[0]
        self.unet_calls += 1
        self.network_evaluations += len(latents)
        return answer

    # -- pictures and words ----------------------------------------------------------------------------------------

    def _conditions(self, run: _Run, size: tuple[int, int]) -> tuple[Condition, Condition | None]:
        """What the network gets with the prompt and without, computed when one of them changed."""
        words = (self.prompt, self.negative_prompt)
        if words not in run.conditions:
            make = self._networks._condition
            condition = make([self.prompt], size, guidance_scale=self._scale)
            negative = None
            if self._guidance in ("full", "initialize"):
                negative = make([self.negative_prompt or ""], size, no_words=self.negative_prompt is None)
            # only the latest: pictures on their way hold their own
            run.conditions = {words: (condition, negative)}
        return run.conditions[words]

    def _noise_like(self, latents: torch.Tensor) -> torch.Tensor:
        """The noise of the stream, drawn from the same state for every size of pictures."""
        shape = tuple(latents.shape[1:])
        if self._given_noise is not None and self._given_noise.shape[1:] != shape:
            raise ValueError(
                f"noise={tuple(self._given_noise.shape)} does not fit pictures whose latents are {shape}; give "
                f"{(self._stages.noises, *shape)}"
            )
        if self._noise is None or self._noise.shape[1:] != shape:
            generator = None if self._generator is None else self._generator.clone_state()
            drawn = [
                randn_tensor((1, *shape), generator=generator, device=latents.device, dtype=torch.float32)
                for _ in range(self._stages.noises)
            ]
            self._noise = torch.cat(drawn)
        return self._noise.to(latents)

    def _decoded(self, latents: torch.Tensor, size: tuple[int, int] | None) -> Any:
        if self._output_type == "latent":
            return latents[0].clone()
        networks = self._networks
        pictures, _ = networks._decode(latents.to(networks.unet.dtype), size, None, self._output_type)
        return pictures[0]


def _checked_prompt(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{name}={value!r} is not a str; give one prompt, "" for no words')
    return checked_prompts(value, name)[0]


def _checked_indices(value: Any, steps: int) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and all(type(item) is int for item in value)
    ascending = whole and len(value) > 0 and list(value) == sorted(set(value))
    if not ascending or value[0] < 0 or value[-1] >= steps:
        raise ValueError(
            f"t_index_list={value!r} does not fit; give ascending whole numbers from 0 to {steps - 1} (num_inference_steps="
            f"{steps})"
        )
    return tuple(value)


def _copied(result: Any) -> Any:
    """A result of its own memory, so that a caller who draws on one does not change the next."""
    return result.clone() if isinstance(result, torch.Tensor) else result.copy()

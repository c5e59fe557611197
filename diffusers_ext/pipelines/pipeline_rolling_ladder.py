"""Endless sequences, frame by frame, in bounded memory.

Rolling diffusion on a ladder (RDLA), arXiv 2503.10488. The state is a window of W frames, of which each is noisier than those before
it, and the last emitted frames as context. Until no more frames are wanted:

    repeat m times:   z = step(network([context, z], times), times, z)
    emit the first l frames; they become context; the window moves on, with l frames of noise behind it

A frame enters as noise W frames before it is emitted, and its condition is needed then: that is the look-ahead. With a shorter one it
is without condition until it comes so near.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..integrity import CheckedLoadingMixin
from ..schedulers.noise import check_generator
from ..schedulers.scheduling_rolling_ladder import RollingLadderScheduler
from .frame_conditions import ConditionSource, checked_conditions
from .frame_units import ChannelUnits
from .inputs import check_finite, checked_choice, checked_number, checked_steps


WARMUPS = ("init", "pad")
OUTPUT_TYPES = ("pt", "np")
# More sequences at once than any memory holds are a mistake in the call.
LARGEST_BATCH = 1_000_000


@dataclass
class RollingLadderPipelineOutput(BaseOutput):
    """What a call gives.

    Attributes:
        frames (`torch.Tensor` or `np.ndarray` of shape `(batch, frames, channels)`): The sequence; `(batch, frames, channels, height,
            width)` of a frame adapter.
        network_evaluations (`int`): Forward passes of the network, of the whole batch each (two per pass with guidance).
    """

    frames: torch.Tensor | np.ndarray
    network_evaluations: int = 0


@dataclass
class _Stream:
    """The state of one stream: O(window + context), whatever its length. Context, window and condition are as the network sees them."""

    scheduler: RollingLadderScheduler
    source: ConditionSource | None
    batch_size: int
    num_frames: int | None
    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    noise_source: Callable[[int], torch.Tensor] | None
    callback: Callable[..., dict[str, Any] | None] | None
    device: torch.device
    dtype: torch.dtype
    frame_shape: tuple[int, ...]
    frame_units: ChannelUnits
    condition_units: ChannelUnits
    context: torch.Tensor
    window: torch.Tensor
    lookahead: int
    # Conditions of the context and of the first frames of the window together, and whether each is known.
    condition: torch.Tensor | None = None
    known: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    evaluations: int = 0
    has_ended: bool = False

    @property
    def frames_left(self) -> int:
        """Frames of the window that will be emitted: without those behind the end of the source, which entered before it was known."""
        if not self.has_ended:
            return self.window.shape[1]
        return min(self.window.shape[1], self._conditions_ahead)

    @property
    def _conditions_ahead(self) -> int:
        return 0 if self.condition is None else self.condition.shape[1] - self.context.shape[1]

    def noise(self, count: int) -> torch.Tensor:
        """`(batch, count, *frame_shape)` of noise."""
        shape = (self.batch_size, count, *self.frame_shape)
        if self.noise_source is None:
            return randn_tensor(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        noise = self.noise_source(count)
        if not isinstance(noise, torch.Tensor) or tuple(noise.shape) != shape:
            found = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise ValueError(f"noise_source returned {found}; it must return a tensor of shape {shape}")
        check_finite(noise, "what noise_source returned", self.dtype)
        return noise.to(self.device, self.dtype)

    def entering(self, count: int, staying: int) -> torch.Tensor | None:
        """Up to `count` frames of noise behind `staying` ones, and takes up the conditions that are due; None where there is none to come."""
        if self.source is not None and self.condition is not None:
            due = max(0, self.lookahead - self._conditions_ahead)
            pulled = self.source.pull(due)
            self.condition = torch.cat([self.condition, pulled], 1)
            self.known = torch.cat([self.known, torch.ones(pulled.shape[1], dtype=torch.bool)])
            self.has_ended |= pulled.shape[1] < due
            if self.has_ended:
                count = max(0, min(count, self._conditions_ahead - staying))
        return self.noise(count) if count else None

    def remember(self, frames: torch.Tensor) -> None:
        """Makes emitted frames context, and forgets what is too long ago."""
        before = self.context.shape[1]
        time, length = self.scheduler.config.context_timestep, self.scheduler.config.context_length
        if length and time is not None and frames.shape[1]:
            frames = self.scheduler.add_noise(frames, self.noise(frames.shape[1]), time)
        joined = torch.cat([self.context, frames], 1)
        # A copy: a view would hold more and more.
        self.context = joined[:, max(0, joined.shape[1] - length) :].clone()
        if self.condition is not None:
            forgotten = before + frames.shape[1] - self.context.shape[1]
            self.condition, self.known = self.condition[:, forgotten:].clone(), self.known[forgotten:]


class RollingLadderPipeline(CheckedLoadingMixin, DiffusionPipeline):
    """Generates sequences of feature vectors of any length, with a condition for every frame that may arrive while it runs.

    Args:
        transformer ([`RollingTransformer1DModel`]): Predicts a window of frames with a time for each. Any [`ModelMixin`] with the
            same call does, and with `in_channels` and `condition_channels` in its config; so do [`WanFrameAdapter`],
            [`LTXFrameAdapter`] and [`SkyReelsV2FrameAdapter`]. If the config has `frame_mean`, `frame_std`, `condition_mean` and
            `condition_std`, frames and conditions go in and come out in units of these.
        scheduler ([`RollingLadderScheduler`]): With the window, ladder and context that the network was trained for.

    Example:
        ```python
        import itertools
        import torch
        from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
        from diffusers_ext.models import RollingTransformer1DModel

        # an untrained network, for the look of the call; load a trained pipeline with from_pretrained
        network = RollingTransformer1DModel(in_channels=6, condition_channels=3, num_layers=1)
        scheduler = RollingLadderScheduler(
            prediction_type="sample", beta_schedule="cosine", window_length=8, ladder_step=2
        )
        pipe = RollingLadderPipeline(network, scheduler)
        microphone = (torch.randn(3) for _ in itertools.count())
        for frames in itertools.islice(pipe.stream(microphone), 5):
            assert frames.shape == (1, 2, 6)
        ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: ModelMixin, scheduler: RollingLadderScheduler) -> None:
        super().__init__()
        if scheduler is not None and not isinstance(scheduler, RollingLadderScheduler):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} knows no times of frames; use RollingLadderScheduler.from_config(...)"
            )
        if scheduler is not None and scheduler.config.frame_dim != 1:
            raise ValueError(f"frame_dim={scheduler.config.frame_dim} of the scheduler is not usable here; use 1")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._stream: _Stream | None = None

    @property
    def network_evaluations(self) -> int:
        """Forward passes of the network in the stream that was begun last, so far."""
        return 0 if self._stream is None else self._stream.evaluations

    @torch.no_grad()
    def __call__(
        self,
        cond: Iterable[Any] | torch.Tensor | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        prefix: torch.Tensor | None = None,
        warmup: str = "init",
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_source: Callable[[int], torch.Tensor] | None = None,
        callback_on_chunk_end: Callable[..., dict[str, Any] | None] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        lookahead: int | None = None,
    ) -> RollingLadderPipelineOutput | tuple[Any, int]:
        """Collects a stream; the arguments are those of [`~RollingLadderPipeline.stream`].

        Args:
            cond, num_frames, num_inference_steps, prefix, warmup, guidance_scale, batch_size: See `stream`. One of `cond`, then
                ending, and `num_frames` is needed.
            generator, noise_source, callback_on_chunk_end: See `stream`.
            output_type (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple of its fields.
            lookahead (`int`, *optional*): See `stream`.

        Returns:
            [`RollingLadderPipelineOutput`] or `tuple`: The frames, and the network evaluations.

        Raises:
            ValueError: As `stream`. Frames that were made before are lost here: use `stream` with conditions that may fail.
            TypeError: As `stream`.
        """
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        if num_frames is None and cond is None:
            raise ValueError("num_frames=None without cond would never end; give num_frames, or use stream()")
        stream, context = self._begin(
            cond, num_frames, num_inference_steps, prefix, warmup, guidance_scale, batch_size, generator, noise_source,
            callback_on_chunk_end, lookahead,
        )  # fmt: skip
        chunks = list(self._frames(stream, context, warmup))
        if not chunks:
            raise ValueError("cond is empty, so there is no frame to make; give a condition for at least one")
        frames: Any = torch.cat(chunks, 1)
        if output_type == "np":
            frames = frames.cpu().numpy()
        return RollingLadderPipelineOutput(frames, stream.evaluations) if return_dict else (frames, stream.evaluations)

    def stream(
        self,
        cond: Iterable[Any] | torch.Tensor | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        prefix: torch.Tensor | None = None,
        warmup: str = "init",
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_source: Callable[[int], torch.Tensor] | None = None,
        callback_on_chunk_end: Callable[..., dict[str, Any] | None] | None = None,
        lookahead: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields frames as they become ready.

        Args:
            cond (iterable, `torch.Tensor` or `np.ndarray`, *optional*):
                One condition a frame: a tensor `(batch, frames, width)`, or anything that can be iterated over and yields
                `(width,)` or `(batch, width)`. It is pulled `lookahead` frames ahead, and never further. At its end the
                window is emptied without new frames. Without it no frame has a condition, and the stream has no end of its own.
            num_frames (`int`, *optional*):
                Frames to make; by default as many as there are conditions. They are the first of the endless stream, bit for bit.
            num_inference_steps (`int`, *optional*):
                Evaluations of a frame from noise to data, a multiple of `window_length / ladder_step`. The default is
                `window_length`: one evaluation an emitted frame. `window_length / ladder_step` is the fastest.
            prefix (`torch.Tensor` of shape `(batch, frames, channels)`, *optional*):
                Frames before the first; their last `context_length` are its context.
            warmup (`str`, *optional*, defaults to `"init"`):
                `"init"` comes from pure noise, which the network must have seen in training. `"pad"` starts the window with the
                last frame of `prefix` (the mean frame without it), noised to the ladder, and drops those frames: for networks that were
                trained on the steady roll only.
            guidance_scale (`float`, *optional*, defaults to 1.0): Classifier-free guidance over `cond`, or over the prompt of a
                frame adapter, at least 0; 1 is none.
            batch_size (`int`, *optional*): Number of sequences; by default that of a `cond` tensor, `prefix` or generators, or 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of noise; one a sequence if a list.
            noise_source (`Callable`, *optional*):
                `noise_source(count)` gives the noise of entering frames, `(batch, count, channels)`, instead: first of the whole
                window, then of each `ladder_step` frames (and, with a `context_timestep`, of emitted ones before that).
            callback_on_chunk_end (`Callable`, *optional*):
                Called as `callback(pipe, first_frame, tensors)` before frames are yielded, with `frames`, `(batch, ladder_step,
                channels)`, and, if there is one, `condition`, `(batch, frames behind them whose condition is there, width)`. What it
                returns under these names replaces them: so a condition changes for frames that are on their way.
            lookahead (`int`, *optional*):
                Frames, counted from the next one, whose condition the network sees, from `ladder_step` to `window_length`, the
                default: a live source is so much ahead of what it causes. Frames behind them in the window are without condition
                until they come so near, which the network must have seen in training.

        Returns:
            `Iterator[torch.Tensor]`: Of `(batch, ladder_step, channels)`, float32 (float64 for a float64 network); the last may be
            shorter.

        Raises:
            ValueError: If an argument does not fit; at once. Also, after all frames with a condition were delivered, if `cond`
                raised an exception, yielded something that does not fit, or ended before `num_frames`.
            TypeError: If an argument is of a wrong type.
        """
        return self._frames(
            *self._begin(
                cond, num_frames, num_inference_steps, prefix, warmup, guidance_scale, batch_size, generator,
                noise_source, callback_on_chunk_end, lookahead,
            ),
            warmup,
        )  # fmt: skip

    def _begin(
        self,
        cond: Iterable[Any] | torch.Tensor | None,
        num_frames: int | None,
        num_inference_steps: int | None,
        prefix: torch.Tensor | None,
        warmup: str,
        guidance_scale: float,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        noise_source: Callable[[int], torch.Tensor] | None,
        callback_on_chunk_end: Callable[..., dict[str, Any] | None] | None,
        lookahead: int | None,
    ) -> tuple[_Stream, torch.Tensor]:
        """Checks the arguments of [`~RollingLadderPipeline.stream`]; gives the stream and the frames before it."""
        for name in ("transformer", "scheduler"):
            if getattr(self, name, None) is None:
                raise ValueError(f"{name}=None is missing; give one when the pipeline is built")
        config = self.transformer.config
        frame_shape = getattr(self.transformer, "frame_shape", (config.in_channels,))
        width = getattr(config, "condition_channels", 0)
        if num_frames is not None:
            checked_steps(num_frames, "num_frames")
        checked_choice(warmup, "warmup", WARMUPS)
        ahead = _checked_lookahead(lookahead, self.scheduler.config, cond is not None)
        scale = checked_number(guidance_scale, "guidance_scale", 0.0, math.inf)
        if scale != 1.0 and cond is None and not getattr(self.transformer, "has_prompt", False):
            raise ValueError(
                f"guidance_scale={guidance_scale!r} needs a cond to guide towards; give one, or leave it at 1"
            )
        for name, value in (("noise_source", noise_source), ("callback_on_chunk_end", callback_on_chunk_end)):
            if value is not None and not callable(value):
                raise TypeError(f"{name}={value!r} cannot be called; give a function")
        dtype = torch.float64 if self.transformer.dtype == torch.float64 else torch.float32
        device = self._execution_device
        conditions, from_cond = (None, None) if cond is None else checked_conditions(cond, width)
        count = _batch_size(batch_size, from_cond, prefix, generator)
        check_generator(generator, count)
        frame_units, condition_units = (ChannelUnits.of(config, name) for name in ("frame", "condition"))
        context = frame_units.inward(_checked_prefix(prefix, count, frame_shape).to(device, dtype))
        check_finite(context, "prefix", dtype)

        # Its own copy, so that several streams of one pipeline do not disturb each other.
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(scheduler.config.window_length if num_inference_steps is None else num_inference_steps)
        source = (
            None if conditions is None else ConditionSource(conditions, count, width, device, dtype, condition_units)
        )
        stream = _Stream(
            scheduler, source, count, num_frames, scale, generator, noise_source, callback_on_chunk_end, device, dtype,
            frame_shape, frame_units, condition_units, context[:, :0], context[:, :0], ahead,
        )  # fmt: skip
        if source is not None:
            stream.condition = torch.zeros(count, context.shape[1], width, device=device, dtype=dtype)
            stream.known = torch.zeros(context.shape[1], dtype=torch.bool)
        self._stream = stream
        return stream, context

    @torch.no_grad()
    def _frames(self, stream: _Stream, prefix: torch.Tensor, warmup: str) -> Iterator[torch.Tensor]:
        scheduler, step = stream.scheduler, stream.scheduler.config.ladder_step
        window, wanted = scheduler.config.window_length, stream.num_frames
        made, padding = 0, 0
        try:
            with self.progress_bar(total=math.inf if wanted is None else wanted) as progress_bar:
                stream.remember(prefix)
                if warmup == "pad":
                    padding = window
                    self._pad(stream, prefix)
                elif (noise := stream.entering(window, 0)) is not None:
                    stream.window = noise
                    rows = torch.cat([scheduler.warmup_timesteps, scheduler.window_timesteps[:1]])
                    for now, following in zip(rows, rows[1:], strict=False):
                        self._evaluate(stream, now, following)
                while stream.frames_left and (wanted is None or made < wanted):
                    for now in scheduler.window_timesteps:
                        self._evaluate(stream, now, None)
                    frames = stream.window[:, : min(step, stream.frames_left)].clone()
                    if not padding:
                        frames = self._reported(stream, frames, made)
                    stream.remember(frames)
                    if padding:
                        padding -= step
                    else:
                        shown = stream.frame_units.outward(frames if wanted is None else frames[:, : wanted - made])
                        made += shown.shape[1]
                        progress_bar.update(shown.shape[1])
                        yield shown
                        if made == wanted:
                            return
                    staying = max(0, stream.window.shape[1] - step)
                    _, stream.window = scheduler.roll(stream.window, stream.entering(step, staying))
            if stream.source is not None and stream.source.error is not None:
                raise stream.source.error
            if wanted is not None and made < wanted:
                raise ValueError(
                    f"num_frames={wanted}, but cond ended after {made} frames, which were delivered; give a longer one, or leave "
                    "num_frames out"
                )
        finally:
            self.maybe_free_model_hooks()

    def _pad(self, stream: _Stream, prefix: torch.Tensor) -> None:
        """Fills the window with a resting pose at the levels of the steady roll, under the first condition there is."""
        length = stream.scheduler.config.window_length
        if stream.source is not None and stream.condition is not None:
            first = stream.source.peek()
            if not first.shape[1]:
                return
            stream.condition = torch.cat([stream.condition, first.expand(-1, length, -1)], 1)
            stream.known = torch.cat([stream.known, torch.ones(length, dtype=torch.bool)])
        pose = prefix[:, -1:] if prefix.shape[1] else prefix.new_zeros(len(prefix), 1, *stream.frame_shape)
        times = stream.scheduler.window_timesteps[:1]
        still = pose.expand(-1, length, *stream.frame_shape)
        stream.window = stream.scheduler.add_noise(still, stream.noise(length), times)

    def _evaluate(self, stream: _Stream, now: torch.Tensor, following: torch.Tensor | None) -> None:
        """One evaluation of the network, and the step after it."""
        scheduler, window, context = stream.scheduler, stream.window, stream.context.shape[1]
        count = window.shape[1]
        time = scheduler.config.context_timestep
        before = torch.full((context,), scheduler.clean_timestep if time is None else time, dtype=now.dtype)
        times = torch.cat([before, now[:count]])[None].to(stream.device)
        frames = torch.cat([stream.context, window], 1)
        answer = self._prediction(stream, frames, times, context)[:, context:]
        to = None if following is None else following[None, :count]
        stream.window = scheduler.step(
            answer, now[None, :count], window, next_timestep=to, generator=stream.generator, return_dict=False
        )[0]

    def _prediction(self, stream: _Stream, frames: torch.Tensor, times: torch.Tensor, context: int) -> torch.Tensor:
        network, kind = self.transformer, self.transformer.dtype
        arguments: dict[str, Any] = {"num_context": context, "return_dict": False}
        sample, guided = frames.to(kind), stream.guidance_scale != 1.0
        if stream.condition is not None:
            missing = frames.shape[1] - stream.condition.shape[1]
            condition = torch.nn.functional.pad(stream.condition, (0, 0, 0, missing)).to(kind)
            known = torch.nn.functional.pad(stream.known, (0, missing))
            arguments["condition"] = torch.cat([condition, condition]) if guided else condition
            arguments["condition_mask"] = known.to(stream.device).expand(len(frames), -1)
        if guided:
            # without a condition the network has a prompt of its own
            mask = arguments.get(
                "condition_mask", torch.ones(frames.shape[:2], dtype=torch.bool, device=stream.device)
            )
            sample = torch.cat([sample, sample])
            arguments["condition_mask"] = torch.cat([mask, torch.zeros_like(mask)])
        answer = network(sample, times, **arguments)[0]
        stream.evaluations += 1
        if answer.shape != sample.shape:
            raise ValueError(
                f"the network answered {tuple(answer.shape)} to a sample of shape {tuple(sample.shape)}; it must keep the shape"
            )
        answer = answer.to(stream.dtype)
        if guided:
            with_condition, without = answer.chunk(2)
            answer = torch.lerp(without, with_condition, stream.guidance_scale)
        return answer

    def _reported(self, stream: _Stream, frames: torch.Tensor, made: int) -> torch.Tensor:
        """Frames that are ready, after the callback has seen them."""
        if stream.callback is None:
            return frames
        units = {"frames": stream.frame_units, "condition": stream.condition_units}
        tensors = {"frames": units["frames"].outward(frames)}
        ahead = stream.context.shape[1] + frames.shape[1]
        if stream.condition is not None:
            tensors["condition"] = units["condition"].outward(stream.condition[:, ahead:].clone())
        changed = stream.callback(self, made, tensors) or {}
        if not isinstance(changed, dict) or not set(changed) <= set(tensors):
            raise ValueError(
                f"callback_on_chunk_end returned {list(changed) if isinstance(changed, dict) else changed!r}; give a dict with "
                f"some of {', '.join(tensors)}, or None"
            )
        inside: dict[str, torch.Tensor] = {}
        for name, value in changed.items():
            if not isinstance(value, torch.Tensor) or value.shape != tensors[name].shape:
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(
                    f"callback_on_chunk_end returned {name} of shape {found}; it must stay {tuple(tensors[name].shape)}"
                )
            inside[name] = units[name].inward(value.to(stream.device, stream.dtype))
            check_finite(inside[name], f"the {name} that callback_on_chunk_end returned", stream.dtype)
        if stream.condition is not None and "condition" in inside:
            stream.condition = torch.cat([stream.condition[:, :ahead], inside["condition"]], 1)
        return inside.get("frames", frames)


def _batch_size(given: Any, from_cond: int | None, prefix: Any, generator: Any) -> int:
    """The number of sequences, where cond, prefix and generators agree on it."""
    told = {
        "cond": from_cond,
        "prefix": len(prefix) if isinstance(prefix, torch.Tensor) and prefix.ndim else None,
        "generator": len(generator) if isinstance(generator, list) and generator else None,
    }
    if given is not None and checked_steps(given, "batch_size") > LARGEST_BATCH:
        raise ValueError(f"batch_size={given!r} is too large; use at most {LARGEST_BATCH}")
    count = next((value for value in (given, *told.values()) if value is not None), 1)
    for name, value in told.items():
        if value is not None and value != count:
            shape = f" of shape {tuple(prefix.shape)}" if name == "prefix" else ""
            raise ValueError(
                f"{name}{shape} has a batch of {value} where others have {count}; give the same batch_size to all"
            )
    return int(count)


def _checked_lookahead(lookahead: Any, config: Any, has_condition: bool) -> int:
    """Frames whose condition is known, by default those of the window."""
    least, most = config.ladder_step, config.window_length
    if lookahead is None:
        return int(most)
    if isinstance(lookahead, bool) or not isinstance(lookahead, int) or not least <= lookahead <= most:
        raise ValueError(
            f"lookahead={lookahead!r} is not usable; use an int from {least}, the ladder_step, to {most}, the window_length"
        )
    if not has_condition:
        raise ValueError(f"lookahead={lookahead!r} is of conditions; give a cond, or leave it out")
    return lookahead


def _checked_prefix(prefix: Any, batch_size: int, frame_shape: tuple[int, ...]) -> torch.Tensor:
    if prefix is None:
        return torch.zeros(batch_size, 0, *frame_shape)
    wanted = f"a tensor of shape ({', '.join(map(str, (batch_size, 'frames', *frame_shape)))})"
    if not isinstance(prefix, torch.Tensor) or prefix.ndim < 2 or tuple(prefix.shape[2:]) != tuple(frame_shape):
        found = tuple(prefix.shape) if isinstance(prefix, torch.Tensor) else type(prefix).__name__
        raise ValueError(f"prefix={found} does not fit; give {wanted}")
    if not bool(torch.isfinite(prefix).all()):
        raise ValueError("prefix holds values that are infinite or not a number; give finite ones")
    return prefix

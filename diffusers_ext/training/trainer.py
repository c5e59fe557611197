"""The loop that the training scripts share: optimise, average, log, validate, save, resume.

One optimiser step is a pure function of (weights, optimiser state, step): batches come from counter-based streams, the
learning rate is computed from the step, and global random state is seeded anew in every step. Resuming therefore needs
nothing but tensors and a number, and continues bit for bit.
"""

import io
import json
import logging
import math
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from PIL import Image
from torch import nn

from ..integrity import atomic_write
from .arguments import recorded
from .checkpoints import CheckpointError, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .data import prefetched
from .ema import WeightAverage
from .rates import learning_rate_factor
from .streams import stream_seed


logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"
# a resumed run is the uninterrupted one only if these are unchanged
_DEFINING = (
    "seed", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "lr_scheduler",
    "lr_warmup_steps", "decay_fraction", "lr_end", "ema_decay", "mixed_precision", "dataset_name", "train_data_dir",
    "objects", "vendors", "resolution", "prediction_type", "window_length", "context_length", "ladder_curriculum",
    "method", "pretrained_teacher_model", "pretrained_student_model", "use_lora", "lora_rank", "w_min", "w_max", "num_ddim_timesteps", "fake_update_ratio",
    "fake_learning_rate", "num_denoising_steps", "backward_simulation", "real_guidance_scale", "gan_weight", "divergence",
    "discriminator_weight", "ratio_bins", "longest_schedule", "fake_pull", "transport_lambda", "source_data_dir",
    "num_trajectories", "trajectory_steps", "reward", "num_prompts", "samples_per_prompt", "keep", "temperature",
    "tuned_share", "proportion_empty_prompts",
    "num_pairs", "teacher_steps", "teacher_guidance_scale", "inverted_share", "time_density", "time_base", "normalize_loss", "high_pass",
    "huber_c", "denoising_weight", "distance", "start_levels", "end_levels", "noise_coupling", "timestep_scaling_factor",
)  # fmt: skip

Validate = Callable[[int], tuple[dict[str, float], Image.Image | None]]


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


class Stateful(Protocol):
    """What a method remembers between steps besides weights, e.g. a running mean."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors to save."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over tensors saved from `state_dict`."""


# what `accelerate launch` sets for a config that asks for sharding
_SHARDED = {
    DistributedType.FSDP: "ACCELERATE_USE_FSDP",
    DistributedType.DEEPSPEED: "ACCELERATE_USE_DEEPSPEED",
    DistributedType.MEGATRON_LM: "ACCELERATE_USE_MEGATRON_LM",
}


def refuse_sharding(kind: DistributedType) -> None:
    """Raises `ValueError` for ways to train in which no process holds all weights and moments.

    Averages, checkpoints and validation read them on the main process alone, and would save a part as the whole or
    wait for ever.
    """
    if kind in _SHARDED:
        raise ValueError(
            f"distributed_type={kind.value} spreads weights or moments over processes, which these scripts do not "
            f"gather; use data parallelism, training/configs/gpu_multi.yaml, and --use_lora or --mixed_precision bf16 "
            f"if memory is short"
        )


def make_accelerator(args: Namespace) -> Accelerator:
    """Sets up logging, threads and the Accelerator of a training script.

    Raises:
        ValueError: If the launcher's config asks for FSDP, DeepSpeed or Megatron-LM.
    """
    for kind, variable in _SHARDED.items():
        # asked before the Accelerator is made: it wants DeepSpeed installed, and on a CPU drops FSDP without a word
        if os.environ.get(variable, "false").lower() == "true":
            refuse_sharding(kind)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for chatty in ("httpx", "huggingface_hub", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    project = ProjectConfiguration(
        project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
    )
    accelerator = Accelerator(
        # several processes without a GPU only find each other if this is said
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=project,
    )
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    return accelerator


class Trainer:
    """Trains one network with AdamW under Accelerate.

    Args:
        args: Arguments of `add_training_arguments`.
        accelerator: From `make_accelerator`.
        module: The network; parameters that do not require gradients stay as they are.
        states: What else belongs into a checkpoint, by name.

    Raises:
        CheckpointError: If `args.resume_from_checkpoint` cannot be read or belongs to another network, or if it is not
            given and `args.output_dir` already holds checkpoints.
        ValueError: If the accelerator shards.
    """

    # of the entries of what `_optimise` returns
    loss_names: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        module: nn.Module,
        states: Mapping[str, Stateful] | None = None,
    ):
        refuse_sharding(accelerator.distributed_type)
        self.args = args
        self.accelerator = accelerator
        # the stubs of `Module.to` do not know memory_format
        self.module: nn.Module = module.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.step = 0
        self.seconds = 0.0
        self.states = dict(states or {})
        self._named = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.average = self._new_average() if args.use_ema else None
        optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        if args.resume_from_checkpoint:
            folder = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
            if folder is None:
                logger.info("no checkpoint in %s yet, the run starts from the beginning", args.output_dir)
            else:
                self._restore(folder, optimizer)
        elif present := list_checkpoints(args.output_dir):
            raise CheckpointError(
                f"{args.output_dir} already holds {present[-1][1].name} of another run; add --resume_from_checkpoint latest "
                f"to go on with it, or choose another output_dir"
            )
        self._prepare(optimizer)
        self._stop = threading.Event()

    def _new_average(self) -> WeightAverage:
        return WeightAverage(self.module, self.args.ema_decay)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self._named.values())}]

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)

    @property
    def global_batch_size(self) -> int:
        """Pictures of one optimiser step over all processes."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def samples_file(self) -> Path:
        """Where the picture of a validation at this step is kept."""
        return Path(self.args.output_dir) / "samples" / f"step-{self.step:07d}.png"

    def own_rows(self) -> list[slice]:
        """Rows of the global batch that this process takes, one slice a forward pass."""
        size, world = self.args.train_batch_size, self.accelerator.num_processes
        passes = range(self.args.gradient_accumulation_steps)
        firsts = [(i * world + self.accelerator.process_index) * size for i in passes]
        return [slice(first, first + size) for first in firsts]

    def fit(
        self,
        make_batches: Callable[[int], Any],
        loss_of: Any,
        validate: Validate,
    ) -> None:
        """Trains until `max_train_steps` or `max_train_seconds`, whichever comes first, and saves a checkpoint.

        Args:
            make_batches: From the step to this process's list of batches, one a forward pass; a pure function.
            loss_of: From network and batch to the mean loss, a scalar.
            validate: From the step to metrics and a picture; called with the averaged weights in place.

        Raises:
            TrainingDivergedError: If a loss or weight is not finite. No checkpoint of such weights is ever written.
            CheckpointError: If a checkpoint cannot be written.
            OSError: If the log or a validation picture cannot be written.
        """
        args = self.args
        if self.accelerator.log_with:
            self.accelerator.init_trackers("training", {name: str(value) for name, value in recorded(args).items()})
        steps = range(self.step, args.max_train_steps)
        began = mark = time.monotonic()
        total, since = torch.zeros(len(self.loss_names), device=self.accelerator.device), 0
        self.model.train()
        batches_of = prefetched(make_batches, steps, 3 * args.dataloader_num_workers)
        with self._stopping_on_sigterm():
            for batches in batches_of:
                total += self._optimise(batches, loss_of)
                since += 1
                stop = self.step == args.max_train_steps or self._should_stop(time.monotonic() - began)
                save = stop or self.step % args.checkpointing_steps == 0
                check = bool(args.validation_steps) and self.step % args.validation_steps == 0 and not stop
                if save or check or self.step == 1 or self.step % args.logging_steps == 0:
                    self._log(total, since, time.monotonic() - mark)
                    if save:
                        self._save(time.monotonic() - began)
                    if check:
                        self.validate(validate)
                    # what saving and validating took is not part of the speed of training
                    total, since, mark = torch.zeros_like(total), 0, time.monotonic()
                if stop:
                    break
        batches_of.close()

    def validate(self, validate: Validate) -> dict[str, float]:
        """Runs `validate` on the main process with the averaged weights; keeps picture and metrics, and returns these."""
        metrics: dict[str, float] = {}
        if self.accelerator.is_main_process:
            with self.weights_to_keep():
                metrics, picture = validate(self.step)
            self._record(metrics)
            if picture is not None:
                data = io.BytesIO()
                picture.save(data, "PNG")
                self.samples_file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self.samples_file, data.getvalue())
        self.accelerator.wait_for_everyone()
        return metrics

    @contextmanager
    def weights_to_keep(self) -> Iterator[None]:
        """Within the block the network is in evaluation mode with the weights that are exported."""
        self.module.eval()
        # compiled code is specialised on the shapes of training
        eager = torch.compiler.set_stance("force_eager")
        with self.average.applied() if self.average else nullcontext(), torch.no_grad(), eager:
            yield
        self.module.train()

    def _begin_step(self) -> float:
        """Seeds the layers and returns the factor of the learning rates."""
        args = self.args
        # for networks with dropout; everything else draws from named streams
        torch.manual_seed(stream_seed(args.seed, self.step, "layers", self.accelerator.process_index))
        return learning_rate_factor(
            self.step, args.max_train_steps, args.lr_scheduler, args.lr_warmup_steps, args.decay_fraction, args.lr_end
        )

    def _end_step(self) -> None:
        self.step += 1
        if self.average:
            self.average.update(self.step)

    def _optimise(self, batches: Any, loss_of: Any) -> torch.Tensor:
        """One step; returns the mean of each loss, in the order of `loss_names`."""
        factor = self._begin_step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(batches, 1):
            with nullcontext() if i == len(batches) else self.accelerator.no_sync(self.model):
                loss = loss_of(self.model, batch) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self._named.values(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._end_step()
        return total[None]

    def _log(self, total: torch.Tensor, steps: int, seconds: float) -> None:
        means = (self.accelerator.reduce(total, "mean") / steps).tolist()
        rate = self.optimizer.param_groups[0]["lr"]
        for name, loss in zip(self.loss_names, means):
            if not math.isfinite(loss):
                raise self._diverged(f"the {name} is {loss}")
        speed = steps * self.global_batch_size / seconds
        self._record({**dict(zip(self.loss_names, means)), "learning_rate": rate, "images_per_second": speed})

    def _diverged(self, what: str) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"{what} at step {self.step}; resume from the last checkpoint with a smaller learning_rate than "
            f"{self.args.learning_rate} or a smaller max_grad_norm than {self.args.max_grad_norm}"
        )

    def _record(self, entry: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        logger.info("step %d: %s", self.step, ", ".join(f"{name} {value:.5g}" for name, value in entry.items()))
        path = Path(self.args.output_dir) / LOG_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **entry}) + "\n")
        except OSError as error:
            raise OSError(
                f"{path} cannot be written: {error.strerror}; the run can be resumed from its last checkpoint once "
                f"this is cured"
            ) from error
        self.accelerator.log(entry, step=self.step)

    def _should_stop(self, seconds: float) -> bool:
        limit = self.args.max_train_seconds
        wanted = self._stop.is_set() or (limit is not None and seconds >= limit)
        if self.accelerator.num_processes == 1:
            return wanted
        if self.step % self.args.logging_steps:
            return False  # the processes must agree, and asking costs a message
        vote = torch.tensor(float(wanted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(vote, "sum") > 0)

    @contextmanager
    def _stopping_on_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _save(self, seconds: float) -> None:
        # a gradient may be no number although the loss is one; the loss would only tell after this checkpoint
        odd = [name for name, value in self._named.items() if not bool(torch.isfinite(value).all())]
        if odd:
            raise self._diverged(f"the weights are not finite ({odd[0]} and {len(odd) - 1} others)")
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer
            moments = {
                f"{key}.{name}": value
                for name, parameter in self._named.items()
                for key, value in optimizer.state[parameter].items()
            }
            tensors = {"model": dict(self._named), "optimizer": moments}
            if self.average:
                tensors["ema"] = self.average.state_dict()
            if self.states:
                tensors["states"] = {
                    f"{name}.{key}": value
                    for name, remembered in self.states.items()
                    for key, value in remembered.state_dict().items()
                }
            state = {
                "args": recorded(self.args), "seconds": self.seconds + seconds, "world": self.accelerator.num_processes
            }  # fmt: skip
            folder = save_checkpoint(
                self.args.output_dir, self.step, tensors, state, self.args.checkpoints_total_limit
            )
            logger.info("saved %s", folder)
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        tensors, state = load_checkpoint(folder)
        saved = tensors["model"]
        shapes = {name: value.shape for name, value in self._named.items()}
        odd = sorted(saved.keys() ^ shapes.keys()) or [name for name in shapes if saved[name].shape != shapes[name]]
        if odd:
            raise CheckpointError(
                f"checkpoint {folder} belongs to another network: {len(odd)} tensors differ, e.g. {odd[0]}; "
                f"give the arguments that it was trained with"
            )
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(saved[name])
                if f"step.{name}" not in tensors["optimizer"]:
                    continue  # it has had no gradient yet
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors["optimizer"][f"{key}.{name}"]
                    # like the parameter in its strides too, which decide how the fused kernel walks
                    kept = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                    optimizer.state[parameter][key] = kept
        if self.average:
            if "ema" not in tensors:
                raise CheckpointError(f"checkpoint {folder} has no averaged weights; resume with --no-use_ema")
            self.average.load_state_dict(tensors["ema"])
        for title, remembered in self.states.items():
            entries = tensors.get("states", {})
            own = {key[len(title) + 1 :]: value for key, value in entries.items() if key.startswith(f"{title}.")}
            if not own:
                raise CheckpointError(
                    f"checkpoint {folder} holds no {title}; give the arguments that it was trained with"
                )
            remembered.load_state_dict(own)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        now = {**recorded(self.args), "world": self.accelerator.num_processes}
        then = {**state["args"], "world": state["world"]}
        for name in (*_DEFINING, "world"):
            if now.get(name) != then.get(name):
                logger.warning("%s was %r and is %r from here on", name, then.get(name), now.get(name))
        logger.info("resumed %s after %d steps and %.0f s", folder, self.step, self.seconds)

"""Teachers and students: pipelines of Stable Diffusion, and of the other `families`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, LCMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import nn

from ..adapters import SharedBase
from ..export import clean_configs, save_pipeline
from ..latents import encoder_of
from .families import StableDiffusion, family_named, listed
from .lcm import guidance_embedding
from .parameterization import NoiseSchedule


STUDENT = "student"


class Teacher:
    """A frozen text-to-image pipeline with what distillation asks of it.

    Args:
        name: Folder or Hub id of a pipeline.
        device: Where its parts are put.
        families: Those that it may be of.
        resolution: Side of the pictures in pixels, on which the schedule of Flux and the condition of SDXL depend; default
            that of the pipeline's own samples.
        guidance_scale: That of a network that reads it, as the dev models of Flux do; others are guided in two passes.

    Raises:
        ValueError: If it is a pipeline of another family, was distilled already, or cannot paint at `resolution`.
        OSError: If it cannot be found or read.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        families: tuple[StableDiffusion, ...] = (StableDiffusion(),),
        resolution: int | None = None,
        guidance_scale: float = 1.0,
    ):
        self.family = _family_among(families, name)
        self.pipeline = self.family.load(name).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if self.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"pretrained_teacher_model={name!r} reads an embedding of the guidance: it is distilled already; "
                f"give the model that it was made of"
            )
        self.family.settle(self.pipeline, resolution)
        self.schedule = NoiseSchedule.from_scheduler(self.pipeline.scheduler)
        self.encode: Callable[[torch.Tensor], torch.Tensor] = encoder_of(self.pipeline.vae)
        self.guidance_scale = guidance_scale
        self.numbers = self.family.numbers(self.pipeline, resolution, guidance_scale)
        with torch.no_grad():
            self.empty = self.family.unconditional(self.pipeline, self.numbers)

    @property
    def unet(self) -> Any:
        """The denoiser, which is a transformer in some families."""
        return getattr(self.pipeline, self.family.part)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """All that read the prompt."""
        return self.family.text_encoders(self.pipeline)

    @property
    def reads_guidance(self) -> bool:
        """Whether the denoiser is told `guidance_scale` and makes one pass."""
        return self.family.reads_guidance(self.unet)

    @property
    def student_scale(self) -> float:
        """The `guidance_scale` to call the pipeline of a student with that has the guidance built in."""
        return self.guidance_scale if self.reads_guidance else 1.0

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids (n, length) on the CPU."""
        return self.family.tokens(self.pipeline, prompts)

    @torch.no_grad()
    def embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The condition (n, length, width) of token ids: all that the denoiser reads besides sample and timestep."""
        return self.family.condition(self.pipeline, input_ids, self.numbers)

    def denoise(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Prediction with the prompt, in one pass; arguments as in `predictions`."""
        return self.family.denoise(self.unet, sample, timesteps, words)

    @torch.no_grad()
    def predictions(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions with and without the prompt, in one pass; twice the same of a network that reads the guidance.

        Args:
            sample: Noisy latents (n, c, h, w).
            timesteps: (n,).
            words: Embeddings of the prompts (n, length, width).
        """
        if self.reads_guidance:
            prediction = self.denoise(sample, timesteps, words)
            return prediction, prediction
        both = torch.cat([words, self.empty.expand_as(words)])
        output = self.denoise(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        conditional, unconditional = output.chunk(2)
        return conditional, unconditional

    def student_pipeline(
        self,
        unet: nn.Module,
        scheduler: SchedulerMixin,
        family: type[DiffusionPipeline] | None = None,
    ) -> Any:
        """The teacher's pipeline with another denoiser and scheduler, or one of the class `family` with the same parts."""
        pipeline = self.family.student_pipeline(self.pipeline, unet, scheduler, family)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _family_among(families: tuple[StableDiffusion, ...], name: str) -> StableDiffusion:
    """The family of a folder or Hub id, by its `model_index.json`; a `ValueError` if it is none of those given."""
    found = DiffusionPipeline.load_config(name).get("_class_name")
    for family in families:
        if family.pipeline_class.__name__ == found:
            return family
    other = family_named(found)
    raise ValueError(
        f"pretrained_teacher_model={name!r} is a {found}; give {listed(families)}"
        + (f" ({other.taken_by})" if other and other.taken_by else "")
    )


def with_guidance_input(unet: UNet2DConditionModel, dimension: int) -> UNet2DConditionModel:
    """A copy of a UNet that also reads an embedding of the guidance, and at first ignores it.

    Args:
        unet: A UNet without such an input.
        dimension: Width of the embedding, `time_cond_proj_dim`.

    Returns:
        A new UNet with the same weights and a projection of zeros; the global random state is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        # by keyword: a change inside the config is passed over where the published file has no such entry
        student = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=dimension)
    student.load_state_dict(unet.state_dict(), strict=False)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.device)


class DistilledUNet(nn.Module):
    """The denoiser that is trained: a full copy of the teacher's that is told a number a sample, or a LoRA on the teacher itself.

    Args:
        teacher: The frozen teacher. With a LoRA its denoiser gets the adapter, and remains the teacher while that is not at work.
        lora_rank: Rank of the LoRA; `None` trains a full copy.
        time_cond_proj_dim: Width of the embedding of that number in a full copy, which is the guidance in the pipelines of diffusers;
            `None` for a copy without.
        seed: Seed of the LoRA's initial weights.
    """

    def __init__(self, teacher: Teacher, lora_rank: int | None, time_cond_proj_dim: int | None = 256, seed: int = 0):
        super().__init__()
        self.family = teacher.family
        self.base: SharedBase | None = None
        if lora_rank is not None:
            self.unet = teacher.unet
            self.base = SharedBase(self.unet, [STUDENT], lora_rank, self.family.lora_layers, seed)
        elif time_cond_proj_dim is not None:
            self.unet = with_guidance_input(teacher.unet, time_cond_proj_dim).requires_grad_(True)
        else:
            self.unet = deepcopy(teacher.unet).requires_grad_(True)

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor, w: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prediction (n, c, h, w) for noisy latents of that shape, timesteps (n,), embeddings and the number to be told w (n,)."""
        dimension = self.unet.config.get("time_cond_proj_dim")
        told = None if dimension is None or w is None else guidance_embedding(w, dimension).to(sample)
        with self.active():
            return self.family.denoise(self.unet, sample, timesteps, words, told)

    def active(self) -> AbstractContextManager[None]:
        """A context in which `unet` is the student."""
        return self.base.using(STUDENT) if self.base else nullcontext()

    def plain_unet(self) -> Any:
        """The student as a stock network; a LoRA is merged into a copy."""
        return merged_unet(self.base, STUDENT) if self.base else self.unet


def begin_at(unet: Any, name: str, part: str = "unet") -> None:
    """Copies the weights of another pipeline's denoiser into one of the same architecture, to train it further.

    Args:
        unet: The denoiser, which is changed.
        name: Folder or Hub id of the pipeline, such as the output of an earlier run.
        part: Name of the denoiser in the pipeline.

    Raises:
        ValueError: If its denoiser is another network.
        OSError: If it cannot be found or read.
    """
    begun = type(unet).from_pretrained(name, subfolder=part, use_safetensors=True, torch_dtype=torch.float32)
    given, wanted = ({key: value.shape for key, value in net.state_dict().items()} for net in (begun, unet))
    if given != wanted:
        odd = sorted(key for key in given.keys() | wanted.keys() if given.get(key) != wanted.get(key))[0]
        raise ValueError(
            f"pretrained_student_model={name!r} has {odd} of shape {given.get(odd)}, and the teacher of shape {wanted.get(odd)}; give a "
            f"student that was made of this teacher"
        )
    unet.load_state_dict(begun.state_dict())


def merged_unet(base: SharedBase, name: str | None) -> Any:
    """A stock network with the adapter `name` merged into its weights, with `None` the network below the adapters."""
    network: Any = type(base.network)
    unet = network.from_config(base.network.config)
    unet.load_state_dict(base.merged_state_dict(name))
    return unet.to(next(base.network.parameters()).device)


class Student(Protocol):
    """What trains a denoiser, itself or as an adapter on the teacher's."""

    base: SharedBase | None

    def plain_unet(self) -> Any:
        """The student as a stock network."""


def save_student(
    teacher: Teacher,
    student: Student,
    scheduler: SchedulerMixin,
    folder: Path,
    dtype: str,
    family: type[DiffusionPipeline] | None = None,
) -> None:
    """Writes the student as a stock pipeline, and its adapter, if it is one, as a file for `load_lora_weights`.

    Args:
        teacher: Gives all parts but the denoiser.
        student: With the weights to keep.
        scheduler: What the student is sampled with.
        folder: An empty folder.
        dtype: "fp32" or "fp16", of the pipeline.
        family: Class of the pipeline; default the teacher's.
    """
    save_pipeline(teacher.student_pipeline(student.plain_unet(), scheduler, family), folder, dtype)
    if student.base:
        teacher.family.save_lora(folder, student.base.state_dict(STUDENT))


def save_base_unet(teacher: Teacher, student: Student, folder: Path, dtype: str) -> None:
    """Writes the teacher's UNet beside the student's, into `base_unet/`, which stock loading does not look at.

    Args:
        teacher: The frozen teacher.
        student: Made of it; an adapter on it is left out.
        folder: Folder of the student.
        dtype: "fp32" or "fp16".
    """
    unet = merged_unet(student.base, None) if student.base else deepcopy(teacher.unet)
    if dtype == "fp16":
        unet.half()
    unet.save_pretrained(folder / "base_unet")
    clean_configs(folder / "base_unet")


def few_step_scheduler(teacher: Teacher, num_ddim_timesteps: int, timestep_scaling: float) -> LCMScheduler:
    """The stock scheduler that a student of consistency distillation is sampled with.

    Raises:
        ValueError: If the teacher is a flow: `LCMScheduler` has no such prediction.
    """
    if teacher.schedule.is_flow:
        raise ValueError(
            "the teacher predicts a flow, which LCMScheduler cannot sample; give a teacher of epsilon or v_prediction"
        )
    return LCMScheduler.from_config(
        teacher.pipeline.scheduler.config,
        original_inference_steps=num_ddim_timesteps,
        timestep_scaling=timestep_scaling,
        clip_sample=False,
    )

"""Teachers and students in the layout of Stable Diffusion 1.x and 2.x."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, LCMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from ..adapters import SharedBase
from ..export import clean_configs, save_pipeline
from ..latents import encoder_of
from ..text_to_image import token_ids
from .lcm import guidance_embedding
from .parameterization import NoiseSchedule


STUDENT = "student"


class Teacher:
    """A frozen text-to-image pipeline with what distillation asks of it.

    Args:
        name: Folder or Hub id of a `StableDiffusionPipeline`.
        device: Where its parts are put.

    Raises:
        ValueError: If it is a pipeline of another family, or was distilled already.
        OSError: If it cannot be found or read.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        family = StableDiffusionPipeline.load_config(name).get("_class_name")
        if family != "StableDiffusionPipeline":
            raise ValueError(f"pretrained_teacher_model={name!r} is a {family}; give a StableDiffusionPipeline")
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            name, safety_checker=None, requires_safety_checker=False, use_safetensors=True, dtype=torch.float32
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.pipeline.vae, self.pipeline.unet, self.pipeline.text_encoder):
            part.requires_grad_(False).eval()
        if self.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                f"pretrained_teacher_model={name!r} reads an embedding of the guidance: it is distilled already; "
                f"give the model that it was made of"
            )
        self.schedule = NoiseSchedule.from_scheduler(self.pipeline.scheduler)
        self.encode: Callable[[torch.Tensor], torch.Tensor] = encoder_of(self.pipeline.vae)
        self.empty = self.embeddings(self.tokens([""]))

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.pipeline.unet

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids (n, length) on the CPU."""
        return token_ids(self.pipeline.tokenizer, prompts)

    @torch.no_grad()
    def embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the text encoder makes of token ids, (n, length, width)."""
        return self.pipeline.text_encoder(input_ids.to(self.pipeline.device))[0]

    @torch.no_grad()
    def predictions(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions with and without the prompt, in one pass.

        Args:
            sample: Noisy latents (n, c, h, w).
            timesteps: (n,).
            words: Embeddings of the prompts (n, length, width).
        """
        both = torch.cat([words, self.empty.expand_as(words)])
        output = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), both).sample
        conditional, unconditional = output.chunk(2)
        return conditional, unconditional

    def student_pipeline(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        family: type[DiffusionPipeline] = StableDiffusionPipeline,
    ) -> Any:
        """The teacher's pipeline with another UNet and scheduler, or one of another family with the same parts."""
        parts = {**self.pipeline.components, "unet": unet, "scheduler": scheduler}
        pipeline = family(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def with_guidance_input(unet: UNet2DConditionModel, dimension: int) -> UNet2DConditionModel:
    """A copy of a UNet that also reads an embedding of the guidance, and at first ignores it.

    Args:
        unet: A UNet without such an input.
        dimension: Width of the embedding, `time_cond_proj_dim`.

    Returns:
        A new UNet with the same weights and a projection of zeros; the global random state is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        student = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": dimension})
    student.load_state_dict(unet.state_dict(), strict=False)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.device)


class DistilledUNet(nn.Module):
    """The UNet that is trained: a full copy of the teacher's that is told a number a sample, or a LoRA on the teacher itself.

    Args:
        teacher: The frozen teacher. With a LoRA its UNet gets the adapter, and remains the teacher while that is not at work.
        lora_rank: Rank of the LoRA; `None` trains a full copy.
        time_cond_proj_dim: Width of the embedding of that number in a full copy, which is the guidance in the pipelines of diffusers;
            `None` for a copy without.
        seed: Seed of the LoRA's initial weights.
    """

    def __init__(self, teacher: Teacher, lora_rank: int | None, time_cond_proj_dim: int | None = 256, seed: int = 0):
        super().__init__()
        self.base: SharedBase | None = None
        if lora_rank is not None:
            self.unet = teacher.unet
            self.base = SharedBase(self.unet, [STUDENT], rank=lora_rank, seed=seed)
        elif time_cond_proj_dim is not None:
            self.unet = with_guidance_input(teacher.unet, time_cond_proj_dim).requires_grad_(True)
        else:
            self.unet = deepcopy(teacher.unet).requires_grad_(True)

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor, w: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prediction (n, c, h, w) for noisy latents of that shape, timesteps (n,), embeddings and the number to be told w (n,)."""
        dimension = self.unet.config.time_cond_proj_dim
        told = None if dimension is None or w is None else guidance_embedding(w, dimension).to(sample)
        with self.active():
            return self.unet(sample, timesteps, words, timestep_cond=told).sample

    def active(self):
        """A context in which `unet` is the student."""
        return self.base.using(STUDENT) if self.base else nullcontext()

    def plain_unet(self) -> UNet2DConditionModel:
        """The student as a stock UNet; a LoRA is merged into a copy."""
        return merged_unet(self.base, STUDENT) if self.base else self.unet


def begin_at(unet: UNet2DConditionModel, name: str) -> None:
    """Copies the weights of another pipeline's UNet into one of the same architecture, to train it further.

    Args:
        unet: Is changed.
        name: Folder or Hub id of the pipeline, such as the output of an earlier run.

    Raises:
        ValueError: If its UNet is another network.
        OSError: If it cannot be found or read.
    """
    begun = UNet2DConditionModel.from_pretrained(
        name, subfolder="unet", use_safetensors=True, torch_dtype=torch.float32
    )
    given, wanted = ({key: value.shape for key, value in net.state_dict().items()} for net in (begun, unet))
    if given != wanted:
        odd = sorted(key for key in given.keys() | wanted.keys() if given.get(key) != wanted.get(key))[0]
        raise ValueError(
            f"pretrained_student_model={name!r} has {odd} of shape {given.get(odd)}, and the teacher of shape {wanted.get(odd)}; give a "
            f"student that was made of this teacher"
        )
    unet.load_state_dict(begun.state_dict())


def merged_unet(base: SharedBase, name: str | None) -> UNet2DConditionModel:
    """A stock UNet with the adapter `name` merged into its weights, with `None` the network below the adapters."""
    unet = UNet2DConditionModel.from_config(base.network.config)
    unet.load_state_dict(base.merged_state_dict(name))
    return unet.to(next(base.network.parameters()).device)


class Student(Protocol):
    """What trains a UNet, itself or as an adapter on the teacher's."""

    base: SharedBase | None

    def plain_unet(self) -> UNet2DConditionModel:
        """The student as a stock UNet."""


def save_student(
    teacher: Teacher,
    student: Student,
    scheduler: SchedulerMixin,
    folder: Path,
    dtype: str,
    family: type[DiffusionPipeline] = StableDiffusionPipeline,
) -> None:
    """Writes the student as a stock pipeline, and its adapter, if it is one, as a file for `load_lora_weights`.

    Args:
        teacher: Gives all parts but the UNet.
        student: With the weights to keep.
        scheduler: What the student is sampled with.
        folder: An empty folder.
        dtype: "fp32" or "fp16", of the pipeline.
        family: Class of the pipeline.
    """
    save_pipeline(teacher.student_pipeline(student.plain_unet(), scheduler, family), folder, dtype)
    if student.base:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=student.base.state_dict(STUDENT))


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

"""What the reliability probes run over. A new scheduler, pipeline, function or script is put under all of them here.

To plug in:
* a scheduler: one line in `SCHEDULERS`;
* a pipeline: a `PipelineSubject` in `PIPELINES` (how to build a tiny one, one good call, how to load a saved one);
* a public class or function: a `Function` in `functions.py`;
* a training script: a `Script` in `SCRIPTS` with the arguments of a run of a few short steps.

Values of a fuzzed argument are drawn from two lists, `good` and `bad`. A value that is a `Made` is computed anew for each draw
from the draw's own random numbers.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from diffusers_ext import MRScheduler, RollingLadderScheduler, RollingTransformer1DModel
from tests.helpers.tiny_flows import flow_scheduler, tiny_flow_components, tiny_unet_of_pixels
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components, tiny_stable_diffusion_xl, tiny_vae
from tests.helpers.tiny_restoration import tiny_restoration_unet


ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Made:
    """A value computed for each draw."""

    label: str
    make: Callable[[random.Random], Any]


@dataclass(frozen=True)
class Argument:
    """What may, and what must not, be passed for one argument."""

    good: Sequence[Any]
    bad: Sequence[Any]


@dataclass(frozen=True)
class Function:
    """A callable under the fuzzer: `call(**good)` works, and each argument may be replaced by a draw.

    Paths must lie in the sandbox's scratch folder wherever the callable writes.
    """

    name: str
    call: Callable[..., Any]
    arguments: Mapping[str, Argument]
    is_model: bool = False


@dataclass(frozen=True)
class WrongCall:
    """One wrong call: what to run, and what (as patterns) the answer must say of the argument and its value."""

    subject: str
    mistake: str
    call: Callable[[], Any]
    argument: str
    value: str


@dataclass(frozen=True)
class PipelineSubject:
    """A pipeline class: components of a tiny one, and a call of it that a slow core does in a fraction of a second."""

    name: str
    components: Callable[[], dict[str, Any]]
    good: Callable[[], dict[str, Any]]
    # Arguments of its making that are no components, and of its loading.
    made_with: Mapping[str, Any] = field(default_factory=dict)
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    # Where the output of a call has what was made.
    result: str = "images"

    def build(self) -> Any:
        """A new one."""
        return self._quiet(self._class()(**self.components(), **self.made_with))

    def load(self, folder: str) -> Any:
        """A saved one."""
        return self._quiet(self._class().from_pretrained(folder, **self.loaded_with))

    def made(self, pipeline: Any, **changes: Any) -> Any:
        """What the good call makes, with other arguments if they are given."""
        return getattr(pipeline(**{**self.good(), **changes}), self.result)

    def _class(self) -> Any:
        import diffusers_ext

        return getattr(diffusers_ext, self.name)

    @staticmethod
    def _quiet(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@dataclass(frozen=True)
class Script:
    """A training script: an importable module with `parse_args(list)` and `main(args)`, and a run of a few short steps.

    `prepare(folder)` makes what the runs share. `arguments(run)` gives the command line of a run in the folder `run` beside
    it, which saves a checkpoint after every step and keeps all of them; `--resume_from_checkpoint` is added by the probe.
    """

    name: str
    module: str
    steps: int
    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers: class name -> settings that it is built with. Ours are asserted on, stock ones are the anchor.
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    "AdaptiveAdamsScheduler": {},
    "BDIADDIMInverseScheduler": {},
    "BDIADDIMScheduler": {},
    "CTMScheduler": {"gamma": 0.5},
    "EVODiffScheduler": {},
    "FLAIRScheduler": {},
    "FlowChefDPMSolverMultistepScheduler": {},
    "FlowChefHeunScheduler": {},
    "FlowChefLCMScheduler": {},
    "FlowChefScheduler": {},
    "FlowChefUniPCMultistepScheduler": {},
    "GHVBScheduler": {"use_karras_sigmas": False},
    "HeavyBallDPMSolverMultistepScheduler": {},
    "HeavyBallUniPCMultistepScheduler": {},
    "MRScheduler": {"num_train_timesteps": 1000},
    "MeanRevertingAdapter": {"num_train_timesteps": 1000, "scheduler_class": "UniPCMultistepScheduler"},
    "ResfusionScheduler": {"num_train_timesteps": 26},  # which has ten steps, and no other number of them
    "RollingLadderScheduler": {"window_length": 1},  # one rung, so that any number of steps fits
}

# Further arguments that a step cannot do without, made from the sample.
STEP_ARGUMENTS: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "MRScheduler": lambda sample: {"mean": torch.zeros_like(sample)},
    "MeanRevertingAdapter": lambda sample: {"mean": torch.zeros_like(sample)},
    "ResfusionScheduler": lambda sample: {"mean": torch.zeros_like(sample)},
}

STOCK_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


def sample_picture(seed: int = 0, size: int = IMAGE_SIZE) -> Image.Image:
    """Noise as a picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def good_edit() -> dict[str, Any]:
    return {
        "image": sample_picture(), "source_prompt": "a", "prompt": "b", "num_inference_steps": 2, "guidance_scale": 3.0,
        "output_type": "np",
    }  # fmt: skip


def good_restoration() -> dict[str, Any]:
    # A restoration starts from noise: the same in every call.
    noise = torch.Generator().manual_seed(0)
    return {"image": sample_picture(), "num_inference_steps": 2, "output_type": "np", "generator": noise}


def good_inpainting() -> dict[str, Any]:
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    mask.paste(255, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    noise = torch.Generator().manual_seed(0)
    return {
        "prompt": "a", "image": sample_picture(), "mask_image": mask, "num_inference_steps": 2, "output_type": "np",
        "generator": noise,
    }  # fmt: skip


def good_inpainting_of_pixels() -> dict[str, Any]:
    return {name: value for name, value in good_inpainting().items() if name != "prompt"}


def pixel_components() -> dict[str, Any]:
    return {"unet": tiny_unet_of_pixels(), "scheduler": flow_scheduler()}


def restoration_components() -> dict[str, Any]:
    return {"unet": tiny_restoration_unet(), "scheduler": MRScheduler(prediction_type="v_prediction")}


def sdxl_components() -> dict[str, Any]:
    parts = tiny_stable_diffusion_xl().components
    return {name: part for name, part in parts.items() if name != "force_zeros_for_empty_prompt"}


def rolling_components() -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RollingTransformer1DModel(3, 2, num_layers=1, num_attention_heads=2, attention_head_dim=8).eval()
        for weight in network.parameters():  # a new one answers 0, whatever it is asked
            torch.nn.init.normal_(weight, std=0.2)
    scheduler = RollingLadderScheduler(
        prediction_type="sample", beta_schedule="cosine", window_length=4, ladder_step=2, context_length=2
    )
    return {"transformer": network, "scheduler": scheduler}


def good_stream() -> dict[str, Any]:
    cond = torch.linspace(-1.0, 1.0, 12).reshape(1, 6, 2)
    generator = torch.Generator().manual_seed(0)
    return {"cond": cond, "num_inference_steps": 4, "output_type": "np", "generator": generator}


UNCHECKED = {"requires_safety_checker": False}
UNMARKED = {"add_watermarker": False}
PIPELINES: tuple[PipelineSubject, ...] = (
    PipelineSubject("GuideAndRescalePipeline", tiny_components, good_edit, UNCHECKED),
    PipelineSubject("GuideAndRescaleStableDiffusionXLPipeline", sdxl_components, good_edit, UNMARKED, UNMARKED),
    PipelineSubject("NullTextInversionPipeline", tiny_components, good_edit, UNCHECKED),
    PipelineSubject("NullTextInversionStableDiffusionXLPipeline", sdxl_components, good_edit, UNMARKED, UNMARKED),
    PipelineSubject("FlowChefPipeline", tiny_flow_components, good_inpainting, UNCHECKED),
    PipelineSubject("FlowChefPixelPipeline", pixel_components, good_inpainting_of_pixels),
    PipelineSubject("MRRestorationPipeline", restoration_components, good_restoration),
    PipelineSubject("RollingLadderPipeline", rolling_components, good_stream, result="frames"),
)


@cache
def shared_pipeline(name: str) -> DiffusionPipeline:
    """One pipeline for all draws: a call that spoils it for the next one shows up as a fault there."""
    return next(subject for subject in PIPELINES if subject.name == name).build()


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------

SHORT_RUN = (
    "--dataset_name emoji-scenes --vendors noto --objects apple star --resolution 16 --dataloader_num_workers 1 "
    "--train_batch_size 2 --gradient_accumulation_steps 2 --lr_warmup_steps 2 --checkpointing_steps 1 "
    "--checkpoints_total_limit 1000 --validation_steps 0 --logging_steps 1 --report_to none --num_threads 1"
).split()


def save_tiny_vae(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_vae().save_pretrained(folder / "vae")


def train_text_to_image(run: Path) -> list[str]:
    own = "--unet_channels 8 16 --norm_num_groups 4 --attention_heads 2 --text_width 8 --text_layers 1 --max_tokens 16"
    return [
        *SHORT_RUN, *own.split(), "--num_inference_steps", "1", "--max_train_steps", "12", "--pretrained_vae",
        str(run.parent / "vae"), "--output_dir", str(run),
    ]  # fmt: skip


def train_autoencoder(run: Path) -> list[str]:
    own = "--block_out_channels 4 8 --crop_size 16 --crops_per_image 1 --num_validation_images 2 --max_train_steps 12"
    return [*SHORT_RUN, *own.split(), "--output_dir", str(run)]


def train_mr_restoration(run: Path) -> list[str]:
    own = "--unet_channels 8 8 --norm_num_groups 4 --num_validation_images 2 --validation_nfes 1 --max_train_steps 12"
    return [*SHORT_RUN, *own.split(), "--output_dir", str(run)]


def save_recording(folder: Path) -> None:
    rows = [f"{np.sin(0.3 * t)},{np.cos(0.3 * t)}" for t in range(80)]
    (folder / "data").mkdir()
    (folder / "data" / "walk.csv").write_text("\n".join(["leg,ankle", *rows]))
    recordings = [{"file": "walk.csv", "train": [[0, 60]], "test": [[60, 80]]}]
    index = {"frames": ["leg"], "condition": ["ankle"], "recordings": recordings}
    (folder / "data" / "sequences.json").write_text(json.dumps(index))


def train_rolling(run: Path) -> list[str]:
    own = "--window_length 4 --context_length 2 --num_layers 1 --num_attention_heads 1 --attention_head_dim 4 --max_train_steps 12"
    shared = SHORT_RUN[SHORT_RUN.index("--dataloader_num_workers") :]
    return [*shared, *own.split(), "--train_data_dir", str(run.parent / "data"), "--output_dir", str(run)]


def save_teacher(folder: Path) -> None:
    pipeline = StableDiffusionPipeline(**tiny_flow_components(), requires_safety_checker=False)
    pipeline.save_pretrained(folder / "teacher")


def distilling(*own: str) -> Callable[[Path], list[str]]:
    """Arguments of a script that has a teacher, a flow."""

    def arguments(run: Path) -> list[str]:
        teacher = str(run.parent / "teacher")
        return [
            *SHORT_RUN,
            "--pretrained_teacher_model",
            teacher,
            "--validation_prompts",
            "a star",
            *own,
            "--output_dir",
            str(run),
        ]

    return arguments


REFLOW = "--num_pairs 8 --teacher_steps 2 --max_train_steps 12".split()
CDM = "--method cdm --num_denoising_steps 1 --longest_schedule 2 --max_train_steps 12".split()
PGRAFT = "--reward brightness --num_prompts 4 --samples_per_prompt 2 --keep 1 --teacher_steps 2 --max_train_steps 12".split()
SCRIPTS: tuple[Script, ...] = (
    Script("train_text_to_image", "training.train_text_to_image", 12, save_tiny_vae, train_text_to_image),
    Script("train_autoencoder", "training.train_autoencoder", 12, lambda folder: None, train_autoencoder),
    Script("train_mr_restoration", "training.train_mr_restoration", 12, lambda folder: None, train_mr_restoration),
    Script("train_rolling", "training.train_rolling", 12, save_recording, train_rolling),
    Script("train_reflow", "training.train_reflow", 12, save_teacher, distilling(*REFLOW)),
    Script("train_dmd", "training.train_dmd", 12, save_teacher, distilling(*CDM)),
    Script("finetune_pgraft", "training.finetune_pgraft", 12, save_teacher, distilling(*PGRAFT)),
)

"""The seven wrong calls that people make, on every public class; each answer must name argument, value and cure."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ext import FeatureEnergy, InversionOutput, NormRescaler, SelfAttentionEnergy
from diffusers_ext.imaging import check_image, open_image
from tests.helpers.tiny_models import LATENT_SIZE, tiny_components, tiny_stable_diffusion_xl

from .outcomes import CURES, Tally
from .registry import NAN, PIPELINES, SCHEDULERS, STEP_ARGUMENTS, PipelineSubject, WrongCall, shared_pipeline
from .sandbox import sandbox


CHANNELS, SHAPE, NOT_A_NUMBER, NO_STEPS, STEPS, TYPO, FILE = MISTAKES = (
    "wrong channels", "broadcastable wrong shape", "NaN", "0 steps", "more steps than trained", "prediction type typo",
    "missing file",
)  # fmt: skip
MISSPELT, FAMILY, NO_LAYER = "misspelt argument", "another family", "no such layer"
ABSENT = "./no/such/folder"


def pipeline_calls(subject: PipelineSubject) -> Iterator[WrongCall]:
    def call(**changes: Any) -> Callable[[], Any]:
        return lambda: shared_pipeline(subject.name)(**{**subject.good(), **changes})

    def with_typo() -> Any:
        pipeline: Any = subject.build()
        pipeline.scheduler.register_to_config(prediction_type="epsilonn")
        return pipeline(**subject.good())

    def of_another_family() -> Any:
        pipeline: Any = subject.build()
        is_xl = getattr(pipeline.unet.config, "addition_embed_type", None) == "text_time"
        other = tiny_components()["unet"] if is_xl else tiny_stable_diffusion_xl().unet
        expected, _ = pipeline._get_signature_keys(pipeline)
        parts = {part: value for part, value in pipeline.components.items() if part in expected}
        return type(pipeline)(**{**parts, "unet": other})

    picture = torch.full((1, 3, 32, 32), 0.5)
    latents = torch.randn(1, 1, LATENT_SIZE, LATENT_SIZE)
    name = subject.name
    yield WrongCall(name, CHANNELS, call(image=torch.zeros(1, 5, 32, 32)), "image", r"\(1, 5, 32, 32\)")
    yield WrongCall(name, SHAPE, call(latents=latents), "latents", re.escape(str(tuple(latents.shape))))
    yield WrongCall(name, NOT_A_NUMBER, call(image=picture * NAN), "image", "NaN")
    yield WrongCall(name, NO_STEPS, call(num_inference_steps=0), "num_inference_steps", "0")
    yield WrongCall(name, STEPS, call(num_inference_steps=2000), "num_inference_steps", "2000")
    yield WrongCall(name, TYPO, with_typo, "prediction_type", "epsilonn")
    yield WrongCall(name, FILE, lambda: subject.load(ABSENT), "pretrained_model_name_or_path", re.escape(ABSENT))
    yield WrongCall(name, MISSPELT, call(guidance_scal=3.0), "guidance_scal", "unexpected keyword")
    yield WrongCall(
        name, FAMILY, of_another_family, "UNet", "addition_embed_type=|4 input and 4 output|cross_attention_dim="
    )


def stream_calls(subject: PipelineSubject) -> Iterator[WrongCall]:
    """The same of a pipeline of sequences."""

    def call(**changes: Any) -> Callable[[], Any]:
        return lambda: subject.made(shared_pipeline(subject.name), **changes)

    def with_typo() -> Any:
        pipeline: Any = subject.build()
        pipeline.scheduler.register_to_config(prediction_type="epsilonn")
        return subject.made(pipeline)

    def of_another_family() -> Any:
        pipeline: Any = subject.build()
        return type(pipeline)(pipeline.transformer, diffusers.DDIMScheduler())

    name, cond = subject.name, subject.good()["cond"]
    prefix = torch.zeros(1, 2, 1)
    yield WrongCall(name, CHANNELS, call(cond=torch.zeros(1, 6, 5)), "cond", r"\(1, 6, 5\)")
    yield WrongCall(name, SHAPE, call(prefix=prefix), "prefix", re.escape(str(tuple(prefix.shape))))
    yield WrongCall(name, NOT_A_NUMBER, call(cond=cond * NAN), "cond", "NaN|not a number")
    yield WrongCall(name, NO_STEPS, call(num_inference_steps=0), "num_inference_steps", "0")
    yield WrongCall(name, STEPS, call(num_inference_steps=2000), "num_inference_steps", "2000")
    yield WrongCall(name, TYPO, with_typo, "prediction_type", "epsilonn")
    yield WrongCall(name, FILE, lambda: subject.load(ABSENT), "pretrained_model_name_or_path", re.escape(ABSENT))
    yield WrongCall(name, MISSPELT, call(guidance_scal=3.0), "guidance_scal", "unexpected keyword")
    yield WrongCall(name, FAMILY, of_another_family, "scheduler", "DDIMScheduler")


def scheduler_calls(name: str, scheduler_class: Any, settings: dict[str, Any]) -> Iterator[WrongCall]:
    def step(model_output: torch.Tensor, sample: torch.Tensor, **changes: Any) -> Any:
        scheduler = scheduler_class(**{**settings, **changes})
        scheduler.set_timesteps(10)
        further = STEP_ARGUMENTS[name](sample) if name in STEP_ARGUMENTS else {}
        return scheduler.step(model_output, scheduler.timesteps[0], sample, **further)

    def steps(number: int) -> Any:
        scheduler = scheduler_class(**settings)
        scheduler.set_timesteps(number)
        return scheduler.timesteps

    sample = torch.randn(1, 4, 8, 8)
    three, one = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)
    yield WrongCall(name, CHANNELS, lambda: step(three, sample), "model_output", r"\(1, 3, 8, 8\)")
    yield WrongCall(name, SHAPE, lambda: step(one, sample), "model_output", r"\(1, 1, 8, 8\)")
    yield WrongCall(name, NOT_A_NUMBER, lambda: step(sample * NAN, sample), "model_output", "NaN|finite")
    yield WrongCall(name, NO_STEPS, lambda: steps(0), "num_inference_steps", "0")
    yield WrongCall(name, STEPS, lambda: steps(5000), "num_inference_steps", "5000")
    # Schedulers of flow models alone have no prediction type to misspell.
    has_type = "prediction_type" in inspect.signature(scheduler_class.__init__).parameters
    answer = "epsilonn" if has_type else "unexpected keyword"
    yield WrongCall(name, TYPO, lambda: step(sample, sample, prediction_type="epsilonn"), "prediction_type", answer)
    yield WrongCall(name, FILE, lambda: scheduler_class.from_pretrained(ABSENT), "", re.escape(ABSENT))


def component_calls() -> Iterator[WrongCall]:
    """Those of the seven that can be made on the smaller classes and functions, and their like."""
    energy: Any = SelfAttentionEnergy
    yield WrongCall("SelfAttentionEnergy", NOT_A_NUMBER, lambda: energy(NAN), "scale", "nan")
    yield WrongCall("SelfAttentionEnergy", MISSPELT, lambda: energy(scal=1), "scal", "unexpected")
    yield WrongCall(
        "SelfAttentionEnergy", NO_LAYER, lambda: _edit_with(energy(layers=["mid_blok"])), "layers", "mid_blok"
    )
    yield WrongCall("FeatureEnergy", NOT_A_NUMBER, lambda: FeatureEnergy(NAN), "scale", "nan")
    yield WrongCall("FeatureEnergy", TYPO, lambda: FeatureEnergy(loss="L3"), "loss", "L3")
    yield WrongCall(
        "FeatureEnergy", NO_LAYER, lambda: _edit_with(FeatureEnergy(layer="up_blocks.9")), "layer", "up_blocks.9"
    )
    yield WrongCall("NormRescaler", NOT_A_NUMBER, lambda: NormRescaler(low=NAN), "low", "nan")
    yield WrongCall("NormRescaler", "bounds exchanged", lambda: NormRescaler(3, 0.33), "rescale_range", "0.33")
    yield WrongCall(
        "InversionOutput",
        FILE,
        lambda: InversionOutput.from_pretrained(ABSENT),
        "inversion_config.json",
        "no/such/folder",
    )
    yield WrongCall(
        "InversionOutput", STEPS, lambda: _edit_inverted(num_inference_steps=3), "num_inference_steps", "3"
    )
    yield WrongCall("open_image", FILE, lambda: open_image(ABSENT), "exist", re.escape(ABSENT))
    yield WrongCall("check_image", CHANNELS, lambda: check_image(torch.zeros(5, 8, 8)), "image", r"\(5, 8, 8\)")
    yield WrongCall("check_image", NOT_A_NUMBER, lambda: check_image(torch.full((3, 8, 8), NAN)), "image", "NaN")


def _edit_with(guider: Any) -> Any:
    subject = PIPELINES[0]
    return shared_pipeline(subject.name)(**{**subject.good(), "guiders": [guider]})


def _edit_inverted(**changes: Any) -> Any:
    subject = PIPELINES[0]
    pipeline: Any = shared_pipeline(subject.name)
    good = subject.good()
    inversion = pipeline.invert(good["image"], good["source_prompt"], num_inference_steps=2)
    return pipeline(**{**good, "image": None, "source_prompt": None, "inversion": inversion, **changes})


def own_calls() -> Iterator[WrongCall]:
    import diffusers_ext

    for subject in PIPELINES:
        yield from stream_calls(subject) if subject.result == "frames" else pipeline_calls(subject)
    for name, settings in SCHEDULERS.items():
        yield from scheduler_calls(name, getattr(diffusers_ext.schedulers, name), settings)
    yield from component_calls()


def stock_calls() -> Iterator[WrongCall]:
    """The anchor: four schedulers of diffusers and its text-to-image pipeline."""
    for name in (
        "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    ):  # fmt: skip
        yield from scheduler_calls(name, getattr(diffusers, name), {})
    pipeline = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def call(**changes: Any) -> Callable[[], Any]:
        return lambda: pipeline(**{"prompt": "a", "num_inference_steps": 2, "output_type": "np", **changes}).images

    noise = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE)
    name = "StableDiffusionPipeline"
    yield WrongCall(name, CHANNELS, call(latents=noise[:, :3]), "latents", r"\(1, 3")
    yield WrongCall(name, SHAPE, call(latents=noise[:, :, :1, :1]), "latents", r"\(1, 4, 1, 1\)")
    yield WrongCall(name, NOT_A_NUMBER, call(latents=noise * NAN), "latents", "NaN|finite")
    yield WrongCall(name, NO_STEPS, call(num_inference_steps=0), "num_inference_steps", "0")
    yield WrongCall(name, STEPS, call(num_inference_steps=2000), "num_inference_steps", "2000")


def judge(wrong: WrongCall) -> tuple[str, str]:
    """`"clear"`, `"refused"` (an error of the right kind that lacks argument, value or cure), `"raw"` or `"silent"`."""
    try:
        wrong.call()
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        said = re.search(wrong.argument, message) and re.search(wrong.value, message)
        cured = CURES.search(message) or "unexpected keyword" in message or "does not exist" in message
        return ("clear" if said and cured else "refused"), f"{type(error).__name__}: {message}"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    return "silent", "no error"


def table(calls: Iterable[WrongCall]) -> tuple[dict[str, dict[str, str]], Tally]:
    """subject -> mistake -> verdict, and the tally with what was answered instead of a clear sentence."""
    verdicts: dict[str, dict[str, str]] = {}
    tally = Tally()
    for wrong in calls:
        verdict, message = judge(wrong)
        verdicts.setdefault(wrong.subject, {})[wrong.mistake] = verdict
        tally.counts[verdict] += 1
        if verdict != "clear":
            tally.faults.append(f"{verdict}: {wrong.subject}, {wrong.mistake} -> {message[:300]}")
    return verdicts, tally


if __name__ == "__main__":
    with sandbox():
        for title, calls in (("ours", own_calls()), ("stock", stock_calls())):
            _, tally = table(calls)
            print(title, tally.as_dict(), *tally.faults, sep="\n  ")

"""Public functions and classes under the fuzzer, each with what may and what must not be passed.

Where a function writes, its paths are files of the sandbox's scratch folder and nothing else.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, InversionOutput, NormRescaler, SelfAttentionEnergy
from diffusers_ext.data.degradations import DEGRADATIONS, degrade
from diffusers_ext.data.emoji_scenes import EmojiScenes, vendor_pairs
from diffusers_ext.data.photographs import photograph
from diffusers_ext.data.spectrograms import CompressedSTFT
from diffusers_ext.hub import resolve_device, resolve_model
from diffusers_ext.imaging import check_image, fit_square, open_image
from diffusers_ext.integrity import atomic_folder, atomic_write, check_weights
from diffusers_ext.inversion import DDIMLadder
from diffusers_ext.schedulers import MRScheduler

from .functions_of_edits import EDIT_ARGUMENTS, FUNCTIONS_OF_EDITS, inversion
from .functions_of_inversion import FUNCTIONS_OF_INVERSION
from .functions_of_numbers import FUNCTIONS_OF_NUMBERS
from .functions_of_steering import FUNCTIONS_OF_STEERING
from .functions_of_streams import FUNCTIONS_OF_STREAMS
from .functions_of_words import FUNCTIONS_OF_WORDS
from .registry import INF, NAN, Argument, Function, Made, sample_picture, shared_pipeline
from .sandbox import scratch
from .values import NOT_COUNTS, NOT_NUMBERS, PICTURES, picture


def _files() -> Path:
    """The scratch folder with the files that draws refer to."""
    folder = scratch()
    if not (folder / "good.png").exists():
        sample_picture().convert("L").save(folder / "gray.jpg")
        (folder / "text.png").write_text("not a picture")
        (folder / "empty.png").touch()
        (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        (folder / "folder.png").mkdir()
        sample_picture().save(folder / "good.png")
        (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:200])
    return folder


def _file(name: str) -> Made:
    def make(rng: random.Random) -> Any:
        return rng.choice([str, Path])(_files() / name)

    return Made(f"<file {name}>", make)


PATHS = Argument(
    good=[_file("good.png"), _file("gray.jpg")],
    bad=[
        *map(_file, ("text.png", "empty.png", "drawing.svg", "folder.png", "cut.png", "absent.png", "a/b.png")),
        "", None, 5, b"good.png", [], {}, "\0", "x" * 5000, "/dev/zero", "/dev/stdin", object,
    ],
)  # fmt: skip
SEEDS = Argument(good=[0, 1, -1, 2**63, 10**30], bad=[1.5, NAN, INF, "1", None, [], object])
COUNTS = Argument(good=[1, 2], bad=[-1, 1.5, NAN, "3", None, [], True])


# ---------------------------------------------------------------------------------------------------------------------
# Files of the editing pipelines
# ---------------------------------------------------------------------------------------------------------------------


def _load_inversion(directory: Any, config: Any, weights: Any) -> InversionOutput:
    """Loads an inversion whose two files went through `config` and `weights`."""
    if directory == "<saved>":
        directory = scratch() / "inversion"
        inversion().save_pretrained(directory)
        for path in directory.iterdir():
            damage = config if path.suffix == ".json" else weights
            if damage:
                path.write_bytes(damage(path.read_bytes()))
    return InversionOutput.from_pretrained(directory)


def _damages() -> Iterator[Callable[[bytes], bytes]]:
    yield lambda data: b""
    yield lambda data: data[: len(data) // 2]
    yield lambda data: data[::-1]
    yield lambda data: data + b"x"
    yield lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]


def _damages_of_json() -> Iterator[Callable[[bytes], bytes]]:
    yield from list(_damages())[:4]
    yield lambda data: b"[]"
    yield lambda data: b"{}"
    yield lambda data: data.replace(b'"sha256"', b'"sha-256"')
    yield lambda data: data.replace(b'"prompt": [', b'"prompt": 5, "x": [')
    yield lambda data: data.replace(b'"file": "', b'"file": "../')
    yield lambda data: data.replace(b'"file": "', b'"file": ["x"], "y": "')
    yield lambda data: data.replace(b'"image_size": [', b'"image_size": "big", "x": [')
    yield lambda data: data.replace(b'"num_inference_steps": 2', b'"num_inference_steps": 3')


def _load_pipeline(pretrained_model_name_or_path: Any, use_safetensors: Any) -> Any:
    return GuideAndRescalePipeline.from_pretrained(pretrained_model_name_or_path, use_safetensors=use_safetensors)


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the library
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _scenes() -> EmojiScenes:
    return EmojiScenes(resolution=16, objects=["apple", "star"])


def _render(n: int, seed: int, split: str) -> Any:
    drawn = _scenes().sample(n, seed, split)
    images, masks = _scenes().render(drawn)
    return [images, masks, _scenes().captions(drawn, drop=True, seed=seed)]


def _ladder(num_inference_steps: Any, prediction_type: Any, num_train_timesteps: Any) -> Any:
    pipeline: Any = shared_pipeline("GuideAndRescalePipeline")
    changes = {"prediction_type": prediction_type, "num_train_timesteps": num_train_timesteps}
    config = {**pipeline.scheduler.config, **changes}
    # The list of settings that were left at their defaults would win over the changed ones.
    config.pop("_use_default_values", None)
    ladder = DDIMLadder.from_scheduler_config(config, num_inference_steps)
    return [ladder.timesteps, ladder.alpha_bars]


def _make_folder(target: Any) -> Any:
    with atomic_folder(target) as folder:
        (folder / "a").write_text("a")
    return [str(target)]


def _rescale(low: Any, high: Any, guidance: torch.Tensor, reference: torch.Tensor) -> Any:
    return NormRescaler(low, high)(guidance, reference)


def _noise(scale: float, dtype: torch.dtype = torch.float32) -> Made:
    return Made(f"<noise x {scale} {dtype}>", lambda rng: (scale * torch.randn(2, 4, 4, 4)).to(dtype))


NOISE = Argument(good=[_noise(1), _noise(0), _noise(1e-20), _noise(1e15), _noise(1, torch.float16)], bad=[])
SCALES = Argument(good=[0, 1, 3e5, -2.0], bad=NOT_NUMBERS)
FEW_PICTURES = [picture(kind) for kind in ("RGB", "L", "RGBA", "I;16")]

# ---------------------------------------------------------------------------------------------------------------------
# Restoration
# ---------------------------------------------------------------------------------------------------------------------


def _restore(**arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("MRRestorationPipeline")
    return pipeline(**arguments)


def _mean_reverting(
    trained_thetas: Any, algorithm_type: Any, solver_order: Any, sigma_inf: Any, timesteps: Any
) -> Any:
    schedule = "cosine" if trained_thetas is None else "trained"
    scheduler = MRScheduler(
        num_train_timesteps=4, theta_schedule=schedule, trained_thetas=trained_thetas, algorithm_type=algorithm_type,
        solver_order=solver_order, sigma_inf=sigma_inf,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=timesteps)
    return [scheduler.timesteps, scheduler.sigmas]


def _wave_and_back(wave: Any, n_fft: Any, hop_length: Any, exponent: Any, length: Any) -> Any:
    transform = CompressedSTFT(n_fft, hop_length, exponent)
    return transform.decode(transform.encode(wave), length)


def _unit_noise(*shape: int) -> Made:
    return Made(f"<uniform {shape}>", lambda rng: torch.rand(*shape))


RESTORATION: tuple[Function, ...] = (
    Function("MRRestorationPipeline", _restore, {
        "image": PICTURES,
        "num_inference_steps": Argument(good=[1, 2, 3, np.int64(2)], bad=[*NOT_COUNTS, 101, 2000, object]),
        "strength": Argument(good=[1.0, 1, 0.5, 1e-9], bad=[*NOT_NUMBERS, 0, -0.1, 1.01, True, 1e308]),
        "latents": Argument(good=[None], bad=[0, "x", [], torch.zeros(1), torch.full((1, 3, 32, 32), NAN), object]),
        "generator": EDIT_ARGUMENTS["generator"],
        "output_type": EDIT_ARGUMENTS["output_type"],
        "return_dict": EDIT_ARGUMENTS["return_dict"],
        "callback_on_step_end": EDIT_ARGUMENTS["callback_on_step_end"],
        "callback_on_step_end_tensor_inputs": Argument(
            good=[["latents"], [], ["mean"]], bad=["latents", None, 5, ["latent"], [None], ["self"], {}]
        ),
    }, is_model=True),
    Function("MRScheduler", _mean_reverting, {
        "trained_thetas": Argument(
            good=[None, [1.0] * 5, [0.1, 0.2, 0.3, 0.4, 5.0]],
            bad=[[], [1.0], [0.0] * 5, [NAN] * 5, [-1.0] * 5, ["a"] * 5, "abcde", 5, {}, [[1.0]] * 5, [None] * 5, object],
        ),
        "algorithm_type": Argument(
            good=["ode-d", "ode-n", "sde-d", "sde-n", "posterior", "euler-maruyama"], bad=["ode", "", None, 0, [], {}, object]
        ),
        "solver_order": Argument(good=[2, 1], bad=[0, 4, -1, 1.5, NAN, "2", None, [], True, object]),
        "sigma_inf": Argument(good=[0.2, 1, 70 / 255], bad=[*NOT_NUMBERS, 0, -1.0, True]),
        "timesteps": Argument(
            good=[[4.0, 2.0], [4], [3.5, 0.1], torch.tensor([4.0, 1.0])],
            bad=[None, [], [0.0], [1, 2], [5.0], [NAN], "43", 5, {}, [[4.0]], [None], object, [4.0, 4.0], -1],
        ),
    }),
    Function("degrade", lambda images, kinds: degrade(images, kinds)[0], {
        "images": Argument(
            good=[_unit_noise(2, 3, 16, 16), _unit_noise(1, 3, 5, 7), _unit_noise(1, 3, 1, 1)],
            bad=[
                None, 5, "x", [], object, torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8), torch.full((1, 3, 8, 8), NAN),
                torch.full((1, 3, 8, 8), 7.0), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 5, 0, 8),
            ],
        ),
        "kinds": Argument(
            good=[None, *([name] for name in DEGRADATIONS), "noise"], bad=["fog", [], ["fog"], [None], 5, {}, [[]], object]
        ),
    }),
    Function("CompressedSTFT", _wave_and_back, {
        "wave": Argument(
            good=[_unit_noise(1, 2000), _unit_noise(2, 1999)],
            bad=[
                None, 5, "x", [], object, torch.zeros(2000), torch.zeros(1, 10), torch.full((1, 2000), NAN),
                torch.zeros(1, 2000, dtype=torch.int64), torch.zeros(0, 2000),
            ],
        ),
        "n_fft": Argument(good=[510, 256], bad=[0, -2, 511, 2.5, NAN, "510", None, [], True, object]),
        "hop_length": Argument(good=[128, 100], bad=[0, -1, 400, 2.5, NAN, "128", None, [], True, object]),
        "exponent": Argument(good=[0.5, 1, 0.667], bad=[*NOT_NUMBERS, 0, -1.0, 1.5, True]),
        "length": Argument(good=[1999, 100, 1], bad=[0, -1, 10**9, 2.5, NAN, "9", None, [], True, object]),
    }),
    Function("photograph", photograph, {
        "name": Argument(good=["chelsea.png"], bad=["", "cat.png", "../chelsea.png", None, 5, [], {}, b"chelsea.png", object]),
    }),
)  # fmt: skip

FUNCTIONS: tuple[Function, ...] = (
    *FUNCTIONS_OF_EDITS,
    Function("GuideAndRescalePipeline.from_pretrained", _load_pipeline, {
        "pretrained_model_name_or_path": Argument(
            good=["absent-owner/absent"],
            bad=[
                "", " ", "~", ".", "..", "./absent", "/absent", "a/b/c", "\0", "x" * 300, None, 5, b"x", [], {}, NAN, object,
                _file("good.png"), _file("folder.png"),
            ],
        ),
        "use_safetensors": Argument(good=[None, True], bad=[False]),
    }),
    Function("SelfAttentionEnergy", SelfAttentionEnergy, {
        "scale": SCALES,
        "layers": Argument(good=["all", ["mid_block"]], bad=["", [], 5, None, [None], [""], {}, object]),
    }),
    Function("FeatureEnergy", FeatureEnergy, {
        "scale": SCALES,
        "layer": Argument(good=["up_blocks.-1", "conv_norm_out"], bad=["", None, 5, [], {}, object]),
        "loss": Argument(good=["l1", "l2"], bad=["L1", "l3", "", None, 1, [], {}, object]),
    }),
    Function("NormRescaler", _rescale, {
        "low": Argument(good=[0, 0.33, 1], bad=[*NOT_NUMBERS, -0.1, True, 1e308]),
        "high": Argument(good=[1, 3.0, INF], bad=[NAN, -INF, "3", None, [], 1j, -1, 0.1, object]),
        "guidance": NOISE,
        "reference": NOISE,
    }),
    Function("DDIMLadder", _ladder, {
        "num_inference_steps": Argument(good=[1, 2, 50, 999, 1000], bad=[0, -1, 1001, 2000, 10**9]),
        "prediction_type": Argument(good=["epsilon", "v_prediction"], bad=["sample", "epsilonn", "", None, 0, "flow"]),
        "num_train_timesteps": Argument(good=[1000, 2000], bad=[]),
    }),
    Function("InversionOutput.from_pretrained", _load_inversion, {
        "directory": Argument(good=["<saved>"], bad=["/absent", "\0", _file("good.png"), _file("folder.png")]),
        "config": Argument(good=[None], bad=list(_damages_of_json())),
        "weights": Argument(good=[None], bad=list(_damages())),
    }, is_model=True),
    Function("open_image", open_image, {
        "path": PATHS,
        "max_pixels": Argument(good=[2**24, 32 * 32], bad=[1, 0, -1, 2.5, NAN, "9", None, True, []]),
    }),
    Function("check_image", check_image, {"image": PICTURES, "max_pixels": Argument(good=[2**24], bad=[1])}),
    Function("fit_square", fit_square, {
        "image": Argument(good=FEW_PICTURES, bad=[None, 5, "x", [], object]),
        "size": Argument(good=[1, 16, 32], bad=NOT_COUNTS),
    }),
    Function("EmojiScenes", lambda sheets, resolution, objects: EmojiScenes(sheets, resolution, objects).object_names, {
        "sheets": Argument(good=[None, "noto"], bad=["notto", "", 5, [], [None], {}, "../noto", object]),
        "resolution": Argument(good=[8, 64], bad=[0, -2, 7, 9, 2.5, NAN, "64", None, [], True, 6]),
        "objects": Argument(
            good=[["apple"], ["star", "apple"]], bad=[["aple"], "apple", 5, [None], [1], {"apple": 1}, [[]]]
        ),
    }),
    Function("EmojiScenes.sample", _render, {
        "n": COUNTS, "seed": SEEDS,
        "split": Argument(good=["train", "all"], bad=["Train", "test", "", None, 0, []]),
    }),
    Function("EmojiScenes.edit_pairs", lambda kind, n, seed: _scenes().edit_pairs(kind, n, seed).source, {
        "kind": Argument(good=["colour", "background", "pattern", "object"], bad=["color", "", None, 0, [], "vendor"]),
        "n": COUNTS, "seed": SEEDS,
    }),
    Function("vendor_pairs", lambda family, n, seed: vendor_pairs(family, n, resolution=16, seed=seed).target, {
        "family": Argument(good=["hearts", "clock"], bad=["heart", "", None, 0, []]), "n": COUNTS, "seed": SEEDS,
    }),
    Function("resolve_model", resolve_model, {
        "model": Argument(
            good=["owner/name"],
            bad=[
                "./absent", "/absent", "", " ", 5, b"x", [], NAN, "\0", "x" * 300, object, _file("good.png"),
                _file("folder.png"),
            ],
        ),
    }),
    Function("resolve_device", lambda device: str(resolve_device(device)), {
        "device": Argument(good=[None, "cpu"], bad=["gpu", "cuda:99", "", 5, "cpu:x", [], NAN, object, "meta:1:2"]),
    }),
    Function("atomic_folder", _make_folder, {
        "target": Argument(
            good=[_file(f"made-{i}") for i in range(50)],
            bad=[_file("good.png"), _file("good.png/sub"), _file("good\0.png"), _file("folder.png/.."), _file(""), None, 5, b"x", []],
        ),
    }),
    Function("atomic_write", lambda path, data: [str(atomic_write(path, data))], {
        "path": Argument(
            good=[_file("file.bin")], bad=[_file("folder.png"), _file("absent/file.bin"), _file("a\0b"), None, 5, b"x", []]
        ),
        "data": Argument(good=[b"", b"x" * 1000], bad=[]),
    }),
    Function("check_weights", lambda modules: check_weights(modules), {
        "modules": Argument(good=[{}, {"a": torch.nn.Linear(2, 2)}], bad=[]),
    }),
    *RESTORATION,
    *FUNCTIONS_OF_INVERSION,
    *FUNCTIONS_OF_NUMBERS,
    *FUNCTIONS_OF_STEERING,
    *FUNCTIONS_OF_STREAMS,
    *FUNCTIONS_OF_WORDS,
)  # fmt: skip

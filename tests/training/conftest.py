import hashlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffusers_ext.training.autoencoding import new_autoencoder
from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.text_to_image import assemble, new_text_encoder, new_unet
from diffusers_ext.training.tokenizer import train_tokenizer


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "training"
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
# a model of a few thousand weights on pictures of 16 pixels
TINY_MODEL = [
    "--resolution=16", "--unet_channels", "16", "16", "--norm_num_groups=4", "--attention_heads=2", "--text_width=16",
    "--text_layers=1", "--max_tokens=12", "--train_batch_size=4", "--num_threads=1", "--report_to=none",
    "--validation_prompts", "a red square", "--num_inference_steps=2",
]  # fmt: skip


def load_script(name: str) -> ModuleType:
    """A training script as a module; the scripts are no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def log_entries(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log_entries(output_dir) if "loss" in entry}


def exported_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all tensors in the last checkpoint, and of the exported UNet."""
    newest = list_checkpoints(folder)[-1][1]
    files = [*sorted(newest.glob("*.safetensors")), folder / "unet" / "diffusion_pytorch_model.safetensors"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(script: Path, arguments: list[str], config: Path | None = None) -> subprocess.Popen:
    """A script in a process of its own, or with an Accelerate config in several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = (
        ["-m", "accelerate.commands.launch", f"--config_file={config}", "--main_process_port=0"] if config else []
    )
    command = [sys.executable, *launcher, str(script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed_after(entries: int, script: Path, arguments: list[str], output_dir: Path) -> None:
    """Starts a run with `--logging_steps=1` and kills it, with no chance to clean up, when it has logged so much."""
    process = start(script, [*arguments, f"--output_dir={output_dir}"])
    log, deadline = output_dir / "log.jsonl", time.monotonic() + 200
    while not (log.is_file() and log.read_text().count("\n") > entries):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no file larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Equal bits need an equal number of threads, and tests must not change it for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of one coloured square each, with captions: the imagefolder layout."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(24):
        (name, colour), (ground, behind) = [list(COLOURS.items())[k] for k in (i % 4, (i // 4 + i + 1) % 4)]
        pixels = np.full((20, 24, 3), behind, np.uint8)
        pixels[4 + i % 5 : 12 + i % 5, 5 + i % 7 : 13 + i % 7] = colour
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {name} square on {ground}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained autoencoder of factor 2."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    new_autoencoder((8, 8), norm_num_groups=2).save_pretrained(folder)
    return folder


def _save_teacher(folder: Path, prediction_type: str) -> Path:
    """A stock pipeline of a few thousand weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"a {colour} square on {colour}" for colour in COLOURS], 12)
    unet = new_unet((16, 16), 4, 8, 16, heads=2, norm_num_groups=4)
    parts = new_autoencoder((8, 8), norm_num_groups=2), unet, new_text_encoder(tokenizer, 16, 1, 2), tokenizer
    assemble(*parts, prediction_type).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {kind: _save_teacher(folder / kind, kind) for kind in ("epsilon", "v_prediction", "flow")}


@pytest.fixture(scope="session")
def text_to_image_arguments(picture_folder: Path, vae_folder: Path) -> list[str]:
    return [*TINY_MODEL, f"--train_data_dir={picture_folder}", f"--pretrained_vae={vae_folder}"]


@pytest.fixture
def train(text_to_image_arguments: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Runs train_text_to_image.py in this process and returns its folder."""
    script = load_script("train_text_to_image")

    def run(name: str, *arguments: str) -> Path:
        output_dir = tmp_path / name
        script.main(script.parse_args([*text_to_image_arguments, f"--output_dir={output_dir}", *arguments]))
        return output_dir

    return run


@pytest.fixture
def dmd_arguments(teachers: dict[str, Path], picture_folder: Path) -> list[str]:
    return [
        f"--pretrained_teacher_model={teachers['v_prediction']}", f"--train_data_dir={picture_folder}",
        "--resolution=16", "--max_train_steps=2",
        "--train_batch_size=2", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0", "--lora_rank=2",
        "--validation_prompts", "a red square", "--num_denoising_steps=2", "--fake_update_ratio=2",
    ]  # fmt: skip


@pytest.fixture
def train_dmd(dmd_arguments: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Runs train_dmd.py in this process and returns its folder."""
    script = load_script("train_dmd")

    def run(name: str, *more: str) -> Path:
        script.main(script.parse_args([*dmd_arguments, f"--output_dir={tmp_path / name}", *more]))
        return tmp_path / name

    return run


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Namespace]:
    """Parsed arguments of train_text_to_image.py, for tests of the trainer alone."""

    def parse(**changes: object) -> Namespace:
        import argparse

        from diffusers_ext.training.arguments import add_data_arguments, add_training_arguments

        parser = argparse.ArgumentParser()
        add_data_arguments(parser)
        add_training_arguments(parser)
        args = parser.parse_args([f"--output_dir={tmp_path / 'run'}", "--report_to=none", "--lr_warmup_steps=0"])
        for name, value in changes.items():
            assert hasattr(args, name), name
            setattr(args, name, value)
        return args

    return parse

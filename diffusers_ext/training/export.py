"""From trained weights to a folder that stock diffusers loads, with a card and, if wanted, on the Hub."""

import json
import logging
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH, populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image
from safetensors import SafetensorError

from .arguments import recorded
from .streams import stream
from .trainer import Trainer


logger = logging.getLogger(__name__)

INDEX_NAME = "model_index.json"
# what a run leaves in its folder besides the model
RUN_FILES = (
    "checkpoint-*/**",
    "logs/**",
    "samples/**",
    "log.jsonl",
    "latents-*",
    "pairs-*",
    "guided-*",
    "accepted-*",
    ".*",
    ".*/**",
)


def install_model(write: Callable[[Path], None], output_dir: str | os.PathLike[str]) -> None:
    """Puts a model into a run's folder beside its checkpoints.

    Everything is written into a hidden folder first and then moved file by file, the index last: a failed save leaves
    the model of an earlier run as it was. Nothing that the model does not have itself is touched.

    Args:
        write: Writes the model into an empty folder.
        output_dir: Folder of the run.

    Raises:
        OSError: If it cannot be written; the message names the folder.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".model-", dir=output_dir))
    except OSError as error:
        raise OSError(f"the model could not be saved in {output_dir}: {error.strerror or error}") from error
    try:
        write(staging)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == INDEX_NAME):
            final = output_dir / path.relative_to(staging)
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, final)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"the model could not be saved in {output_dir}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish_run(trainer: Trainer, write: Callable[[Path], None], with_samples: bool = True) -> None:
    """Ends a run: the model comes into its folder, with `--push_to_hub` onto the Hub, and the processes part.

    Args:
        trainer: After its last validation.
        write: Writes the model into an empty folder; the weights to keep are in place then.
        with_samples: Put the picture of the last validation beside it, as `samples.png`.

    Raises:
        OSError: If it cannot be written.
    """
    args, accelerator = trainer.args, trainer.accelerator

    def write_all(folder: Path) -> None:
        if with_samples:
            shutil.copyfile(trainer.samples_file, folder / "samples.png")
        write(folder)

    if accelerator.is_main_process:
        with trainer.weights_to_keep():
            install_model(write_all, args.output_dir)
        logger.info("saved the model in %s", args.output_dir)
        if args.push_to_hub:
            logger.info("uploaded: %s", push_folder(args))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, dtype: str) -> None:
    """Writes a pipeline; half precision by way of a copy, because the parts themselves may still be trained.

    Args:
        pipeline: The pipeline, in float32.
        folder: An empty folder.
        dtype: "fp32" or "fp16".
    """
    if dtype == "fp32":
        pipeline.save_pretrained(folder)
    else:
        with tempfile.TemporaryDirectory(prefix=".full-", dir=folder) as full:
            pipeline.save_pretrained(full)
            type(pipeline).from_pretrained(full, dtype=torch.float16).save_pretrained(folder)
    clean_configs(folder)


def clean_configs(folder: Path) -> None:
    """Takes from the configs below a folder what holds on this machine only, or for the type they were saved in."""
    for path in folder.glob("**/*.json"):
        if path.name in ("model_index.json", "config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # a folder of this machine
            if "dtype" in config:
                # transformers computes in the type named here, diffusers in float32: the parts would not fit together
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def picture_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Pictures (n, 3, H, W) in [-1, 1] on one sheet, row by row; a last row that is not full stays white at its end."""
    pixels = (
        ((images.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    )
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:n] = pixels
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return Image.fromarray(sheet)


def sample_sheet(
    pipeline: Any, prompts: Sequence[str], seed: int, given: torch.Tensor | None = None, **arguments: Any
) -> Image.Image:
    """A sheet of what a pipeline makes of prompts, from the same noise at every validation.

    Args:
        pipeline: One that takes prompts.
        prompts: A picture each.
        seed: Seed of the run.
        given: Pictures (n, 3, H, W) in [0, 1] to show above, if they are what the samples are made of.
        arguments: Of the call.
    """
    made = pipeline(
        list(prompts), generator=stream(seed, 0, "validation-samples"), output_type="pt", **arguments
    ).images
    shown = made if given is None else torch.cat([given, made])
    return picture_grid(shown * 2.0 - 1.0, columns=min(8, len(prompts)))


def write_card(folder: Path, title: str, description: str, args: Namespace, tags: list[str], **front: Any) -> None:
    """Writes `README.md` with front matter, a description and the settings of the run.

    Args:
        folder: Folder of the model.
        title: First line.
        description: Markdown text below it.
        args: Arguments of the run.
        tags: Tags on the Hub.
        front: More fields of the front matter, e.g. `license`.
    """
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in recorded(args).items() if value is not None)
    text = f"# {title}\n\n{description}\n\n## Training\n\n| argument | value |\n| --- | --- |\n{settings}\n"
    data = ModelCardData(library_name="diffusers", **front)
    # `load_or_create_model_card` would ask the Hub for a card of that name first
    card = ModelCard.from_template(data, template_path=str(MODEL_CARD_TEMPLATE_PATH), model_description=text)
    populate_model_card(card, tags=tags).save(folder / "README.md")


def push_folder(args: Namespace) -> str:
    """Uploads the model of a run, without checkpoints and logs.

    Returns:
        Address of the commit.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repo = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    commit = upload_folder(
        repo_id=repo,
        folder_path=args.output_dir,
        commit_message="End of training",
        ignore_patterns=list(RUN_FILES),
        token=args.hub_token,
    )
    return str(commit)

"""What may be published: every folder of this checkout, and no folder with anything wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusers_ext.manifest import MANIFEST_NAME
from diffusers_ext.publishable import UnpublishableError, check_publishable
from diffusers_ext.publishing import check_repo_id


ROOT = Path(__file__).resolve().parents[1]
CARD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# Tiny\n\nWhat it is.\n"
SPACE = (
    "---\ntitle: T\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\nlicense: apache-2.0\n---\n\nWhat it does.\n"
)
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": [None, None],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline of one weight, in the layout of a sound one."""
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"weight": np.ones(4, np.float32)}, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    return tmp_path


@pytest.fixture
def space(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(SPACE)
    (tmp_path / "app.py").write_text("import gradio\n")
    (tmp_path / "requirements.txt").write_text("gradio\n")
    return tmp_path


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def index(**changes: object) -> Callable[[Path], object]:
    return write("model_index.json", json.dumps({**INDEX, **changes}))


def truncate(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def shard(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))


def disagree(folder: Path) -> None:
    write(MANIFEST_NAME, json.dumps({"files": {"unet/config.json": "0" * 64}}))(folder)


PROBLEMS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "README.md").unlink(), "README.md is missing"),
    (write("README.md", "# Tiny\n\nWhat it is.\n"), "has no front matter"),
    (write("README.md", "---\n- a\n---\nText\n"), "has no front matter"),
    (write("README.md", "---\na: [\n---\nText\n"), "cannot be read"),
    (write("README.md", b"\xff\xfe"), "cannot be read"),
    (write("README.md", CARD.replace("license: apache-2.0\n", "")), "license: None"),
    (write("README.md", CARD.replace("apache-2.0", "Apache 2")), "license: Apache 2"),
    (write("README.md", CARD.replace("apache-2.0", "other")), "needs a license_name"),
    (write("README.md", CARD.replace("library_name: diffusers\n", "")), "library_name: None"),
    (write("README.md", CARD.replace("What it is.", "")), "says nothing yet"),
    (write("README.md", CARD + "[More Information Needed]"), "says nothing yet"),
    (write("README.md", CARD + "![samples](samples.png)"), "the picture samples.png"),
    (write("unet/diffusion_pytorch_model.bin", "x"), "may be a pickle"),
    (write("unet/optimizer.pt", "x"), "may be a pickle"),
    (write("unet/notes.txt", "x"), "unet/notes.txt does not belong"),
    (write(".env", "HF_TOKEN=x"), ".env does not belong"),
    (write(".git/config", "x"), ".git/config does not belong"),
    (write("logs/run.json", "{}"), "logs/run.json does not belong"),
    (write("unet/deeper/config.json", "{}"), "unet/deeper/config.json does not belong"),
    (write("LICENSE", ""), "LICENSE is empty"),
    (write("samples.png", bytes(10**7 + 1)), "samples.png has 10 MB"),
    (truncate, "is damaged"),
    (shard, "-00002-of-00002.safetensors is missing"),
    (disagree, "unet/config.json is damaged"),
    (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet/ has no weights in safetensors"),
    (lambda f: shutil.rmtree(f / "scheduler"), "the folder scheduler is missing"),
    (lambda f: os.symlink("/etc/hostname", f / "LICENSE"), "LICENSE is a link"),
    (lambda f: os.symlink("/etc", f / "text_encoder"), "text_encoder is a link"),
    (lambda f: os.mkfifo(f / "LICENSE"), "is not a regular file"),
    (write("model_index.json", "{"), "is not JSON"),
    (index(_class_name="NobodysPipeline"), "neither of diffusers nor of this package"),
    (index(_class_name=["pipeline", "My"]), "neither of diffusers nor of this package"),
    (index(scheduler=["diffusers_ext.schedulers.scheduling_ghvb", "GHVBScheduler"]), "stock diffusers does not load"),
    (index(scheduler=["somebody", "Scheduler"]), "stock diffusers does not load"),
]
SPACE_PROBLEMS: list[tuple[Callable[[Path], object], str]] = [
    (write("README.md", SPACE.replace("title: T\n", "")), "has no title"),
    (write("README.md", SPACE.replace("gradio\n", "docker\n", 1)), "is not gradio"),
    (write("README.md", SPACE.replace("6.31.0", "5.49.1")), "below 6.25.0"),
    (write("README.md", SPACE.replace("sdk_version: 6.31.0\n", "")), "below 6.25.0"),
    (write("README.md", SPACE.replace("license: apache-2.0\n", "")), "license: None"),
    (write("app.py", "def"), "app.py is not Python"),
    (write("model.safetensors", "x"), "model.safetensors does not belong"),
    (lambda f: (f / "app.py").unlink(), "app_file: app.py"),
    (lambda f: (f / "requirements.txt").unlink(), "requirements.txt is missing"),
]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/README.md")))
def test_every_folder_of_this_checkout_can_be_published(name: str) -> None:
    checked = check_publishable(ROOT / "pipelines" / name)
    assert checked.total == sum((ROOT / "pipelines" / name / file).stat().st_size for file in checked.sizes)


def test_a_sound_folder_is_listed_without_what_python_left_in_it(folder: Path) -> None:
    write("__pycache__/x.pyc", "x")(folder)
    checked = check_publishable(folder)
    assert checked.kind == "pipeline" and not checked.remarks
    assert sorted(checked.sizes) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(("change", "words"), PROBLEMS, ids=[words for _, words in PROBLEMS])
def test_what_is_wrong_is_named(folder: Path, change: Callable[[Path], object], words: str) -> None:
    change(folder)
    with pytest.raises(UnpublishableError) as caught:
        check_publishable(folder)
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("change", "words"), SPACE_PROBLEMS, ids=[words for _, words in SPACE_PROBLEMS])
def test_what_is_wrong_with_a_space_is_named(space: Path, change: Callable[[Path], object], words: str) -> None:
    assert check_publishable(space, space=True).kind == "space"
    change(space)
    with pytest.raises(UnpublishableError) as caught:
        check_publishable(space, space=True)
    assert words in str(caught.value), str(caught.value)


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    write("README.md", "x")(folder)
    write("unet/model.bin", "x")(folder)
    truncate(folder)
    with pytest.raises(UnpublishableError) as caught:
        check_publishable(folder)
    assert len(caught.value.problems) == 3


def test_a_shim_of_one_line_is_accepted_and_one_with_code_refused(tmp_path: Path) -> None:
    write("README.md", CARD)(tmp_path)
    write("pipeline.py", '"""Edits."""\n\nfrom diffusers_ext import GuideAndRescalePipeline  # noqa: F401\n')(tmp_path)
    assert check_publishable(tmp_path).kind == "shim"
    for code in (
        "import os\n",
        "from diffusers_ext import GuideAndRescalePipeline\nprint()\n",
        "from x import y\n",
        "(",
    ):
        write("pipeline.py", code)(tmp_path)
        with pytest.raises(UnpublishableError, match="pipeline.py is"):
            check_publishable(tmp_path)


def test_a_model_that_asks_for_code_of_its_repository_is_refused(tmp_path: Path) -> None:
    write("README.md", CARD)(tmp_path)
    write("config.json", '{"_class_name": "UNet2DModel", "auto_map": {"AutoModel": "my.Model"}}')(tmp_path)
    save_file({"weight": np.ones(4, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnpublishableError, match="asks for code"):
        check_publishable(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ('{"_class_name": "LCMScheduler"}', None),
        ('{"_class_name": "UNet2DModel"}', "is not the name of a class"),
        ("{", "scheduler/scheduler_config.json is damaged: it is not JSON"),
    ],
    ids=["sound", "no scheduler", "no JSON"],
)
def test_a_network_may_say_what_samples_it(tmp_path: Path, scheduler: str, said: str | None) -> None:
    write("README.md", CARD)(tmp_path)
    write("config.json", '{"_class_name": "UNet2DModel"}')(tmp_path)
    write("scheduler/scheduler_config.json", scheduler)(tmp_path)
    save_file({"weight": np.ones(4, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    if said is None:
        assert "scheduler/scheduler_config.json" in check_publishable(tmp_path).sizes
        return
    with pytest.raises(UnpublishableError, match=said):
        check_publishable(tmp_path)


def test_a_link_out_of_the_folder_is_a_remark(folder: Path) -> None:
    write(
        "README.md", CARD + "See [there](../../docs/index.md) and [home](https://huggingface.co) and [here](#tiny)."
    )(folder)
    assert len(check_publishable(folder).remarks) == 1


def test_what_is_no_folder_or_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        check_publishable(tmp_path / "nothing")
    with pytest.raises(UnpublishableError, match="none of model_index.json"):
        check_publishable(tmp_path)
    write("app.py", "x = 1")(tmp_path)
    with pytest.raises(UnpublishableError, match="with --space"):
        check_publishable(tmp_path)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "", "a/b c", "a/--b", "a/.git", 3, None])
def test_a_name_that_is_no_hub_id_is_refused(repo_id: object) -> None:
    with pytest.raises(ValueError, match="is not a Hub id"):
        check_repo_id(repo_id)
    assert check_repo_id("owner/name") == "owner/name"

"""Publishing folders to the loopback Hub, with interruptions, and loading what was published in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from diffusers_ext.cli import main
from diffusers_ext.schedulers import GHVBScheduler
from tests.helpers.fresh_process import ROOT, run_fresh

from .loopback import TOKEN, LoopbackHub
from .test_push_and_load import results


DEMO = ROOT / "pipelines" / "emoji-scenes-64"
CARD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# A scheduler\n\nWhat it is.\n"
SHIM = "from diffusers_ext import GuideAndRescalePipeline  # noqa: F401\n"
PUBLISH = "import sys; from diffusers_ext.cli import main; sys.exit(main(sys.argv[1:]))"
LOAD_STOCK = """
attempt("stock", lambda: paint(DiffusionPipeline.from_pretrained("user/demo")))
attempt("ours_imported", lambda: "diffusers_ext" in sys.modules)
"""
LOAD_OURS = """
from diffusers_ext import GuideAndRescalePipeline, MRRestorationPipeline, RollingLadderPipeline
from diffusers_ext.models import AttributeJudge
from diffusers_ext.schedulers import GHVBScheduler

def name(value):
    return type(value).__name__

attempt("ours", lambda: name(GuideAndRescalePipeline.from_pretrained("user/demo")))
attempt("shim", lambda: name(DiffusionPipeline.from_pretrained(
    "user/demo", custom_pipeline="user/shim", trust_remote_code=True)))
attempt("scheduler", lambda: name(GHVBScheduler.from_pretrained("user/demo", subfolder="scheduler")))
attempt("own_scheduler", lambda: GHVBScheduler.from_pretrained("user/ghvb").config.damping)
attempt("restoration", lambda: name(MRRestorationPipeline.from_pretrained("user/restoration")))
attempt("rolling", lambda: name(RollingLadderPipeline.from_pretrained("user/rolling")))
attempt("judge", lambda: name(AttributeJudge.from_pretrained("user/judge")))
"""


class Command:
    """The command in this process, against the loopback Hub."""

    def __init__(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.hub, self.monkeypatch, self.capsys = hub, monkeypatch, capsys

    def __call__(self, folder: Path, repo: str, *more: str, token: str = TOKEN) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.hub.use_here(self.monkeypatch, token)
        self.capsys.readouterr()
        code = main(["publish", str(folder), "--repo-id", repo, *more])
        return code, *self.capsys.readouterr()


@pytest.fixture
def publish(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(loopback_hub, monkeypatch, capsys)


def sent(hub: LoopbackHub, repo: str, kind: str = "models") -> dict[str, bytes]:
    return hub.store.files(kind, repo)


def held(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A scheduler repository: the smallest that can be published."""
    folder = tmp_path / "ghvb"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    GHVBScheduler(damping=0.8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(loopback_hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> LoopbackHub:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "README.md").write_text(CARD)
    (folder / "pipeline.py").write_text(SHIM)
    scheduler = tmp_path_factory.mktemp("ghvb")
    (scheduler / "README.md").write_text(CARD)
    run_fresh(
        f"from diffusers_ext import GHVBScheduler; GHVBScheduler(damping=0.8).save_pretrained({str(scheduler)!r})"
    )
    pipelines = ROOT / "pipelines"
    folders = {
        "user/demo": DEMO,
        "user/shim": folder,
        "user/ghvb": scheduler,
        "user/restoration": pipelines / "mr-restoration",
        "user/rolling": pipelines / "rolling-motion",
        "user/judge": pipelines / "emoji-scenes-judge",
    }
    code = "from diffusers_ext.publishing import publish\n"
    code += "".join(f"print({repo!r}, publish({str(path)!r}, {repo!r}).url)\n" for repo, path in folders.items())
    lines = run_fresh(code, env=loopback_hub.client_environment()).stdout.splitlines()
    assert lines == [f"{repo} {loopback_hub.url}/{repo}" for repo in folders]
    return loopback_hub


@pytest.fixture(scope="module")
def ours(published: LoopbackHub) -> dict[str, Any]:
    return results(published, LOAD_OURS, "diffusers_ext")


def test_the_repository_holds_the_folder_bit_for_bit(published: LoopbackHub) -> None:
    assert sent(published, "user/demo") == held(DEMO)


def test_stock_diffusers_paints_with_it_and_never_imports_this_package(published: LoopbackHub) -> None:
    found = results(published, LOAD_STOCK, "diffusers")
    assert len(found["stock"]) == 64 and found["ours_imported"] is False


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("ours", "GuideAndRescalePipeline"),
        ("shim", "GuideAndRescalePipeline"),
        ("scheduler", "GHVBScheduler"),
        ("own_scheduler", 0.8),
        ("restoration", "MRRestorationPipeline"),
        ("rolling", "RollingLadderPipeline"),
        ("judge", "AttributeJudge"),
    ],
)
def test_each_form_of_loading_works_in_a_fresh_process(ours: dict[str, Any], form: str, expected: Any) -> None:
    assert ours[form] == expected


def test_an_upload_that_is_killed_leaves_nothing_and_the_next_one_is_complete(
    loopback_hub: LoopbackHub, publish: Command, small: Path
) -> None:
    command = [sys.executable, "-c", PUBLISH, "publish", str(small), "--repo-id", "user/killed"]
    environment = {**os.environ, **loopback_hub.client_environment()}
    with loopback_hub.breaking("/commit/") as reached:
        client = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
        hung = reached.wait(120)
        client.kill()
        _, errors = client.communicate(timeout=30)
        assert hung, errors.decode()
    assert sent(loopback_hub, "user/killed") == {}
    assert publish(small, "user/killed")[0] == 0
    assert sent(loopback_hub, "user/killed") == held(small)


def test_a_broken_connection_is_one_sentence_and_the_old_state_stays(
    loopback_hub: LoopbackHub, publish: Command, small: Path
) -> None:
    assert publish(small, "user/broken")[0] == 0
    before = sent(loopback_hub, "user/broken")
    (small / "README.md").write_text(CARD + "\nMore.\n")
    with loopback_hub.breaking("/commit/"):
        loopback_hub.cut()
        code, _, errors = publish(small, "user/broken")
    assert code == 2 and len(errors.splitlines()) == 1, errors
    assert "broke off (its files are as they were)" in errors
    assert sent(loopback_hub, "user/broken") == before
    assert publish(small, "user/broken")[0] == 0
    assert sent(loopback_hub, "user/broken") == held(small)


def test_publishing_again_without_a_change_makes_no_commit(
    loopback_hub: LoopbackHub, publish: Command, small: Path
) -> None:
    _, first, _ = publish(small, "user/twice")
    commits = len(loopback_hub.messages)
    _, second, errors = publish(small, "user/twice")
    assert "published at" in first and "unchanged at" in second, errors
    assert first.split()[-1] == second.split()[-1]
    assert len(loopback_hub.messages) == commits


def test_files_of_others_are_removed_only_when_asked(loopback_hub: LoopbackHub, publish: Command, small: Path) -> None:
    assert publish(small, "user/shared")[0] == 0
    loopback_hub.store.commit("models", "user/shared", {"old.safetensors": b"x"})
    code, _, errors = publish(small, "user/shared")
    assert code == 2 and "old.safetensors" in errors and "--prune" in errors
    assert "old.safetensors" in sent(loopback_hub, "user/shared")
    assert publish(small, "user/shared", "--prune")[0] == 0
    assert sent(loopback_hub, "user/shared") == held(small)


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(
    loopback_hub: LoopbackHub, publish: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish(small, "user/moving")[0] == 0
    (small / "README.md").write_text(CARD + "\nMore.\n")
    create_commit = HfApi.create_commit

    def after_another(*args: Any, **kwargs: Any) -> Any:
        loopback_hub.store.commit("models", "user/moving", {"README.md": b"theirs"})
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", after_another)
    code, _, errors = publish(small, "user/moving")
    assert code == 2 and "changed by somebody else" in errors, errors
    assert sent(loopback_hub, "user/moving")["README.md"] == b"theirs"


def test_a_dry_run_lists_the_files_and_sends_nothing(loopback_hub: LoopbackHub, publish: Command, small: Path) -> None:
    asked = len(loopback_hub.requests)
    code, printed, errors = publish(small, "user/dry", "--dry-run")
    assert code == 0, errors
    assert "scheduler_config.json" in printed and "nothing was sent" in printed
    assert len(loopback_hub.requests) == asked


def test_without_a_right_to_write_the_cure_is_named(publish: Command, small: Path) -> None:
    code, _, errors = publish(small, "user/locked", token="hf_wrong")
    assert code == 2 and "hf auth login" in errors, errors


def test_a_space_is_published_as_a_space(loopback_hub: LoopbackHub, publish: Command, tmp_path: Path) -> None:
    front = {"title": "Edit", "sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py", "license": "apache-2.0"}
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items())
    (tmp_path / "README.md").write_text(f"---\n{text}---\n\nEdits pictures.\n")
    (tmp_path / "app.py").write_text("import gradio\n")
    (tmp_path / "requirements.txt").write_text("gradio\n")
    code, printed, errors = publish(tmp_path, "user/edit-space", "--space")
    assert code == 0, errors
    assert printed.startswith(f"{loopback_hub.url}/spaces/user/edit-space")
    assert set(sent(loopback_hub, "user/edit-space", "spaces")) == {"README.md", "app.py", "requirements.txt"}


def test_a_folder_that_is_not_fit_never_reaches_the_hub(
    loopback_hub: LoopbackHub, publish: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    asked = len(loopback_hub.requests)
    code, _, errors = publish(folder, "user/unfit")
    assert code == 2 and "may be a pickle" in errors
    assert len(loopback_hub.requests) == asked


def test_links_of_the_card_lead_to_the_project_if_its_address_is_given(
    loopback_hub: LoopbackHub, publish: Command, small: Path, tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()
    card = CARD + "\nSee [the page](../docs/page.md).\n"
    (small / "README.md").write_text(card)
    code, _, errors = publish(small, "user/linked")
    assert code == 0 and "the link ../docs/page.md of README.md leads out of the folder" in errors
    assert sent(loopback_hub, "user/linked")["README.md"].decode() == card
    url = "https://example.org/me/project/blob/main"
    code, said, errors = publish(small, "user/linked", "--source-url", url)
    assert code == 0 and "published at" in said and "remark" not in errors
    assert sent(loopback_hub, "user/linked")["README.md"].decode() == card.replace("../docs", f"{url}/docs")
    assert (small / "README.md").read_text() == card
    assert "unchanged at" in publish(small, "user/linked", "--source-url", url)[1]
    code, _, errors = publish(small, "user/linked", "--dry-run", "--source-url", "example")
    assert code == 2 and "source_url='example' is no address" in errors

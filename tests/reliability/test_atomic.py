"""Saves that are whole or not there, and that touch nothing which is not theirs."""

import os
from pathlib import Path

import pytest

from diffusers_ext.atomic import _COMMITTED, _remove_own, _temporary_name, finish_update, has_update
from diffusers_ext.integrity import atomic_folder, atomic_update, atomic_write, remove_with_update, write_manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str = "new") -> None:
    (folder / "part").mkdir()
    (folder / "part" / "weights").write_text(text)
    (folder / "index").write_text(text)


def test_a_new_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "runs" / "one") as folder:
        fill(folder)
        assert not (tmp_path / "runs" / "one").exists()
    assert contents(tmp_path) == {"runs/one/part/weights": b"new", "runs/one/index": b"new"}


def test_an_error_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        with atomic_folder(tmp_path / "one") as folder:
            fill(folder)
            raise KeyError("anything")
    assert list(tmp_path.iterdir()) == []


def protected_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    working, home, checkout = tmp_path / "a" / "working", tmp_path / "b" / "home", tmp_path / "c"
    for folder in (working, home, checkout / ".git"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(home))
    return {
        "the working folder": working, "above the working folder": working.parent, "the home folder": home,
        "above it": home.parent, "a git checkout": checkout,
    }  # fmt: skip


@pytest.mark.parametrize("save", [atomic_folder, atomic_update])
def test_places_that_belong_to_someone_else_are_refused_and_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save
) -> None:
    places = protected_places(tmp_path, monkeypatch)
    for place in places.values():
        (place / "precious").write_text("keep")
    before = contents(tmp_path)
    for what, place in places.items():
        with pytest.raises(ValueError, match=f"{what}.*give a folder of its own"):
            with save(place) as folder:
                fill(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("save", [atomic_folder, atomic_update])
@pytest.mark.parametrize("path", ["", ".", "..", "x/.."])
def test_a_path_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save, path: str) -> None:
    monkeypatch.chdir(protected_places(tmp_path, monkeypatch)["the working folder"])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="cannot name a file or folder"):
        with save(path) as folder:
            fill(folder)
    assert contents(tmp_path) == before


def test_a_folder_with_files_of_others_is_refused_and_untouched(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(OSError, match="thesis.tex is not of an earlier save; give a new name"):
        with atomic_folder(target) as folder:
            fill(folder)
    assert contents(tmp_path) == {"mine/thesis.tex": b"years of work"}


def test_one_file_more_than_the_manifest_lists_makes_a_folder_foreign(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    with atomic_folder(target) as folder:
        fill(folder)
        write_manifest(folder)
    (target / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="notes.txt"):
        with atomic_folder(target) as folder:
            fill(folder, "newer")
    assert contents(tmp_path) == before


def test_a_folder_of_an_earlier_save_is_replaced_file_by_file_in_place(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    with atomic_folder(target) as folder:
        fill(folder)
        (folder / "old").write_text("old")
        write_manifest(folder)
    identity = target.stat().st_ino
    with atomic_folder(target) as folder:
        fill(folder, "newer")
        write_manifest(folder)
    assert target.stat().st_ino == identity
    assert set(contents(target)) == {"part/weights", "index", "manifest.sha256.json"}
    assert (target / "index").read_text() == "newer"


def test_an_update_keeps_files_that_only_the_old_folder_has(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "README.md").write_text("card")
    (target / "stale").write_text("stale")
    (target / "index").write_text("old")
    with atomic_update(target, last=["index"]) as folder:
        fill(folder)
        remove_with_update(folder, ["stale"])
    assert contents(target) == {"README.md": b"card", "index": b"new", "part/weights": b"new"}


def test_a_failed_update_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    before = contents(tmp_path)
    with pytest.raises(KeyError):
        with atomic_update(target) as folder:
            fill(folder)
            raise KeyError("anything")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_update_that_was_killed_between_two_files_is_finished_later(tmp_path: Path, moved: int) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    update = target / _COMMITTED
    update.mkdir()
    fill(update)
    for name in ["part/weights", "index"][:moved]:
        os.replace(update / name, target / name)
    assert has_update(target)
    assert finish_update(target)
    assert contents(target) == {"part/weights": b"new", "index": b"new"}
    assert not has_update(target)


@pytest.mark.parametrize(
    "plan", ['{"remove": ["../precious"]}', '{"remove": ["/etc/hosts"]}', '{"last": [".."]}', "[", "5"]
)
def test_a_plan_that_leads_out_of_its_folder_is_refused(tmp_path: Path, plan: str) -> None:
    (tmp_path / "precious").write_text("keep")
    update = tmp_path / "model" / _COMMITTED
    update.mkdir(parents=True)
    (update / ".plan.json").write_text(plan)
    with pytest.raises(OSError, match="plan.json"):
        finish_update(tmp_path / "model")
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "model"
    target.mkdir()
    (target / "part").symlink_to(outside)
    with pytest.raises(OSError, match="leads out of"):
        with atomic_update(target) as folder:
            fill(folder)
    assert contents(outside) == {}


def test_only_folders_with_a_name_of_ours_are_ever_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match="was not made here"):
        _remove_own(tmp_path)
    assert (tmp_path / "index").exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    living = tmp_path / _temporary_name("one")
    dead = tmp_path / living.name.replace(f"-{os.getpid()}-", "-99999999-")
    other = tmp_path / dead.name.replace(".one.", ".two.")
    for folder in (living, dead, other):
        folder.mkdir()
        fill(folder)
    with atomic_folder(tmp_path / "one") as folder:
        fill(folder)
    assert living.exists() and other.exists() and not dead.exists()


def test_a_file_is_replaced_and_no_temporary_stays(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", b"one")
    atomic_write(tmp_path / "a.json", b"two")
    assert contents(tmp_path) == {"a.json": b"two"}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent/a.json cannot be saved: No such file or directory"):
        atomic_write(tmp_path / "absent" / "a.json", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder cannot be saved: Is a directory"):
        atomic_write(tmp_path / "folder", b"x")
    with pytest.raises(ValueError, match="cannot name a file"):
        atomic_write("", b"x")
    with pytest.raises(TypeError, match="path=5"):
        atomic_write(5, b"x")  # type: ignore[arg-type]

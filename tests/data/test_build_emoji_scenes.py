import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffusers_ext.data import SpriteSheet
from diffusers_ext.data.sprites import SHEETS


pytest.importorskip("resvg_py", reason="the training extra is not installed")
SCRIPTS = Path(__file__).parents[2] / "training" / "data"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = script("build_emoji_scenes")


def archive_of(icons: dict, path: Path) -> Path:
    content = json.dumps(icons).encode()
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return path


def test_a_drawing_is_rendered_where_its_view_box_puts_it(tmp_path):
    icons = {
        "width": 10,
        "height": 10,
        "aliases": {"mirror": {"parent": "left", "hFlip": True}},
        "icons": {"left": {"body": '<rect x="0" y="0" width="5" height="10" fill="#ff0000"/>'}},
    }
    drawings = builder.read_drawings(archive_of(icons, tmp_path / "a.tgz"))
    left = builder.render(drawings, "left")
    assert left.shape == (96, 96, 4)
    assert (left[:, :47] == [255, 0, 0, 255]).all() and (left[:, 49:, 3] == 0).all()
    assert np.array_equal(builder.render(drawings, "mirror"), left[:, ::-1])
    assert builder.render(drawings, "absent") is None


def test_a_damaged_archive_is_removed_and_named(tmp_path):
    vendor = builder.VENDORS["noto"]
    archive = tmp_path / "iconify-json-noto-1.2.9.tgz"
    archive.write_bytes(b"half a download")
    with pytest.raises(builder.DataError, match="expected 3e918d88.*the damaged copy was removed"):
        builder.fetch(vendor, tmp_path)
    assert not archive.exists()


def test_without_npm_the_cure_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert builder.main(["--vendor", "noto", "--cache", str(tmp_path)]) == 2
    assert "install Node.js with npm" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", builder.VENDORS)
def test_the_shipped_sheets_are_what_the_builder_makes(name):
    if shutil.which("npm") is None:
        pytest.skip("needs npm and a package registry")
    built, shipped = builder.build(name, builder.default_cache()), SpriteSheet.load(SHEETS / f"{name}.json")
    assert list(built.sprites) == list(shipped.sprites)
    assert all(np.array_equal(built.sprites[slug], shipped.sprites[slug]) for slug in built.sprites)


def test_an_image_folder_holds_what_its_metadata_says(tmp_path, capsys):
    writer = script("write_imagefolder")
    assert writer.main(["--out", str(tmp_path / "set"), "--count", "3", "--objects", "star", "apple"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "set/train/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all((tmp_path / "set/train" / row["file_name"]).is_file() for row in rows)
    assert all(row["object"] in row["text"] and row["background"] in row["text"] for row in rows)
    assert writer.main(["--out", str(tmp_path / "set"), "--count", "3"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_pairs_are_written_with_both_captions_and_the_mask(tmp_path):
    writer = script("write_imagefolder")
    arguments = ["--count", "2", "--objects", "star", "apple", "--pairs"]
    for kind in ("background", "clock"):
        assert writer.main(["--out", str(tmp_path / kind), *arguments, kind]) == 0
        rows = [json.loads(line) for line in (tmp_path / kind / "train/metadata.jsonl").read_text().splitlines()]
        for row in rows:
            assert row["source_prompt"] != row["prompt"]
            files = ("file_name", "target_file_name", "mask_file_name")
            assert all((tmp_path / kind / "train" / row[name]).is_file() for name in files)

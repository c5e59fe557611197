import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

from diffusers_ext.training.sequences import SequenceFolder


spec = importlib.util.spec_from_file_location(
    "build_daphnet", Path(__file__).parents[2] / "training" / "data" / "build_daphnet.py"
)
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with eight rows in the columns of the true one: channel c of row t is 100 c + t."""
    names = [*builder.CONDITION, *builder.FRAMES]
    rows = [",".join([f"1970-01-01 00:04:4{t}", *(str(100 * c + t) for c in range(9)), "0"]) for t in range(8)]
    content = "\n".join([",".join(["timestamp", *names, "is_anomaly"]), *rows]).encode()
    path = tmp_path / builder.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(builder.MEMBER, content)
    monkeypatch.setattr(builder, "SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_the_folder_is_what_the_training_script_reads(wheel: Path, tmp_path: Path, monkeypatch, capsys):
    command = ["build", "--out", str(tmp_path / "out"), "--wheel", str(wheel), "--train_rows", "0", "5"]
    monkeypatch.setattr(sys, "argv", [*command, "--test_rows", "5", "8"])
    builder.main()
    assert "8 rows, 3 channels of condition, 6 of frames" in capsys.readouterr().out
    data = SequenceFolder(tmp_path / "out")
    (train,), (test,) = data.segments["train"], data.segments["test"]
    assert train.condition[0].tolist() == [0, 100, 200] and train.frames[0].tolist() == [300, 400, 500, 600, 700, 800]
    assert test.frames[:, 0].tolist() == [305, 306, 307]
    assert data.frame_rate == 64.0 and data.index["licence"] == "CC BY 4.0"


def test_another_file_is_refused(wheel: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(builder, "SHA256", "0" * 64)
    with pytest.raises(builder.DataError, match="is not the known one; give the wheel of aeon==1.6.0"):
        builder.table_of(wheel)
    for bad in (tmp_path / "gone.whl", Path(__file__)):
        with pytest.raises(builder.DataError, match="does not hold aeon/datasets"):
            builder.table_of(bad)


def test_a_failed_download_ends_with_one_sentence(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "PACKAGE", "./no-such-folder")
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        builder.main()
    assert caught.value.code == 1 and "or give --wheel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Laws of CIFAR's pickles: pixels, labels and names as they are in them, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastbyol.beton import RAW, Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.cifar import META_100, ROWS, batch_10, batch_100, files_10, folder_10, pickled, pixels
from tests.support.layouts import contents, lay_out, pack

TRAINING = [f"data_batch_{number}" for number in range(1, 6)]


def images(content: list[tuple[str, int | None, bytes]]) -> np.ndarray[Any, Any]:
    """Decode samples to [N, 32, 32, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, _, data in content])


def test_the_tests_write_what_python_2_wrote() -> None:
    codes = [code.name for code, _, _ in pickletools.genops(pickled(batch_10(1)))]
    assert codes[:9] == [
        *["PROTO", "EMPTY_DICT", "BINPUT", "MARK", "SHORT_BINSTRING", "BINPUT", "SHORT_BINSTRING", "BINPUT"],
        "SHORT_BINSTRING",
    ]
    assert "BINUNICODE" not in codes
    assert "BINSTRING" in codes


def test_a_folder_is_its_training_images_in_order(tmp_path: Path) -> None:
    source = open_source(folder_10(tmp_path / "cifar-10-batches-py"))
    found = contents(source)
    assert source.count == len(found) == 5 * ROWS
    assert source.class_names is not None
    assert source.class_names[6] == "frog"
    assert source.class_counts is not None
    assert sum(source.class_counts) == source.count
    assert [label for _, label, _ in found] == [(batch + row) % 10 for batch in range(1, 6) for row in range(ROWS)]
    assert found[0][0] == "data_batch_1/frog_s_000100.png"
    drawn = np.concatenate([pixels(number) for number in range(1, 6)])
    np.testing.assert_array_equal(images(found), drawn.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert contents(source) == found


def test_a_file_is_its_own_images_and_the_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_10(tmp_path / "cifar")
    assert main(["write", str(folder), str(tmp_path / "train.beton")]) == 0
    assert f"1 test_batch (give {folder / 'test_batch'} for it)" in capsys.readouterr().out
    source = open_source(folder / "test_batch")
    assert [name for name, _, _ in contents(source)] == [f"test_batch/frog_s_{600 + row:06}.png" for row in range(ROWS)]
    assert source.class_names == open_source(folder).class_names
    command = ["write", str(folder / "test_batch"), str(tmp_path / "test.beton")]
    assert main([*command, "--classes-from", str(tmp_path / "train.beton")]) == 0
    with Reader(tmp_path / "test.beton") as reader:
        assert set(reader.modes.tolist()) == {RAW}
        assert reader.labels is not None
        assert reader.labels.tolist() == [(6 + row) % 10 for row in range(ROWS)]
        stored = np.frombuffer(reader.payload(0), np.uint8).reshape(32, 32, 3)
    np.testing.assert_array_equal(stored, pixels(6)[0].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_archive_holds_what_the_folder_holds(tmp_path: Path, mode: str) -> None:
    files = files_10()
    order = ["data_batch_4", "readme.html", "test_batch", "data_batch_3", "batches.meta", "data_batch_2"]
    order += ["data_batch_5", "data_batch_1"]
    path = pack(tmp_path / "cifar.tar.gz", {f"cifar-10-batches-py/{name}": files[name] for name in order}, mode=mode)
    archive, folder = open_source(path), open_source(lay_out(tmp_path / "folder", files))
    assert (archive.class_names, archive.class_counts) == (folder.class_names, folder.class_counts)
    assert sorted(contents(archive)) == sorted(contents(folder))
    assert archive.ignored == {"test_batch (unpack and give it)": 1, ".html": 1}


def test_both_kinds_of_labels_of_cifar_100(tmp_path: Path) -> None:
    files = {"train": batch_100(1), "test": batch_100(2), "meta": META_100}
    folder = lay_out(tmp_path, {name: pickled(content) for name, content in files.items()})
    fine, coarse = open_source(folder), open_source(folder, label_column="coarse_labels")
    assert (fine.class_names, fine.class_counts) == (["apple", "fish", "baby"], [1, 2, 1])
    assert (coarse.class_names, coarse.class_counts) == (["fruit", "animals"], [1, 3])
    assert [label for _, label, _ in contents(open_source(folder / "test"))] == [0, 1, 2, 1]
    with pytest.raises(SourceError, match="no labels 'labels'; give fine_labels or coarse_labels"):
        open_source(folder, label_column="labels")


def test_class_names_are_needed_for_labels_alone(tmp_path: Path) -> None:
    folder = folder_10(tmp_path)
    (folder / "batches.meta").unlink()
    for path in (folder, folder / "test_batch"):
        with pytest.raises(SourceError, match=r"batches\.meta: no label_names in it, or it is not there"):
            open_source(path)
        assert {label for _, label, _ in contents(open_source(path, labels="none"))} == {None}
    with pytest.raises(SourceError, match="--labels top is given, which CIFAR has no use for"):
        open_source(folder, labels="top")


def test_new_class_names_are_a_new_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cache = folder_10(tmp_path / "cifar"), lay_out(tmp_path / "cache", {"x": b""})
    said = []
    for names in ([b"a"] * 10, [b"bc"] * 10):
        lay_out(folder, {"batches.meta": pickled({b"label_names": names})})
        for _ in range(2):
            assert main(["write", str(folder / "test_batch"), str(cache)]) == 0
            said.append("unchanged" in capsys.readouterr().out)
    assert said == [False, True, False, True]


class _Calling:
    """What calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """Return pickles that do harm, and what is said of them."""
    touch = f"touch {tmp_path / 'ran'}"
    good = pickled(batch_10(1))
    return {
        "system": (pickle.dumps(_Calling(os.system, touch), protocol=2), r"names posix\.system"),
        "eval": (pickle.dumps(_Calling(eval, "1"), protocol=2), r"names __builtin__\.eval"),
        "inside": (pickle.dumps({b"data": _Calling(os.system, touch)}, protocol=2), r"names _codecs\.encode"),
        "instance": (b"\x80\x02(S'x'\niposix\nsystem\n.", r"names posix\.system"),
        "numpy's own": (b"\x80\x02cnumpy\nload\n.", r"names numpy\.load"),
        "attribute of the stand-in": (b"\x80\x02cnumpy\nndarray\n}U\x0b__setstate__K\x01sb.", "no pickle of CIFAR"),
        "persistent": (b"\x80\x02U\x01xQ.", "no pickle of CIFAR"),
        "memo of 32 GiB": (b"\x80\x02Nr\xff\xff\xff\x7f.", "its object has the number 2147483647"),
        "long string": (b"\x80\x02T\xff\xff\xff\x7fx.", "no pickle of CIFAR"),
        "no end": (good[:-1], "no pickle of CIFAR"),
        "cut": (good[: len(good) // 2], "no pickle of CIFAR"),
        "nothing": (b"\x80\x02.", "no pickle of CIFAR"),
        "a list": (b"\x80\x02].", "holds no dictionary"),
        "tuples in tuples": (b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.", "too many tuples"),
        "deep": (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "CIFAR"),
    }


@pytest.mark.parametrize("case", hostile(Path()))
def test_a_pickle_runs_nothing(tmp_path: Path, case: str) -> None:
    data, message = hostile(tmp_path)[case]
    lay_out(folder_10(tmp_path / "cifar"), {"test_batch": data, "data_batch_1": data})
    for path in (tmp_path / "cifar", tmp_path / "cifar/test_batch"):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(path)
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "label above": ({"labels": [0, 1, 2, 10]}, "label of an image of test_batch is 10; wanted 0 to 9"),
    "label below": ({"labels": [0, 1, 2, -2]}, "label of an image of test_batch is -2; wanted 0 to 9"),
    "label of text": ({"labels": [0, 1, 2, b"x"]}, "wanted 4 labels, one an image"),
    "label of truth": ({"labels": [0, 1, 2, True]}, "wanted 4 labels"),
    "few labels": ({"labels": [0]}, "wanted 4 labels"),
    "few names": ({"filenames": [b"a.png"]}, "wanted 4 filenames"),
    "no rows": ({"data": pixels(0, 0), "labels": [], "filenames": []}, "holds no images"),
    "short rows": ({"data": pixels(0)[:, :3000].copy()}, "no rows of 3072 bytes"),
    "flat": ({"data": pixels(0).ravel()}, "no rows of 3072 bytes"),
    "floats": ({"data": pixels(0).astype(np.float32)}, "no rows of 3072 bytes"),
    "objects": ({"data": np.array([[None] * 3072] * 4)}, "no rows of 3072 bytes"),
    "no array": ({"data": b"x"}, "no rows of 3072 bytes"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_parts_that_do_not_belong_together_are_named(tmp_path: Path, case: str) -> None:
    changed, message = FAULTS[case]
    lay_out(folder_10(tmp_path), {"test_batch": pickled(batch_10(1, **changed))})
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / "test_batch")
    assert str(tmp_path / "test_batch") in str(caught.value)


def test_rows_that_claim_more_than_is_there_are_refused(tmp_path: Path) -> None:
    good = pickled(batch_10(1))
    shape = b"K" + bytes([ROWS]) + b"M" + struct.pack("<H", 3072)
    assert good.count(shape) == 1
    lay_out(folder_10(tmp_path), {"test_batch": good.replace(shape, b"J\xff\xff\xff\x7fM" + struct.pack("<H", 3072))})
    with pytest.raises(SourceError, match="no rows of 3072 bytes"):
        open_source(tmp_path / "test_batch")


def test_an_array_by_columns_is_turned(tmp_path: Path) -> None:
    lay_out(folder_10(tmp_path), {"test_batch": pickled(batch_10(1, data=np.asfortranarray(pixels(6))))})
    whole = images(contents(open_source(tmp_path / "test_batch")))
    np.testing.assert_array_equal(whole, pixels(6).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    folder = folder_10(tmp_path / "cifar")
    (folder / "data_batch_3").unlink()
    with pytest.raises(SourceError, match="holds no data_batch_3; download it again"):
        open_source(folder)
    with pytest.raises(SourceError, match="a pickle without images of CIFAR; give their folder"):
        open_source(folder / "batches.meta")

"""Laws of arrow files and of what datasets saves: read as the same parquet is, whole or not at all."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import files_of, open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.layouts import contents, draw, lay_out

ROOT = Path(__file__).parents[2]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
STATE = {"_data_files": [], "_fingerprint": "0", "_format_type": None, "_split": "train"}


def table(*labels: int, path: str | None = None, is_noted: bool = True) -> pa.Table:
    """Make a table as datasets does: images of bytes that name the row, or one path for all."""
    rows = [{"bytes": None if path else b"%d" % row, "path": path or f"{row}.png"} for row in range(len(labels))]
    made = pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(labels, pa.int64())})
    noted = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return made.replace_schema_metadata(noted if is_noted else None)


def save(path: Path, content: pa.Table, *, has_index: bool = False, rows: int = 2, packing: str | None = None) -> Path:
    """Write a table in batches of so many rows, as a stream or a file with an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=packing)
    with (pa.ipc.new_file if has_index else pa.ipc.new_stream)(str(path), content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=rows)
    return path


def save_to_disk(folder: Path, *tables: pa.Table, **state: Any) -> Path:
    """Lay out the folder that datasets' save_to_disk writes."""
    names = [f"data-{number:05}-of-{len(tables):05}.arrow" for number in range(len(tables))]
    for name, content in zip(names, tables, strict=True):
        save(folder / name, content)
    facts = STATE | {"_data_files": [{"filename": name} for name in names]} | state
    return lay_out(
        folder,
        {"state.json": json.dumps(facts).encode(), "dataset_info.json": json.dumps({"features": FEATURES}).encode()},
    )


@pytest.mark.parametrize("packing", [None, "zstd", "lz4"])
@pytest.mark.parametrize("has_index", [False, True], ids=["stream", "index"])
def test_an_arrow_file_holds_what_the_same_parquet_does(tmp_path: Path, has_index: bool, packing: str | None) -> None:
    content = table(1, 0, 1, 1, 0)
    path = save(tmp_path / "t.arrow", content, has_index=has_index, packing=packing)
    pq.write_table(content, tmp_path / "t.parquet")
    arrow, parquet = open_source(path), open_source(tmp_path / "t.parquet")
    assert (arrow.class_names, arrow.class_counts, arrow.count) == (["cat", "dog"], [2, 3], 5)
    assert [each[1:] for each in contents(arrow)] == [each[1:] for each in contents(parquet)]
    assert contents(arrow) == contents(arrow)
    assert contents(arrow)[4] == ("t.arrow row 4", 0, b"4")


def test_a_large_batch_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path = save(tmp_path / "t.arrow", table(*[0, 1] * 50), rows=100)
    assert [(label, data) for _, label, data in contents(open_source(path))] == [
        (row % 2, b"%d" % row) for row in range(100)
    ]


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    save_to_disk(tmp_path, table(1, 1), table(0))
    save(tmp_path / "data-00000-of-00001.arrow", table(0, 0, 0))  # of an earlier save into this folder
    source = open_source(tmp_path)
    assert (source.class_names, source.class_counts) == (["cat", "dog"], [1, 2])
    assert contents(source) == [
        ("data-00000-of-00002.arrow row 0", 1, b"0"),
        ("data-00000-of-00002.arrow row 1", 1, b"1"),
        ("data-00001-of-00002.arrow row 0", 0, b"0"),
    ]


def test_class_names_are_those_noted_beside_the_files(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", table(1, 0, is_noted=False))
    save(tmp_path / "alone.arrow", table(1, 0, is_noted=False))
    assert open_source(tmp_path / "saved").class_names == ["cat", "dog"]
    assert open_source(tmp_path / "alone.arrow").class_names == ["0", "1"]
    assert open_source(tmp_path / "saved", labels="none").class_names is None


def test_a_folder_of_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    lay_out(tmp_path, {"dataset_dict.json": b'{"splits": ["train", "test"]}'})
    save_to_disk(tmp_path / "train", table(0, 1))
    save_to_disk(tmp_path / "test", table(1))
    with pytest.raises(SourceError, match=r"holds the splits train, test; give one of them, as .*/train"):
        open_source(tmp_path)
    assert open_source(tmp_path / "test").count == 1
    for name in ("imagefolder-train.arrow", "imagefolder-test.arrow"):
        save(tmp_path / "cache" / name, table(0))
    with pytest.raises(SourceError, match=r"holds the splits test, train; give one of them, as in .*-test\.arrow"):
        open_source(tmp_path / "cache")


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path: Path) -> None:
    lay_out(tmp_path, {"x/a.jpg": b"a"})
    save(tmp_path / "relative.arrow", table(0, path="x/a.jpg"))
    save(tmp_path / "absolute.arrow", table(0, path=str(tmp_path / "x/a.jpg")))
    assert contents(open_source(tmp_path / "relative.arrow")) == [("x/a.jpg", 0, b"a")]
    assert contents(open_source(tmp_path / "absolute.arrow")) == [(str(tmp_path / "x/a.jpg"), 0, b"a")]


def test_no_file_is_looked_for_where_a_file_holds_all_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a.jpg": b"a"})
    rows = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": None, "path": "a.jpg"}]
    whole = save(tmp_path / "whole.arrow", pa.table({"image": pa.array(rows[:1], IMAGE)}))
    part = save(tmp_path / "part.arrow", pa.table({"image": pa.array(rows, IMAGE)}), rows=1)
    assert list(files_of(whole)) == [whole]
    assert list(files_of(part)) == [part, tmp_path / "a.jpg", tmp_path / "a.jpg"]


def test_a_saved_data_set_of_paths_is_converted_again_when_an_image_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path, {"a.jpg": draw(0), "cache/x": b""})
    save_to_disk(tmp_path / "saved", table(0, 1, path="../a.jpg"))
    said = []
    for image in (draw(0), draw(1)):
        lay_out(tmp_path, {"a.jpg": image})
        for _ in range(2):
            assert main(["write", str(tmp_path / "saved"), str(tmp_path / "cache")]) == 0
            said.append("unchanged" in capsys.readouterr().out)
    assert said == [False, True, False, True]


@pytest.mark.parametrize("has_index", [False, True], ids=["stream", "index"])
def test_no_row_of_a_file_that_is_cut_short_is_lost_silently(tmp_path: Path, has_index: bool) -> None:
    whole = save(tmp_path / "whole.arrow", table(1, 0, 1), has_index=has_index).read_bytes()
    path = tmp_path / "cut.arrow"
    for size in range(8, len(whole), 4):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.arrow: "):
            open_source(path)
    for more in (whole, b"\0" * 8):
        path.write_bytes(whole + more)
        if not has_index or more != whole:
            with pytest.raises(SourceError, match=r"cut\.arrow: "):
                open_source(path)


def test_damaged_offsets_are_never_followed(tmp_path: Path) -> None:
    path = save(tmp_path / "t.arrow", pa.table({"image": [b"x" * 333, b"y" * 444]}))
    whole, offsets = path.read_bytes(), struct.pack("<3i", 0, 333, 777)
    assert whole.count(offsets) == 1
    for wild in ((0, 333, 1 << 30), (0, -1, 777), (0, 1 << 30, 777)):
        path.write_bytes(whole.replace(offsets, struct.pack("<3i", *wild)))
        with pytest.raises(SourceError, match=r"t\.arrow: cannot be read as arrow"):
            contents(open_source(path))


STATES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", r"state\.json: cannot be read"),
    "a list": (b"[]", r"state\.json: holds no names"),
    "no files": (b"{}", r"state\.json: lists no files"),
    "numbers": (b'{"_data_files": [1]}', r"state\.json: lists no files"),
    "outside": (b'{"_data_files": [{"filename": "../x.arrow"}]}', "does not lie beside it"),
    "absolute": (b'{"_data_files": [{"filename": "/etc/passwd"}]}', "does not lie beside it"),
    "missing": (b'{"_data_files": [{"filename": "x.arrow"}]}', r"x\.arrow: cannot be read as arrow: .*No such file"),
    "empty": (b'{"_data_files": [{"filename": "empty"}]}', "empty: empty; copy it again"),
    "not arrow": (b'{"_data_files": [{"filename": "state.json"}]}', r"state\.json: cannot be read as arrow"),
    "no rows": (b'{"_data_files": []}', "no rows in 0 arrow files"),
    "index": (b'{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}', "an index chooses its rows"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_saved_data_set_that_cannot_be_read_is_named(tmp_path: Path, case: str) -> None:
    state, message = STATES[case]
    lay_out(tmp_path, {"state.json": state, "dataset_info.json": b"{}", "empty": b""})
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(), "no rows in 1 arrow files"),
        (table(0, 5), "is 5; wanted 0 to 1"),
        (pa.table({"label": [1]}), "columns are label; wanted one of image bytes, of paths"),
    ],
    ids=["no rows", "label", "no image"],
)
def test_unusable_arrow_files_are_named(tmp_path: Path, content: pa.Table, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(save(tmp_path / "t.arrow", content))


def test_a_missing_label_column_is_named_where_it_is_noted_or_asked_for(tmp_path: Path) -> None:
    noted = save(tmp_path / "noted.arrow", table(0, 1).drop(["label"]))
    plain = save(tmp_path / "plain.arrow", table(0, 1, is_noted=False).drop(["label"]))
    assert open_source(plain).class_names is None
    assert open_source(noted, labels="none").class_names is None
    for path, label_column in ((noted, None), (plain, "label")):
        with pytest.raises(SourceError, match="no column 'label'; give one of image, or --labels none"):
            open_source(path, label_column=label_column)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", table(0))
    without = "import sys; sys.modules['pyarrow'] = None; from fastbyol.data_prep.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", without, "write", str(tmp_path / "saved"), str(tmp_path / "a.beton")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'fastbyol[parquet]'" in done.stderr
    assert done.stderr.count("\n") == 1

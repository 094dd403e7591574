"""Laws of parquet: what Hugging Face's datasets library writes is read in order, labelled as its schema says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbyol.beton import Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import files_of, open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.layouts import contents, draw, lay_out

ROOT = Path(__file__).parents[2]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CAT_DOG = {"names": ["cat", "dog"], "_type": "ClassLabel"}


def images(*data: bytes | None) -> pa.Array:
    """Make a column as the datasets library encodes images."""
    return pa.array([{"bytes": each, "path": f"/etc/{i}.jpg"} for i, each in enumerate(data)], IMAGE)


def save(path: Path, features: dict[str, Any] | None = None, *, row_group: int = 2, **columns: Any) -> Path:
    """Write one table, with the datasets library's description of its features where given."""
    table = pa.table(
        {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    )
    if features is not None:
        described = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(described)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group)
    return path


def test_struct_column_with_class_names(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": CAT_DOG}
    path = save(tmp_path / "a.parquet", features, image=images(b"a", b"b", b"c"), label=[1, 0, 1])
    source = open_source(path)
    assert (source.class_names, source.class_counts, source.count) == (["cat", "dog"], [1, 2], 3)
    expected = [("a.parquet row 0", 1, b"a"), ("a.parquet row 1", 0, b"b"), ("a.parquet row 2", 1, b"c")]
    assert contents(source) == contents(source) == expected


LABELS: dict[str, tuple[dict[str, Any], Sequence[str] | None, list[int | None]]] = {
    "none": ({}, None, [None, None]),
    "numbers": ({"label": pa.array([2, 0], pa.uint8())}, ["0", "1", "2"], [2, 0]),
    "names": ({"label": ["dog", "cat"]}, ["cat", "dog"], [1, 0]),
    "minus one": ({"label": [-1, -1]}, None, [None, None]),
    "null": ({"label": pa.array([None, None], pa.int64())}, None, [None, None]),
    "other column": ({"width": [3, 4]}, None, [None, None]),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("column", ["struct", "binary", "large binary"])
def test_labels_of_tables(tmp_path: Path, case: str, column: str) -> None:
    columns, names, labels = LABELS[case]
    kinds = {"binary": pa.binary(), "large binary": pa.large_binary()}
    data = images(b"a", b"b") if column == "struct" else pa.array([b"a", b"b"], kinds[column])
    source = open_source(save(tmp_path / "a.parquet", picture=data, **columns))
    assert source.class_names == names
    assert [(label, data) for _, label, data in contents(source)] == list(zip(labels, (b"a", b"b"), strict=True))


def test_the_only_declared_label_is_found_and_others_can_be_named(tmp_path: Path) -> None:
    fine = {"names": ["x", "y", "z"], "_type": "ClassLabel"}
    data = {"img": images(b"a", b"b"), "coarse": [1, 0], "fine": [2, 0]}
    save(tmp_path / "1.parquet", {"coarse": CAT_DOG, "fine": {"_type": "Value"}}, **data)
    assert open_source(tmp_path / "1.parquet").class_names == ["cat", "dog"]
    save(tmp_path / "2.parquet", {"coarse": CAT_DOG, "fine": fine}, **data)
    with pytest.raises(SourceError, match="label columns are coarse, fine; name one with --label-column"):
        open_source(tmp_path / "2.parquet")
    assert open_source(tmp_path / "2.parquet", label_column="fine").class_names == ["x", "y", "z"]


def test_folder_and_pattern_are_read_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        save(tmp_path / f"train-{number:05}-of-00003.parquet", image=images(bytes([number])), label=[number])
    expected = [0, 1, 2]
    for place in (tmp_path, tmp_path / "train-*.parquet", tmp_path / "train-{00000..00002}-of-00003.parquet"):
        assert [label for _, label, _ in contents(open_source(place))] == expected
    save(tmp_path / "validation-00000-of-00001.parquet", image=images(b"v"), label=[7])
    with pytest.raises(SourceError, match=r"splits train, validation; give one of them, as in '.*/train-\*\.parquet'"):
        open_source(tmp_path)


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "no image": ({"label": [1, 2]}, None, "columns are label; wanted one of image bytes"),
    "two images": ({"left": images(b"a", b"b"), "right": images(b"a", b"b")}, None, "columns are left, right"),
    "label out of names": ({"image": images(b"a"), "label": [2]}, {"label": CAT_DOG}, "is 2; wanted 0 to 1"),
    "label below": ({"image": images(b"a"), "label": [-2]}, None, "is -2; wanted 0"),
    "label of floats": ({"image": images(b"a"), "label": [1.5]}, None, "holds double; wanted whole numbers"),
    "no rows": ({"image": images()}, None, "no rows in 1 parquet files"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_unusable_tables_are_named(tmp_path: Path, case: str) -> None:
    columns, features, message = FAULTS[case]
    save(tmp_path / "a.parquet", features, **columns)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / "a.parquet")
    assert str(tmp_path) in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [images(b"a"), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="two columns are named 'label'; rename one"):
        open_source(tmp_path / "a.parquet")


def test_an_empty_name_is_no_label_and_hidden_tables_are_none(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", image=images(b"a", b"b", b"c"), label=["cat", "", "dog"])
    (tmp_path / "._a.parquet").write_bytes(b"of macOS")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [label for _, label, _ in contents(source)] == [0, None, 1]


def test_files_of_different_data_sets_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", {"label": CAT_DOG}, image=images(b"a"), label=[0])
    save(tmp_path / "b.parquet", {"label": CAT_DOG | {"names": ["dog", "cat"]}}, image=images(b"a"), label=[0])
    with pytest.raises(SourceError, match=r"b\.parquet: its columns or class names differ"):
        open_source(tmp_path)


def test_foreign_metadata_is_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(
        ('{"info": 3}', "{", "[]", '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}')
    ):
        table = pa.table({"image": images(b"a"), "label": [0]}).replace_schema_metadata({"huggingface": text})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert open_source(tmp_path / f"{number}.parquet").class_names == ["0"]


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", image=images(*[bytes([i]) * 5000 for i in range(9)]), label=list(range(9)))
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"a\.parquet: cannot be read as parquet"):
            contents(open_source(path))


def test_a_path_counts_where_there_are_no_bytes(tmp_path: Path) -> None:
    lay_out(tmp_path, {"tables/x/a.jpg": b"a", "b.jpg": b"b"})
    rows = [
        {"bytes": None, "path": "x/a.jpg"},
        {"bytes": b"c", "path": "x/a.jpg"},
        {"bytes": None, "path": str(tmp_path / "b.jpg")},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "x/\0.jpg"},
        None,
    ]
    path = save(tmp_path / "tables/t.parquet", image=pa.array(rows, IMAGE), label=[0, 1, 2, 3, 4, 5])
    assert contents(open_source(path)) == [
        ("x/a.jpg", 0, b"a"),
        ("t.parquet row 1", 1, b"c"),
        (str(tmp_path / "b.jpg"), 2, b"b"),
        ("t.parquet row 3", 3, b""),
        ("t.parquet row 4", 4, b""),
        ("t.parquet row 5", 5, b""),
    ]


@pytest.mark.parametrize("name", ["image", "img", "file_name", "filename"])
def test_a_column_of_paths_is_relative_to_the_folder_of_its_table(tmp_path: Path, name: str) -> None:
    lay_out(tmp_path, {"data/x/a.jpg": b"a", "data/b.jpg": b"b"})
    columns = {"caption": ["one", "two"], name: ["x/a.jpg", "b.jpg"], "label": ["dog", "cat"]}
    source = open_source(save(tmp_path / "data/t.parquet", **columns))
    assert contents(source) == [("x/a.jpg", 1, b"a"), ("b.jpg", 0, b"b")]


def test_missing_files_and_devices_are_bad_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a.jpg": draw(0)})
    path = save(tmp_path / "t.parquet", image=["a.jpg", "gone.jpg", "/dev/zero", "https://x.org/a.jpg"])
    assert main(["write", str(path), str(tmp_path / "t.beton")]) == 2
    assert main(["write", str(path), str(tmp_path / "t.beton"), "--on-error", "skip"]) == 0
    with Reader(tmp_path / "t.beton") as reader:
        assert reader.names() == ["a.jpg"]
    skipped = json.loads((tmp_path / "t.beton.json").read_text())["skipped"]
    assert [each["name"] for each in skipped] == ["gone.jpg", "/dev/zero", "https://x.org/a.jpg"]
    assert "No such file" in skipped[0]["reason"]
    assert "not a file" in skipped[1]["reason"]


def test_a_table_is_converted_again_when_a_file_that_it_names_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path, {"images/a.jpg": draw(0), "tables/cache/x": b""})
    path = save(tmp_path / "tables/t.parquet", image=["../images/a.jpg", "../images/b.jpg"])
    command = ["write", str(path), str(tmp_path / "tables/cache"), "--on-error", "skip"]
    said = []
    for _ in range(2):
        for _ in range(2):
            assert main(command) == 0
            said.append("unchanged" in capsys.readouterr().out)
        lay_out(tmp_path, {"images/b.jpg": draw(1)})
    assert said == [False, True, False, True]


def test_no_file_is_looked_for_where_a_table_holds_all_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a.jpg": b"a"})
    rows = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": None, "path": "a.jpg"}]
    whole = save(tmp_path / "whole.parquet", image=pa.array(rows[:1], IMAGE))
    part = save(tmp_path / "part.parquet", image=pa.array(rows, IMAGE))
    assert list(files_of(whole)) == [whole]
    assert list(files_of(part)) == [part, tmp_path / "a.jpg", tmp_path / "a.jpg"]
    uncounted = tmp_path / "uncounted.parquet"
    pq.write_table(pq.read_table(whole), uncounted, write_statistics=False)
    assert list(files_of(uncounted)) == [uncounted, tmp_path / "a.jpg"]


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    path = save(tmp_path / "t.parquet", image=images(b"a"), label=broken)
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        contents(open_source(path))


def test_files_named_after_splits_are_not_joined(tmp_path: Path) -> None:
    for name in ("train", "test"):
        save(tmp_path / f"{name}.parquet", image=images(b"a"), label=[0])
    with pytest.raises(SourceError, match=r"splits test, train; give one of them, as in .*/test\.parquet"):
        open_source(tmp_path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", image=images(b"a"))
    without = "import sys; sys.modules['pyarrow'] = None; from fastbyol.data_prep.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", without, "write", str(tmp_path / "a.parquet"), str(tmp_path / "a.beton")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'fastbyol[parquet]'" in done.stderr
    assert done.stderr.count("\n") == 1

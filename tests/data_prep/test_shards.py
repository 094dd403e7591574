"""Laws of tars of tars, WebDataset shards and patterns: every image once, under its class, in the files' order."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.pattern import expand_pattern
from fastbyol.data_prep.sources.tar import NOT_IMAGES
from tests.support.layouts import contents, lay_out, link, pack, packed

CLASSES = {
    "n02.tar": packed({"n02_7.JPEG": b"c", "n02_1.JPEG": b"d"}),
    "n01.tar": packed({"n01_3.JPEG": b"a", "notes.txt": b"", "n01_2.JPEG": b"b"}),
    "n00.tar": packed({"readme.txt": b""}),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "ILSVRC2012_img_train/"])
def test_tar_of_tars_has_a_class_an_inner_archive(tmp_path: Path, mode: str, prefix: str) -> None:
    source = open_source(pack(tmp_path / "t.tar", {prefix + name: data for name, data in CLASSES.items()}, mode=mode))
    assert (source.class_names, source.class_counts) == (["n00", "n01", "n02"], [0, 2, 2])
    assert (source.count, source.ignored) == (4, {NOT_IMAGES: 2})
    expected = [
        ("n02/n02_7.JPEG", 2, b"c"),
        ("n02/n02_1.JPEG", 2, b"d"),
        ("n01/n01_3.JPEG", 1, b"a"),
        ("n01/n01_2.JPEG", 1, b"b"),
    ]
    assert contents(source) == contents(source) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"n01.tar": packed({"../x.jpg": b"x"})}, r"n01\.tar: member '\.\./x\.jpg' points outside"),
        ({"../n01.tar": CLASSES["n01.tar"]}, "points outside"),
        (CLASSES | {"x.jpg": b""}, "image x.jpg lies beside"),
        ({"a/n01.tar": CLASSES["n01.tar"], "b/n01.tar": CLASSES["n01.tar"]}, "two inner archives have the same name"),
        ({"n00.tar": CLASSES["n00.tar"]}, "no images in its inner archives"),
        ({"n01.tar": CLASSES["n01.tar"], "n02.tar": b"no archive" * 99}, r"n02\.tar: damaged"),
        ({"n01.tar": CLASSES["n01.tar"][:1200]}, r"n01\.tar: damaged"),
    ],
    ids=["inner name outside", "outer name outside", "mixed", "one name", "no images", "no inner tar", "cut inner tar"],
)
def test_unusable_tar_of_tars_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        contents(open_source(pack(tmp_path / "t.tar", files)))


def test_inner_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    links = [link("s.jpg", str(tmp_path / "secret.jpg"), kind) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)]
    inner = packed({"a.jpg": b"a"}, links)
    source = open_source(
        pack(tmp_path / "t.tar", {"n01.tar": inner}, [link("n02.tar", "/etc/passwd", tarfile.SYMTYPE)])
    )
    assert contents(source) == [("n01/a.jpg", 0, b"a")]
    assert source.ignored.total() == 2


def shards(folder: Path, samples: list[dict[str, bytes]], *, count: int = 2) -> str:
    """Pack samples (suffix -> bytes) into `count` shards; return their pattern."""
    for shard in range(count):
        part = {
            f"{number:05}.{suffix}": data
            for number, sample in enumerate(samples)
            if number * count // len(samples) == shard
            for suffix, data in sample.items()
        }
        pack(folder / f"shard-{shard:03}.tar", part)
    return f"{folder}/shard-{{000..{count - 1:03}}}.tar"


def facts(**members: object) -> bytes:
    return json.dumps(members).encode()


WITH_LABELS = {
    "cls before": ([{"cls": b"2", "jpg": b"a"}, {"cls": b"0", "jpg": b"b"}], ["0", "1", "2"], [2, 0]),
    "cls behind": ([{"jpg": b"a", "cls": b"2\n"}, {"png": b"b", "cls": b" 0"}], ["0", "1", "2"], [2, 0]),
    "names": ([{"jpg": b"a", "cls": b"dog"}, {"jpg": b"b", "cls": b"cat"}], ["cat", "dog"], [1, 0]),
    "cls.txt": ([{"img.png": b"a", "cls.txt": b"1"}, {"img.png": b"b", "cls.txt": b"1"}], ["0", "1"], [1, 1]),
    "json": ([{"jpg": b"a", "json": facts(label=1)}, {"jpg": b"b", "json": facts(label=0)}], ["0", "1"], [1, 0]),
    "json names": (
        [{"jpg": b"a", "json": facts(label="x")}, {"jpg": b"b", "json": facts(label="y")}],
        ["x", "y"],
        [0, 1],
    ),
    "cls first": ([{"jpg": b"a", "json": facts(label=9), "cls": b"0"}, {"jpg": b"b", "cls": b"1"}], ["0", "1"], [0, 1]),
    "captions": ([{"jpg": b"a", "txt": b"a cat"}, {"jpg": b"b", "json": facts(width=3)}], None, [None, None]),
    "txt": ([{"jpg": b"a", "txt": b"1"}, {"jpg": b"b", "txt": b"0"}], ["0", "1"], [1, 0]),
    "target.cls": ([{"input.jpg": b"a", "target.cls": b"1"}, {"jpg": b"b", "target.cls": b"0"}], ["0", "1"], [1, 0]),
    "dots in names": ([{"v.1.jpg": b"a", "v.1.cls": b"x"}, {"v.2.jpg": b"b", "v.2.cls": b"y"}], ["x", "y"], [0, 1]),
    "minus one": ([{"jpg": b"a", "cls": b"-1"}, {"jpg": b"b", "cls": b"-1"}], None, [None, None]),
}


@pytest.mark.parametrize("case", WITH_LABELS)
def test_labels_of_shards(tmp_path: Path, case: str) -> None:
    samples, names, labels = WITH_LABELS[case]
    source = open_source(shards(tmp_path, samples))
    assert source.class_names == names
    assert source.class_counts == (None if names is None else [labels.count(label) for label in range(len(names))])
    assert [(label, data) for _, label, data in contents(source)] == list(zip(labels, (b"a", b"b"), strict=True))
    assert contents(source) == contents(source)


def test_a_single_shard_is_known_by_its_labels(tmp_path: Path) -> None:
    shards(tmp_path, [{"jpg": b"a", "cls": b"1"}, {"jpg": b"b", "cls": b"0"}], count=1)
    assert [label for _, label, _ in contents(open_source(tmp_path / "shard-000.tar"))] == [1, 0]
    shards(tmp_path, [{"jpg": b"a", "txt": b"a 1"}, {"jpg": b"b"}], count=1)
    assert [label for _, label, _ in contents(open_source(tmp_path / "shard-000.tar"))] == [None, None]


def test_dots_in_the_names_of_one_archive_join_no_images(tmp_path: Path) -> None:
    files = {f"img.v{i}.{suffix}": data for i in range(3) for suffix, data in (("jpg", b"%d" % i), ("cls", b"%d" % i))}
    assert contents(open_source(pack(tmp_path / "t.tar", files))) == [(f"img.v{i}.jpg", i, b"%d" % i) for i in range(3)]


def test_labels_behind_all_images_end_the_command(tmp_path: Path) -> None:
    images, labels = ({f"{i:03}.{suffix}": b"1" for i in range(300)} for suffix in ("jpg", "cls"))
    path = pack(tmp_path / "t.tar", images | labels)
    with pytest.raises(SourceError, match="labels such as 1 do not lie beside their images"):
        open_source(path)
    assert open_source(path, labels="none").count == 300


def test_one_of_several_images_of_a_sample_is_chosen_or_all_are_taken(tmp_path: Path) -> None:
    pattern = shards(tmp_path, [{"left.jpg": b"a", "right.png": b"b", "cls": b"0"} for _ in range(2)])
    assert [data for _, _, data in contents(open_source(pattern, image_key="right.png"))] == [b"b", b"b"]
    assert open_source(pattern, image_key=".RIGHT.png").class_counts == [2]
    assert [data for _, _, data in contents(open_source(pattern, labels="none"))] == [b"a", b"b"] * 2
    with pytest.raises(SourceError, match=r"no images with the suffix \.up\.jpg"):
        open_source(pattern, image_key="up.jpg")


def test_the_label_may_lie_in_a_file_of_any_suffix(tmp_path: Path) -> None:
    pattern = shards(tmp_path, [{"jpg": b"a", "class_id": b"7"}, {"jpg": b"b", "class_id": b"0"}])
    for asked in ("class_id", ".CLASS_ID"):
        assert [label for _, label, _ in contents(open_source(pattern, label_column=asked))] == [7, 0]


def test_a_folder_of_shards_with_tables_about_them_is_shards(tmp_path: Path) -> None:
    shards(tmp_path, [{"jpg": b"a", "json": b"{}", "txt": b"a cat"}, {"jpg": b"b", "json": b"{}"}])
    for number in range(2):
        (tmp_path / f"shard-00{number}.parquet").write_bytes(b"PAR1")
    source = open_source(tmp_path)
    assert [data for _, _, data in contents(source)] == [b"a", b"b"]
    assert source.ignored == {".txt": 1}


def test_captions_beside_images_leave_the_classes_of_an_archive(tmp_path: Path) -> None:
    files = {"cat/a.jpg": b"a", "cat/a.json": b"{}", "dog/b.jpg": b"b", "dog/b.json": b"{}"}
    source = open_source(pack(tmp_path / "t.tar", files))
    assert source.class_names == ["cat", "dog"]
    assert contents(source) == [("cat/a.jpg", 0, b"a"), ("dog/b.jpg", 1, b"b")]


def test_label_column_names_the_json_key(tmp_path: Path) -> None:
    samples = [{"jpg": b"a", "cls": b"0", "json": facts(coarse=i, label=i + 1)} for i in range(2)]
    pattern = shards(tmp_path, samples)
    assert [label for _, label, _ in contents(open_source(pattern))] == [0, 0]
    assert [label for _, label, _ in contents(open_source(pattern, label_column="coarse"))] == [0, 1]
    assert [label for _, label, _ in contents(open_source(pattern, label_column="cls"))] == [0, 0]
    with pytest.raises(SourceError, match=r"no \.json has a key 'no such key', and no file has that suffix"):
        open_source(pattern, label_column="no such key")


def test_keys_and_what_is_passed_over(tmp_path: Path) -> None:
    files = {
        "a/1.jpg": b"a1",  # the same name in another folder is another sample
        "a/1.txt": b"",
        "b/1.jpg": b"b1",
        "b/2.json": b"{}",  # a sample without an image
        "b/.3.jpg": b"hidden",
    }
    links = [link("b/4.jpg", "/etc/hostname", tarfile.SYMTYPE), link("b/1.cls", "/etc/hostname", tarfile.SYMTYPE)]
    source = open_source(str(pack(tmp_path / "s.tar", files, links)).replace("s.tar", "{s,s}.tar"))
    assert contents(source) == [("a/1.jpg", None, b"a1"), ("b/1.jpg", None, b"b1")] * 2
    assert (source.class_names, source.ignored.total()) == (None, 10)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"jpg": b"a", "cls": b"1"}, {"jpg": b"b"}, {"cls": b"0"}], "labels such as 0 do not lie beside"),
        (
            [{"jpg": b"a", "cls": b"1"}, {"jpg": b"b", "cls": b"cat"}],
            "00000.jpg has a number as label, 00001.jpg a name",
        ),
        ([{"jpg": b"a", "cls": b"-3"}, {"jpg": b"b"}], "label of 00000.jpg is -3; wanted 0"),
        ([{"jpg": b"a", "cls": b"99999999999"}, {"jpg": b"b"}], "wanted 0 to"),
        ([{"jpg": b"a", "cls": b"\xff"}, {"jpg": b"b"}], "00000.cls is not text"),
        ([{"jpg": b"a", "json": facts(label=[1, 2])}, {"jpg": b"b"}], r"is \[1, 2\]; wanted a whole number or a name"),
        ([{"jpg": b"a", "json": facts(label=True)}, {"jpg": b"b"}], "is True; wanted a whole number or a name"),
        ([{"jpg": b"a", "json": b"{"}, {"jpg": b"b"}], "00000.json is not JSON"),
        ([{"jpg": b"a", "json": b"[" * 100_000}, {"jpg": b"b"}], "00000.json is not JSON"),
        ([{"jpg": b"a", "json": b" " * (1 << 21)}, {"jpg": b"b"}], "a label file may have up to"),
        (
            [{"left.jpg": b"a", "right.jpg": b"b"}, {"jpg": b"b"}],
            "00000.left.jpg and 00000.right.jpg have one key.*--image-key left.jpg",
        ),
        ([{"txt": b"a"}, {"txt": b"b"}], "no images in 2 shards"),
        ([{"jpg": b"a", "png": b"b", "json": b"{}"}], "00000.jpg and 00000.png have one key.*--image-key jpg"),
        ([{"jpg": b"a", "txt": b"2017"}, {"jpg": b"b", "txt": b"a cat"}], "the .txt of 00001.jpg is no number"),
        ([{"jpg": b"a"}, {"cls": b"1"}], "labels such as 1 do not lie beside their images"),
        ([{"jpg": b"a", "a.cls": b"1", "b.cls": b"2"}, {"jpg": b"b"}], "labels in a.cls and b.cls; name one"),
    ],
)
def test_unusable_shards_are_named(tmp_path: Path, samples: list[dict[str, bytes]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(shards(tmp_path, samples))


def test_cut_or_missing_shard_is_named(tmp_path: Path) -> None:
    pattern = shards(tmp_path, [{"jpg": b"a" * 3000} for _ in range(4)])
    (tmp_path / "shard-001.tar").write_bytes((tmp_path / "shard-001.tar").read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"shard-001\.tar: damaged or cut short"):
        contents(open_source(pattern))
    (tmp_path / "shard-001.tar").unlink()
    with pytest.raises(SourceError, match=r"shard-001\.tar does not exist"):
        open_source(pattern)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("s-{9..11}.tar", ["s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{002..000}.tar", ["s-002.tar", "s-001.tar", "s-000.tar"]),
        ("{b,a}-{0..1}", ["b-0", "b-1", "a-0", "a-1"]),
        ("{x,y{1..2}}", ["x", "y1", "x", "y2"]),
        ("s-?.tar", ["s-0.tar", "s-9.tar"]),
        ("{b,a}-*", ["b-0", "b-1", "a-0", "a-1"]),
        ("{abc}", []),
        ("nothing", []),
    ],
)
def test_patterns_expand_as_a_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    numbers = ["08", "09", "9", "10", "11", "002", "001", "000", "0"]
    names = [f"s-{number}.tar" for number in numbers] + ["a-0", "a-1", "b-0", "b-1", "x", "y1", "y2"]
    lay_out(tmp_path, dict.fromkeys(names, b""))
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand_pattern(pattern)] == expected


@pytest.mark.parametrize("pattern", ["{0..999999999999}.tar", "{0..2000}{0..2000}.tar", "*{0..9999999}"])
def test_endless_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(SourceError, match="matches more than"):
        expand_pattern(pattern)


def test_a_pattern_may_be_longer_than_a_name(tmp_path: Path) -> None:
    names = [f"shard-{number:04}" for number in range(40)]
    for name in names:
        pack(tmp_path / f"{name}.tar", {f"{name}.jpg": b"x"})
    source = open_source(tmp_path / f"{{{','.join(names)}}}.tar")
    assert [sample.name for sample in source] == [f"{name}.jpg" for name in names]


def test_a_file_with_braces_in_its_name_is_itself(tmp_path: Path) -> None:
    path = pack(tmp_path / "s{0..1}.tar", {"a.jpg": b"a"})
    assert contents(open_source(path)) == [("a.jpg", None, b"a")]

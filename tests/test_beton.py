"""Laws of the reader, held against files that this test lays out byte by byte, without our writer."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fastbyol.beton import BetonError, Reader

PAGE = 1 << 21
IMAGE, INT = 2, 1
# What a field other than an image puts into a sample's record: struct code and alignment (FFCV format 2).
RECORD_OF_TYPE = {0: ("d", 8), 1: ("q", 8), 3: ("QQ", 1), 4: ("Q", 8), 5: ("QQ", 1), 255: ("q", 8)}


@dataclass
class Layout:
    """Lay out a file of images (mode, width, height, bytes); tests damage one claim about them before it is written."""

    fields: list[tuple[int, str]] = field(default_factory=lambda: [(IMAGE, "image"), (INT, "label")])
    images: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    version: int = 2
    page: int = PAGE
    samples: int | None = None
    table_ptr: int | None = None

    def __post_init__(self) -> None:
        """Put the images one after another into pages."""
        self.pages_ptr = -(-(24 + 1041 * len(self.fields) + 64 * len(self.images)) // PAGE) * PAGE
        at = self.pages_ptr
        self.records: list[list[int]] = []
        self.table: list[list[int]] = []
        self.places: list[int] = []
        for number, (mode, width, height, data) in enumerate(self.images):
            if at // PAGE != (at + len(data) - 1) // PAGE:
                at = -(-at // PAGE) * PAGE
            self.places.append(at)
            self.records.append([mode, width, height, at])
            self.table.append([number, at, len(data)])
            at += len(data)
        self.end = -(-at // PAGE) * PAGE

    def record(self, number: int) -> bytes:
        packed = b""
        widest = 1
        for type_id, _ in self.fields:
            if type_id == IMAGE:
                packed += struct.pack("<BHHQ", *self.records[number])
                continue
            code, alignment = RECORD_OF_TYPE[type_id]
            packed += bytes(-len(packed) % alignment) + struct.pack(f"<{code}", *[number] * len(code))
            widest = max(widest, alignment)
        return packed + bytes(-len(packed) % widest)

    def write(self, path: Path) -> Path:
        samples = len(self.images) if self.samples is None else self.samples
        table_ptr = self.end if self.table_ptr is None else self.table_ptr
        with path.open("wb") as stream:
            stream.write(struct.pack("<HHIQQ", self.version, len(self.fields), self.page, samples, table_ptr))
            for type_id, name in self.fields:
                stream.write(struct.pack("<B16s1024x", type_id, name.encode()))
            stream.writelines(self.record(number) for number in range(len(self.images)))
            for (*_, data), place in zip(self.images, self.places, strict=True):
                stream.seek(place)
                stream.write(data)
            stream.seek(self.end)
            stream.writelines(struct.pack("<QQQ", *entry) for entry in self.table)
        return path


@pytest.fixture
def layout() -> Layout:
    """Lay out twelve images, raw and JPEG mode in turn, over three pages."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(12):
        width, height = 200 + number, 300 - number
        data = rng.bytes(3 * width * height if number % 2 else 400_000 + number)
        images.append((number % 2, width, height, data))
    return Layout(images=images)


def test_reader_returns_what_the_file_holds(layout: Layout, tmp_path: Path) -> None:
    with Reader(layout.write(tmp_path / "a.beton")) as reader:
        assert len(reader) == 12
        assert [bytes(reader.payload(i)) for i in range(12)] == [data for *_, data in layout.images]
        assert reader.labels is not None
        assert reader.labels.dtype == reader.widths.dtype == reader.heights.dtype == np.int64
        assert reader.labels.tolist() == list(range(12))
        assert reader.modes.tolist() == [0, 1] * 6
        assert reader.widths.tolist() == [width for _, width, _, _ in layout.images]
        assert reader.heights.tolist() == [height for _, _, height, _ in layout.images]
        assert (reader.class_names, reader.sidecar) == (None, {})
        assert reader.path == tmp_path / "a.beton"


def test_table_order_does_not_matter(layout: Layout, tmp_path: Path) -> None:
    np.random.default_rng(1).shuffle(layout.table)
    with Reader(layout.write(tmp_path / "a.beton")) as reader:
        assert [bytes(reader.payload(i)) for i in range(12)] == [data for *_, data in layout.images]


@pytest.mark.parametrize(
    ("fields", "is_labelled"),
    [
        ([(IMAGE, "image")], False),
        ([(IMAGE, "picture"), (INT, "target")], True),
        ([(INT, "label"), (IMAGE, "image")], True),
        ([(INT, "shard"), (0, "weight"), (IMAGE, "image"), (3, "name"), (INT, "label")], True),
        ([(3, "name"), (4, "box"), (IMAGE, "image"), (5, "facts"), (0, "weight")], False),
    ],
    ids=["image only", "other names", "label first", "two ints", "unlabelled extras"],
)
def test_image_and_label_are_found_among_any_known_fields(
    layout: Layout, tmp_path: Path, fields: list[tuple[int, str]], is_labelled: bool
) -> None:
    layout.fields = fields
    with Reader(layout.write(tmp_path / "a.beton")) as reader:
        assert bytes(reader.payload(11)) == layout.images[11][3]
        assert (reader.labels is not None) == is_labelled
        if reader.labels is not None:
            assert reader.labels.tolist() == list(range(12))


def test_payload_is_not_copied_and_outlives_close(layout: Layout, tmp_path: Path) -> None:
    reader = Reader(layout.write(tmp_path / "a.beton"))
    tracemalloc.start()
    payload = reader.payload(0)
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    reader.close()
    reader.close()
    assert bytes(payload) == layout.images[0][3]
    with pytest.raises(ValueError, match="released"):
        reader.payload(0)


def swap(layout: Layout, part: str, number: int, column: int, value: int) -> None:
    getattr(layout, part)[number][column] = value


U64 = 2**64 - 1
FAULTS: dict[str, tuple[Callable[[Layout], object], str]] = {
    "foreign version": (lambda a: setattr(a, "version", 7), "version is 7"),
    "interrupted": (lambda a: setattr(a, "table_ptr", 0), "alloc_table_ptr is 0.*interrupted"),
    "table beyond the end": (lambda a: setattr(a, "table_ptr", U64), "alloc_table_ptr"),
    "page not a power of two": (lambda a: setattr(a, "page", PAGE + 1), "page_size"),
    "page too small": (lambda a: setattr(a, "page", PAGE // 2), "page_size"),
    "page of zero": (lambda a: setattr(a, "page", 0), "page_size is 0"),
    "no samples": (lambda a: setattr(a, "samples", 0), "num_samples is 0"),
    "absurd number of samples": (lambda a: setattr(a, "samples", 2**60), "num_samples"),
    "more samples than allocations": (lambda a: setattr(a, "samples", 13), "num_samples"),
    "no fields": (lambda a: a.fields.clear(), "num_fields is 0"),
    "custom field": (lambda a: a.fields.__setitem__(1, (255, "label")), "type of field 'label' is 255"),
    "no image field": (lambda a: setattr(a, "fields", [(INT, "label"), (INT, "other")]), "set of fields"),
    "two images": (lambda a: setattr(a, "fields", [(IMAGE, "left"), (IMAGE, "right")]), "'left', 'right'"),
    "two ints": (
        lambda a: setattr(a, "fields", [(IMAGE, "image"), (INT, "a"), (INT, "b\n\033[2J")]),
        r"'a', 'b\\n\\x1b\[2J'",
    ),
    "unknown mode": (lambda a: swap(a, "records", 3, 0, 2), "mode of entry 3 .* is 2"),
    "no width": (lambda a: swap(a, "records", 4, 1, 0), "width of entry 4"),
    "no height": (lambda a: swap(a, "records", 5, 2, 0), "height of entry 5"),
    "raw image of another size": (lambda a: swap(a, "records", 5, 2, 7), "raw image of entry 5"),
    "image without an allocation": (lambda a: swap(a, "records", 2, 3, a.records[2][3] + 1), "data_ptr of entry 2"),
    "image pointer overflows": (lambda a: swap(a, "records", 2, 3, U64), "data_ptr of entry 2"),
    "image of another sample": (lambda a: swap(a, "records", 2, 3, a.records[4][3]), "sample_id.* of entry 2"),
    "allocation of another sample": (lambda a: swap(a, "table", 2, 0, 9), "sample_id.* of entry 2"),
    "allocation in the header": (lambda a: swap(a, "table", 2, 1, 5), "allocation ptr of entry 2"),
    "allocation in the table": (lambda a: swap(a, "table", 11, 1, a.end), "allocation size of entry 11"),
    "allocation pointer overflows": (lambda a: swap(a, "table", 2, 1, U64), "allocation ptr of entry 2"),
    "allocation size overflows": (lambda a: swap(a, "table", 2, 2, U64), "allocation size of entry 2"),
    "allocation leaves its page": (lambda a: swap(a, "table", 0, 2, PAGE + 1), "allocation size of entry 0"),
    "allocations overlap": (lambda a: swap(a, "table", 0, 2, a.table[0][2] + 1), "overlap"),
    "allocation is empty": (lambda a: swap(a, "table", 2, 2, 0), "data_ptr of entry 2"),
    "allocation is missing": (lambda a: a.table.pop(), "num_samples"),
    "allocations without end": (lambda a: a.table.extend([[0, a.pages_ptr, 0]] * 30), "num_samples"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_in_one_line(layout: Layout, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    path = layout.write(tmp_path / "whole.beton")
    Reader(path).close()
    damage(layout)
    layout.write(path := tmp_path / "bad.beton")
    tracemalloc.start()
    with pytest.raises(BetonError, match=message) as caught:
        Reader(path)
    assert tracemalloc.get_traced_memory()[1] < 4e6, "a claimed count must not be allocated before it is checked"
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable(), "a damaged name must not break the line, or move the cursor"


def test_no_truncation_passes(layout: Layout, tmp_path: Path) -> None:
    path = layout.write(tmp_path / "a.beton")
    whole = path.stat().st_size
    descriptors = 24 + 2 * 1041
    records = descriptors + 12 * 24
    starts = [0, 24, 24 + 1041, descriptors, descriptors + 24, records, layout.pages_ptr, layout.pages_ptr + PAGE]
    starts += [layout.end, layout.end + 24, layout.end + 11 * 24]
    for start in starts:
        for size in {max(0, start - 1), start, start + 1, start + 7}:
            cut = tmp_path / "cut.beton"
            cut.write_bytes(path.read_bytes()[:size])
            with pytest.raises(BetonError, match=r"cut\.beton"):
                Reader(cut)
    assert max(starts) + 7 < whole


@pytest.mark.parametrize("region", ["header", "descriptors", "records", "table"])
def test_bit_flip_is_an_error_or_a_valid_read(layout: Layout, tmp_path: Path, region: str) -> None:
    path = layout.write(tmp_path / "a.beton")
    size = path.stat().st_size
    first, end = {
        "header": (0, 24),
        "descriptors": (24, 24 + 2 * 1041),
        "records": (24 + 2 * 1041, 24 + 2 * 1041 + 12 * 24),
        "table": (layout.end, size),
    }[region]
    flips = np.random.default_rng(2).choice((end - first) * 8, min(250, (end - first) * 8), replace=False)
    refused = 0
    with path.open("r+b") as stream:
        for place, bit in ((first + int(flip) // 8, int(flip) % 8) for flip in flips):
            stream.seek(place)
            (byte,) = stream.read(1)
            for value in (byte ^ (1 << bit), byte):
                stream.seek(place)
                stream.write(bytes([value]))
                stream.flush()
                if value == byte:
                    continue
                try:
                    with Reader(path) as reader:
                        assert all(len(reader.payload(i)) == reader.sizes[i] > 0 for i in range(len(reader)))
                except BetonError:
                    refused += 1
    # Most of a descriptor is arguments nobody reads; elsewhere few flips go unseen, as in labels.
    assert refused > len(flips) // 4 or region == "descriptors"
    Reader(path).close()


@pytest.mark.parametrize("name", ["missing.beton", "."], ids=["missing", "folder"])
def test_unreadable_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BetonError, match="cannot be opened"):
        Reader(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "is a list"),
        ('{"samples": 5}', "samples is 5; wanted 12"),
        ('{"samples": "\\u001b[2J\\n"}', r"samples is '\\x1b\[2J\\n'; wanted 12"),
        ('{"class_names": "cat"}', "class_names"),
        ('{"class_names": [1]}', "class_names"),
        ('{"settings": 3}', "settings"),
        ('{"class_names": ["cat", "dog"]}', "label of entry 2"),
    ],
)
def test_sidecar_must_fit_the_file(layout: Layout, tmp_path: Path, text: str, message: str) -> None:
    path = layout.write(tmp_path / "a.beton")
    (tmp_path / "a.beton.json").write_text(text, encoding="latin-1")
    with pytest.raises(BetonError, match=message):
        Reader(path)


def test_sidecar_names_the_classes(layout: Layout, tmp_path: Path) -> None:
    path = layout.write(tmp_path / "a.beton")
    names = [f"class {i}" for i in range(12)]
    (tmp_path / "a.beton.json").write_text(json.dumps({"class_names": names, "note": 1}))
    with Reader(path) as reader:
        assert reader.class_names == names
        assert reader.sidecar["note"] == 1


def test_imagenet_sized_index_opens_without_a_loop(tmp_path: Path) -> None:
    count = 1_300_000
    descriptors = struct.pack("<B16s1024x", IMAGE, b"image") + struct.pack("<B16s1024x", INT, b"label")
    record = np.dtype([("m", "u1"), ("w", "<u2"), ("h", "<u2"), ("ptr", "<u8"), ("pad", "V3"), ("label", "<i8")])
    pages_ptr = -(-(24 + len(descriptors) + count * 24) // PAGE) * PAGE
    per_page = PAGE // 3
    number = np.arange(count)
    ptr = pages_ptr + number // per_page * PAGE + number % per_page * 3
    records = np.zeros(count, record)
    records["m"] = records["w"] = records["h"] = 1
    records["ptr"], records["label"] = ptr, number % 1000
    end = -(-int(ptr[-1] + 3) // PAGE) * PAGE
    table = np.stack([number, ptr, np.full(count, 3)], axis=1).astype("<u8")
    order = np.random.default_rng(0).permutation(-(-count // 1000))  # as parallel writers leave it: runs, not sorted
    path = tmp_path / "big.beton"
    with path.open("wb") as stream:
        stream.write(struct.pack("<HHIQQ", 2, 2, PAGE, count, end) + descriptors + records.tobytes())
        stream.seek(end)
        stream.writelines(table[run * 1000 : (run + 1) * 1000].tobytes() for run in order)
    start = time.process_time()
    with Reader(path) as reader:
        opened_s = time.process_time() - start
        assert len(reader) == count
        assert np.array_equal(reader.offsets, ptr)
    # .35 s of CPU measured; a Python loop over the samples takes more than 3 s before it does anything.
    assert opened_s < 2

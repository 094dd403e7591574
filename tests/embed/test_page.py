"""Laws of the map: one file that loads nothing, whose data are those of the vectors, whatever names and sizes hold."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastbyol.beton import RAW, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.embed import layout, neighbours, page, thumbnails
from fastbyol.embed.formats import Embedding
from fastbyol.errors import ConfigError
from tests.conftest import Betons
from tests.embed.test_neighbours import drawn, lay

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\"'`${1}{{7*7}}"


@pytest.fixture
def reader(betons: Betons) -> Iterator[Reader]:
    with Reader(betons.val) as opened:
        yield opened


class Tags(HTMLParser):
    """A parser that lists the tags of a page and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def embedding_of(reader: Reader, **more: Any) -> Embedding:
    count = len(reader)
    labels = np.full(count, -1) if reader.labels is None else reader.labels
    return Embedding(lay(drawn(count)), [f"{number}.jpg" for number in range(count)], labels, **more)


def write(path: Path, reader: Reader, embedding: Embedding, *, title: str = "photos") -> str:
    """Write a page with three neighbours each; check that it is one file, and return its text."""
    nearest = neighbours.compare(embedding.vectors, k=3)[0]
    places = layout.lay_out(embedding.vectors, "pca", seed=0, device="cpu")
    shown = page.write(path, reader, embedding, nearest, places, title=title, facts=["a fact"], workers=1)
    text = path.read_text()
    assert shown.bytes == path.stat().st_size
    tags = Tags()
    tags.feed(text)
    assert not {"src", "href"} & tags.attributes
    assert tags.names == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "canvas",
        "header",
        "div",
        "h1",
        "p",
        "input",
        "label",
        "select",
        "ul",
        "button",
        "b",
        "span",
        "aside",
        "h2",
        "noscript",
        "script",
    }
    code = "".join(line for line in text.splitlines() if len(line) < 400 and "mapFacts" not in line[:20])
    assert not re.search(r"@import|url\(|import\(|fetch\(|XMLHttp|https?:", code)
    return text


def map_facts(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="mapFacts" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    facts: dict[str, Any] = json.loads(found[1])
    return facts


def data(text: str, name: str) -> bytes:
    found = re.search(rf'<script id="data-{name}" type="text/plain">([^<]*)</script>', text)
    assert found
    return gzip.decompress(base64.b64decode(found[1]))


def sheet(text: str, number: int) -> NDArray[np.uint8]:
    found = re.search(rf'<script id="sheet-{number}" type="text/plain">([^<]*)</script>', text)
    assert found
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


def test_a_page_holds_every_image_with_its_neighbours_class_and_thumbnail(reader: Reader, tmp_path: Path) -> None:
    clusters = np.arange(60) % 5
    embedding = embedding_of(reader, class_names=reader.class_names, clusters=clusters)
    text = write(tmp_path / "map.html", reader, embedding)
    facts = map_facts(text)
    assert (facts["count"], facts["thumbnails"], facts["nearest"], facts["clusters"]) == (60, 60, 3, 5)
    names = json.loads(data(text, "names"))
    rows = [int(name.removesuffix(".jpg")) for name in names]
    assert sorted(rows) == list(range(60))
    classes = np.frombuffer(data(text, "classes"), "<u2")
    assert reader.labels is not None
    assert reader.class_names is not None
    labels = [reader.class_names[label] for label in reader.labels[rows]]
    assert [facts["classes"][number - 1] for number in classes] == labels
    assert np.array_equal(np.frombuffer(data(text, "clusters"), "<u2"), clusters[rows])
    nearest = neighbours.compare(embedding.vectors, k=3)[0]
    shown = np.frombuffer(data(text, "neighbours"), "<u4").reshape(60, 3)
    assert np.array_equal(np.array(rows)[shown], nearest.rows[rows])
    cosines = np.frombuffer(data(text, "cosines"), "<i2").reshape(60, 3)
    np.testing.assert_allclose(cosines / 10_000, nearest.cosines[rows], atol=1e-4)
    px, first = facts["px"], sheet(text, 0)
    for point in (0, 1, 33, 59):
        left, top = point % facts["perRow"] * px, point // facts["perRow"] * px
        tile = first[top : top + px, left : left + px].astype(float)
        assert np.abs(tile - thumbnails.thumbnail(reader, rows[point], px)).mean() < 6


def test_text_from_outside_is_escaped(reader: Reader, tmp_path: Path) -> None:
    embedding = embedding_of(reader, class_names=[HOSTILE] * 10)
    named = Embedding(embedding.vectors, [HOSTILE] * 60, embedding.labels, embedding.class_names)
    text = write(tmp_path / "map.html", reader, named, title=HOSTILE)
    assert text.count("</script>") == text.count("<script")
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert map_facts(text)["classes"] == [HOSTILE] * 10
    assert set(json.loads(data(text, "names"))) == {HOSTILE}


def test_images_without_labels_and_few_of_them_make_a_page(tmp_path: Path) -> None:
    for count in (1, 2):
        with Writer(tmp_path / f"{count}.beton", capacity=count, class_names=None) as writer:
            for number in range(count):
                writer.append(StoredImage(RAW, 8, 12, bytes([100 * number]) * (8 * 12 * 3)))
        with Reader(tmp_path / f"{count}.beton") as reader:
            facts = map_facts(write(tmp_path / "map.html", reader, embedding_of(reader)))
        assert (facts["count"], facts["nearest"], facts["classes"]) == (count, count - 1, [])


def test_a_page_has_as_many_thumbnails_as_its_size_allows_and_says_so(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE_BYTES", 15_000)
    monkeypatch.setattr(thumbnails, "SHEET_PX", 64)
    text = write(tmp_path / "map.html", reader, embedding_of(reader))
    shown = map_facts(text)["thumbnails"]
    assert 0 < shown < 60
    names = json.loads(data(text, "names"))[:shown]
    assert len(set(names)) == shown
    assert f"thumbnails of {shown}, spread over the map" in text
    assert text.count('<script id="sheet-') == shown // 4


def test_thumbnails_shrink_as_images_become_many(betons: Betons) -> None:
    with Reader(betons.val) as reader:
        reader.widths[:], reader.heights[:] = 500, 400
        sides = [
            thumbnails.choose_px(reader, np.zeros(count, np.int64), budget=3e7) for count in (1, 3000, 20_000, 10**6)
        ]
        assert sides == [192, 128, 48, 32]
        reader.widths[:] = 40
        assert thumbnails.choose_px(reader, np.zeros(1, np.int64), budget=3e7) == 48


def test_points_come_once_and_the_first_are_spread_over_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "OVERVIEW", 16)
    rng = np.random.default_rng(0)
    crowd = rng.uniform(0, 0.1, (500, 2))
    places = np.concatenate([crowd, [[0.9, 0.9], [0.1, 0.9], [0.9, 0.1], [1.0, 1.0]]]).astype(np.float32)
    order = page.order_points(places)
    assert sorted(order) == list(range(504))
    assert {500, 501, 502} <= set(order[:4].tolist())
    steps = np.abs(np.diff(places[order[16:]], axis=0)).max(1)
    assert np.median(steps) < 0.02


def test_the_points_that_have_thumbnails_are_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "OVERVIEW", 16)
    places = np.random.default_rng(0).uniform(0, 1, (4000, 2)).astype(np.float32)
    order = page.order_points(places, limit=400)
    assert sorted(order) == list(range(4000))
    cells = np.floor(places[order[:400]] * 5) @ [5, 1]
    assert np.bincount(cells.astype(int), minlength=25).min() >= 8
    assert sorted(page.order_points(places, limit=3)) == list(range(4000))


def test_principal_components_are_those_of_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ROWS", 16)
    values = drawn(90, features=6) * np.array([5, 3, 1, 1, 1, 1], np.float32)
    found = layout.principal_components(lay(values), 3, device="cpu")
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u * s)[:, :3], atol=1e-5)
    assert np.array_equal(found, layout.principal_components(lay(values), 3, device="cpu"))
    assert layout.principal_components(lay(values), 9, device="cpu").shape == (90, 9)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_places_fill_a_square_from_0_to_1(count: int) -> None:
    places = layout.lay_out(lay(drawn(count)), "pca", seed=0, device="cpu")
    assert places.shape == (count, 2)
    assert places.min() >= 0
    assert places.max() <= 1
    assert count == 1 or np.ptp(places, axis=0).max() == pytest.approx(1)


@pytest.mark.slow
def test_t_sne_keeps_clouds_apart() -> None:
    pytest.importorskip("sklearn")
    truth = np.arange(60) % 2
    places = layout.lay_out(
        lay(drawn(60) + 20 * truth[:, None].astype(np.float32) * [1, -1, 1, -1, 1, -1, 1]), "tsne", seed=0, device="cpu"
    )
    inside = [np.linalg.norm(places[truth == side] - places[truth == side].mean(0), axis=1).mean() for side in (0, 1)]
    between = np.linalg.norm(places[truth == 0].mean(0) - places[truth == 1].mean(0))
    assert between > max(inside)


def test_a_layout_whose_package_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layout.PACKAGES, "umap", ("no_such_module", "umap-learn"))
    with pytest.raises(ConfigError, match="--layout umap needs umap-learn; pip install umap-learn"):
        layout.require_package("umap")
    layout.require_package("pca")


def test_scripts_are_whole_and_leave_jinja_alone() -> None:
    folder = Path(page.__file__).parent
    scripts = [path.read_text() for path in sorted(folder.glob("map_*.js"))]
    assert len(scripts) == 3
    assert not [
        mark for mark in ("{{", "{%", "{#", "</", "http", "innerHTML", "eval(") for text in scripts if mark in text
    ]
    node = subprocess.run(["sh", "-c", "command -v node"], capture_output=True, text=True, check=False).stdout.strip()
    if node:
        subprocess.run([node, "--check", "-"], input="\n".join(scripts), text=True, check=True)

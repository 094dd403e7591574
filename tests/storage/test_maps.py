"""Laws of a run's maps: each is linked once in the report, as long as its file is there."""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import unquote

from fastbyol.storage.maps import add_map, links, read_maps
from fastbyol.storage.run_folder import RunFolder

REPORT = "<main>before<!-- maps --><!-- end of maps -->after</main>"


def test_a_map_is_linked_once_from_wherever_it_lies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.path.mkdir(parents=True)
    folder.report.write_text(REPORT)
    names = ['a "map" & more #1.html', "runs/first/inside.html"]
    for name in (*names, names[0]):
        (tmp_path / name).touch()
        add_map(folder, tmp_path / name, title=f"<{name}>", images=1234)
    text = folder.report.read_text()
    found = re.findall(r'<a href="([^"]+)">(.*?)</a>, 1,234 images', text)
    assert [html.unescape(title) for _, title in found] == [f"<{name}>" for name in reversed(names)]
    for (href, _), name in zip(found, reversed(names), strict=True):
        assert (folder.path / unquote(html.unescape(href))).resolve() == (tmp_path / name).resolve()
    assert text.startswith("<main>before")
    assert text.endswith("after</main>")


def test_a_map_that_is_gone_is_not_linked_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("a.html", "b.html"):
        (tmp_path / name).touch()
        add_map(folder, tmp_path / name, title=name, images=1)  # a report need not be there
    (tmp_path / "a.html").unlink()
    assert [each.title for each in read_maps(folder)] == ["b.html"]
    assert "a.html" not in links(folder, read_maps(folder))
    (tmp_path / "b.html").unlink()
    assert links(folder, read_maps(folder)) == ""

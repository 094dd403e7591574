"""Laws of a run's maps: each is linked once in the report, as long as its file is there."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from fastbyol.storage.maps import add_map, links, read_maps
from fastbyol.storage.run_folder import RunFolder

REPORT = "<main>before<!-- maps --><!-- end of maps -->after</main>"


def test_a_map_is_linked_once_from_wherever_it_lies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.path.mkdir(parents=True)
    folder.report.write_text(REPORT)
    names = ['a "map" & more #1.html', "runs/first/inside.html", os.fsdecode(b"of no \xff UTF-8.html")]
    for name in (*names, names[0]):
        (tmp_path / name).touch()
        add_map(folder, tmp_path / name, title=f"<{len(name)}>", images=1234)
    wanted = [*names[1:], names[0]]  # the first was recorded again
    text = folder.report.read_text()
    found = re.findall(r'<a href="([^"]+)">(.*?)</a>, 1,234 images', text)
    assert [html.unescape(title) for _, title in found] == [f"<{len(name)}>" for name in wanted]
    for (href, _), name in zip(found, wanted, strict=True):
        linked = os.fsdecode(unquote_to_bytes(html.unescape(href)))
        assert (folder.path / linked).resolve() == (tmp_path / name).resolve()
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

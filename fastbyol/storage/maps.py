"""Maps of images that were drawn with a run's encoder: a list in its folder, and links in its report."""

from __future__ import annotations

import json
import os
import re
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder

PLACE = re.compile(r"(?<=<!-- maps -->).*?(?=<!-- end of maps -->)", re.DOTALL)  # of the links in a report


class Map(NamedTuple):
    """A page of fastbyol-embed: its file, the name of its images, and their number."""

    file: str
    title: str
    images: int


def read_maps(folder: RunFolder) -> list[Map]:
    """Read the maps of a run, without those whose file is gone."""
    if not folder.maps.is_file():
        return []
    try:
        maps = [Map(**entry) for entry in json.loads(folder.maps.read_text())]
    except (ValueError, TypeError):  # not as add_map wrote it: a run that ends must not fail for its links
        return []
    return [each for each in maps if Path(each.file).exists()]


def add_map(folder: RunFolder, page: Path, *, title: str, images: int) -> None:
    """Record a map, in place of an earlier one of the same file, and link it in the report; raises OSError."""
    added = Map(str(page.resolve()), title, images)
    maps = [*(each for each in read_maps(folder) if each.file != added.file), added]
    files.write(folder.maps, json.dumps([each._asdict() for each in maps], indent=2) + "\n")
    if folder.report.is_file():
        text = folder.report.read_text(encoding="utf-8")
        files.write(folder.report, PLACE.sub(lambda _: links(folder, maps), text, count=1))


def links(folder: RunFolder, maps: list[Map]) -> str:
    """Return the maps as HTML links from the run folder, to be placed in the report; nothing without maps."""
    if not maps:
        return ""
    listed = "".join(
        f'<li><a href="{escape(quote(os.fsencode(os.path.relpath(each.file, folder.path.resolve()))))}">'
        f"{escape(each.title)}</a>, "
        f"{each.images:,} images</li>"
        for each in maps
    )
    about = "<p>Made by fastbyol-embed with the encoder of this run.</p>"
    return f"\n<section>\n<h2>Maps of images</h2>\n{about}\n<ul>{listed}</ul>\n</section>\n"

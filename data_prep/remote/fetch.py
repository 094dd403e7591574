"""The fetching of a remote source: several files at once, with progress, and the copy removed once it is converted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Lock

from tqdm import tqdm

from fastbyol.data_prep.remote.copy import Copy
from fastbyol.data_prep.remote.listing import Remote
from fastbyol.data_prep.remote.origin import Origin
from fastbyol.data_prep.remote.server import Entry
from fastbyol.data_prep.remote.threads import in_threads
from fastbyol.data_prep.remote.transfer import Transfer
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.system.command_line import shown


@contextmanager
def fetched(remote: Remote, path: Path) -> Iterator[tuple[Origin, list[Path] | None]]:
    """Fetch what a copy at `path` lacks; yield where the copy is from, and the files of a pattern.

    The copy is removed at the end of the block. After an error or an interruption it stays, which is said.
    """
    with Copy(path, remote) as copy:
        is_done = False
        try:
            fetch(remote, copy)
            matches = None if remote.matches is None else [copy.files / name for name in remote.matches]
            yield Origin(shown(remote.address), copy.files / remote.asked, remote.root, copy.files), matches
            is_done = True
        finally:
            size = copy.total_bytes
            if is_done or not size:
                copy.remove()
            else:
                print(
                    f"fastbyol-prep: note: {in_words(size)} were fetched and stay in {path}; the same command goes on "
                    "from there",
                    file=sys.stderr,
                )


def fetch(remote: Remote, copy: Copy) -> None:
    """Fetch the files that a copy lacks; raise SourceError for errors of the server, or where they do not fit here."""
    missing, stop, turn = copy.missing, Event(), Lock()
    if not missing:
        return
    sizes, begun = [file.size for file in missing if file.size is not None], copy.begun_bytes
    total, is_known = sum(sizes), len(sizes) == len(missing)
    _require_space(remote, copy.path, total - begun)
    print(
        f"fastbyol-prep: note: fetches {len(missing)} of {len(remote.files)} files, "
        f"{'' if is_known else 'more than '}{in_words(total - begun)}, from {shown(remote.address)}",
        file=sys.stderr,
    )
    bar = tqdm(
        total=total if is_known else None,
        initial=begun,
        desc="fetching",
        unit="B",
        unit_scale=True,
        delay=2,
        disable=None,
        dynamic_ncols=True,
    )

    def on_bytes(count: int) -> None:
        with turn:
            bar.update(count)

    def transfer(file: Entry) -> tuple[Entry, int]:
        where = shown(file.place) if remote.server.is_web else f"{remote.root}/{file.name}"
        unfinished = copy.unfinished(file)
        path = copy.path_of(file)
        return file, Transfer(
            remote.server, file, path, unfinished=unfinished, where=where, stop=stop, on_bytes=on_bytes
        ).run()

    with bar, closing(in_threads(transfer, missing, stop=stop)) as whole:
        for file, size in whole:
            copy.add(file, size)


def _require_space(remote: Remote, path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise SourceError(
            f"{shown(remote.address)}: {in_words(needed)} are to be fetched, and {in_words(free)} are free in "
            f"{path.parent}; make room there, or name an output on a larger disk"
        )


def in_words(count: int) -> str:
    """Return a number of bytes in kB, MB or GB."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / unit:.1f} {name}"

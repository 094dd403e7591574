"""The command fastbyol-prep write: a source is found or fetched, converted, and reported on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.data_prep import reuse
from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.formats import available_plugins
from fastbyol.data_prep.partial import remove_stale
from fastbyol.data_prep.remote.copy import copy_path
from fastbyol.data_prep.remote.copy import remove_stale as remove_copies
from fastbyol.data_prep.remote.fetch import fetched
from fastbyol.data_prep.remote.listing import Remote, look_up
from fastbyol.data_prep.remote.origin import FetchedSource
from fastbyol.data_prep.report import report
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources import files_of, listing, open_source
from fastbyol.data_prep.sources.base import Source, SourceError
from fastbyol.data_prep.sources.labels import RelabelledSource, read_class_names
from fastbyol.data_prep.writer import require_output, version
from fastbyol.system.command_line import is_address, shown


def run(arguments: argparse.Namespace) -> int:
    """Write the .beton, report on it and return the exit status."""
    settings = Settings(
        arguments.mode,
        arguments.max_side,
        arguments.quality,
        arguments.jpeg_share,
        max_pixels=arguments.max_pixels,
        stretch=arguments.stretch,
    )
    remote = _look_up(arguments.source, arguments.out) if is_address(arguments.source) else None
    key = _fingerprint(arguments, settings, remote)
    owner = arguments.out.name  # of the copy that is fetched
    if arguments.out.is_dir():
        name = Path(arguments.source).absolute().name if remote is None else remote.name
        owner = reuse.plain_name(name)
        arguments.out /= reuse.file_name(name, key)
        count = reuse.count_if_whole(arguments.out, key)
        if count is not None:
            _clear_partials(arguments.out, None)
            print(f"{arguments.out}: {count} images, unchanged since it was written")
            return 0
        arguments.overwrite = True  # what has this name is not whole
    require_output(arguments.out, overwrite=arguments.overwrite)
    arguments.copy = None if remote is None else copy_path(arguments.out.parent, owner, remote)
    _clear_partials(arguments.out, key, copy=arguments.copy)
    with _open(arguments, remote) as unlabelled:
        start = time.monotonic()
        source = _label(arguments, unlabelled)
        done = convert(
            source,
            arguments.out,
            settings,
            workers=arguments.workers,
            on_error=arguments.on_error,
            limit=arguments.limit,
            overwrite=arguments.overwrite,
            key=key,
            address_digest=None if remote is None else remote.digest,
        )
    report(arguments, source, done, seconds=time.monotonic() - start)
    return 0


def _look_up(address: str, out: Path) -> Remote:
    """List what lies at an address; where that fails, name what was converted from it before."""
    try:
        return look_up(address)
    except SourceError as error:
        before = reuse.newest_of(out, shown(address)) if out.is_dir() else None
        if before is None:
            raise
        raise SourceError(f"{error}; {before} was converted from it before: to use that as it is, give it") from error


@contextmanager
def _open(arguments: argparse.Namespace, remote: Remote | None) -> Iterator[Source]:
    """Open the source, which is fetched first if it is remote, and then here until the end of the with-block."""
    given = {name: getattr(arguments, name) for name in ("labels", "label_column", "image_key")}
    if remote is None:
        yield open_source(arguments.source, **given)
        return
    with fetched(remote, arguments.copy) as (origin, files):
        with origin.errors():
            source = open_source(origin.path, files=files, root=origin.folder, **given)
        yield FetchedSource(source, origin)


def _label(arguments: argparse.Namespace, source: Source) -> Source:
    """Give a source the labels, and the numbers of classes, of the files that the flags name."""
    if arguments.labels_from is not None:
        source = listing.ListedLabels(source, arguments.labels_from)
    if arguments.classes_from is not None:
        names = read_class_names(arguments.classes_from)
        source = RelabelledSource(source, names, origin=arguments.classes_from)
    return source


def _fingerprint(arguments: argparse.Namespace, settings: Settings, remote: Remote | None) -> str:
    """Digest all that decides what is written."""
    names = ("labels", "label_column", "image_key", "limit", "on_error")
    chosen = (
        settings.facts()
        | {name: getattr(arguments, name) for name in names}
        | {"fastbyol": version(), "plugins": available_plugins()}
    )
    if arguments.labels_from is not None:
        chosen["labels_from"] = reuse.fingerprint([arguments.labels_from], {})
    if arguments.classes_from is not None:
        chosen["class_names"] = read_class_names(arguments.classes_from)
    if remote is not None:
        return reuse.digest_of(remote.facts(), chosen)
    return reuse.fingerprint(files_of(Path(arguments.source)), chosen)


def _clear_partials(out: Path, key: str | None, *, copy: Path | None = None) -> None:
    """Remove the files left by killed writes of this output, but those of the write with this key; report them.

    copy: what is fetched for this write, which stays, too.
    """
    removed, unknown = remove_stale(out, keep=key)
    for left in [*removed, *remove_copies(out.parent, out.name, keep=copy)]:
        print(f"fastbyol-prep: note: removed {left}, left by a killed write", file=sys.stderr)
    for left in unknown:
        print(
            f"fastbyol-prep: note: {left} is unfinished and cannot be locked; remove it unless a write is running",
            file=sys.stderr,
        )

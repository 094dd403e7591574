"""The files of a source at an address: one file, a folder with all below it, or those of a pattern."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from threading import Event
from typing import TypeVar

from fastbyol.data_prep.remote.failures import remote_errors
from fastbyol.data_prep.remote.server import Entry, Server
from fastbyol.data_prep.remote.threads import in_threads
from fastbyol.data_prep.sources import names_beside
from fastbyol.data_prep.sources.base import SourceError, listing_progress
from fastbyol.data_prep.sources.listing import SUFFIXES as LISTS
from fastbyol.data_prep.sources.pattern import FILES_MAX, expand_braces
from fastbyol.system.command_line import address_digest, shown

Item = TypeVar("Item")
Result = TypeVar("Result")
DEPTH_MAX = 32  # of folders: a server may list pages that lead to themselves
OF_USE_HERE = {  # files that are no source elsewhere, and what to do with them
    **dict.fromkeys(LISTS, "copy it here, and give the address of the images with --labels-from and the copy"),
    ".beton": "copy it here, and give it as it is",
}


@dataclass(frozen=True)
class Remote:
    """What a source at an address holds. The names of its files are relative to `root`, which is shown to users.

    asked: the name of the source below the root, "" for the root; matches: a pattern's files in its order, None
    without a pattern.
    """

    address: str
    server: Server
    root: str
    asked: str
    files: list[Entry]
    folders: list[str]
    matches: list[str] | None = None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return (self.asked or self.root).rpartition("/")[2]

    @property
    def digest(self) -> str:
        """Eight hex digits that stand for the address."""
        return address_digest(self.address)

    def facts(self) -> Iterator[tuple[str, int | None, str]]:
        """Yield name, size and stamp of the address, of each folder and of each file."""
        yield self.address.rstrip("/"), None, ""
        yield from ((name, None, "") for name in self.folders)
        yield from ((file.name, file.size, file.stamp) for file in self.files)


def look_up(address: str) -> Remote:
    """List what lies at an address; raise SourceError if that is no source, or if the server cannot be asked."""
    with remote_errors(address):
        return _Listing(address).remote()


class _Listing:
    """The requests that list one source."""

    def __init__(self, address: str) -> None:
        self._address, self._shown = address, shown(address)
        self._server = Server(address)
        self._magic = re.compile(r"[*[]" if self._server.is_web else r"[*?[]")

    def remote(self) -> Remote:
        """Return what lies at the address."""
        path = self._server.path
        is_elsewhere = self._address.partition("://")[0] not in ("file", "local")
        self._require(is_elsewhere, f"lies on this machine; give {path}")
        paths = list(itertools.islice(expand_braces(path), FILES_MAX + 1))
        self._require(len(paths) <= FILES_MAX, f"matches more than {FILES_MAX} files; give fewer")
        if paths != [path] or self._magic.search(path):
            return self._of_pattern(path, paths)
        found = self._server.at(path)
        return self._of_folder(path) if found.is_folder else self._of_file(path, found)

    def _of_file(self, path: str, file: Entry) -> Remote:
        """Return a file, with those beside it that belong to it."""
        remedy = OF_USE_HERE.get(PurePosixPath(file.name).suffix.lower())
        self._require(remedy is None, f"is of use only where it lies; {remedy}")
        files, above = [file], path.rpartition("/")[0]
        for name in names_beside(file.name):
            try:
                files.append(self._server.at(f"{above}/{name}"))
            except FileNotFoundError:
                continue
        root = self._shown.partition("::")[0].rpartition("/")[0]
        return self._checked(root, file.name, files, [])

    def _of_folder(self, path: str) -> Remote:
        """Return the files of a folder and of the folders below it."""
        level, files, folders = [("", path)], list[Entry](), list[str]()
        for _ in range(DEPTH_MAX):
            found = self._at_once(self._inside, level, " folders")
            entries = [entry for each in found for entry in each]
            files += (entry for entry in entries if not entry.is_folder)
            level = [(f"{entry.name}/", entry.place) for entry in entries if entry.is_folder]
            folders += (name[:-1] for name, _ in level)
            if not level:
                break
        self._require(not level, f"holds folders in folders to a depth of {DEPTH_MAX}; give one that holds images")
        self._require(files != [], "holds no files, or the server does not list them; give the address of a file")
        return self._checked(self._shown, "", files, folders)

    def _inside(self, folder: tuple[str, str]) -> list[Entry]:
        above, place = folder
        return [entry._replace(name=above + entry.name) for entry in self._server.inside(place)]

    def _of_pattern(self, path: str, paths: list[str]) -> Remote:
        """Return the files of a pattern: those of a brace in its order, those of a * sorted."""
        first = min(place for place in (path.find("{"), *(m.start() for m in self._magic.finditer(path))) if place >= 0)
        above = path.rfind("/", 0, first) + 1
        plain = [each for each in paths if not self._magic.search(each)]
        at = dict(self._at_once(lambda each: (each, self._server.at(each)), plain, " files"))
        found: list[Entry] = []
        for each in paths:
            matches = [at[each]._replace(name=self._server.decoded(each[above:]))] if each in at else []
            matches = matches or sorted(self._glob(path[:above], each[above:].split("/")))
            self._require(matches != [], f"nothing matches {each[above:]}; correct the pattern")
            found += matches
        folder = next((each.name for each in found if each.is_folder), None)
        self._require(
            folder is None, f"the pattern matches the folder {folder}; give a pattern of .tar shards or tables"
        )
        asked = path[above:].rstrip("/")
        names = [each.name for each in found]
        files = list({each.name: each for each in found}.values())
        return self._checked(self._shown.removesuffix(asked).rstrip("/"), asked, files, [], names)

    def _glob(self, folder: str, parts: list[str]) -> list[Entry]:
        """Return what matches a pattern below a folder, with its name from there."""
        part, *rest = parts
        if rest and not self._magic.search(part):
            below = [(self._server.decoded(part), f"{folder.rstrip('/')}/{part}")]
        else:
            try:
                entries = self._server.inside(folder)
            except FileNotFoundError:
                return []
            found = [entry for entry in entries if fnmatchcase(entry.name, self._server.decoded(part))]
            if not rest:
                return found
            below = [(entry.name, entry.place) for entry in found if entry.is_folder]
        return [
            entry._replace(name=f"{name}/{entry.name}") for name, place in below for entry in self._glob(place, rest)
        ]

    def _checked(
        self, root: str, asked: str, files: list[Entry], folders: list[str], matches: list[str] | None = None
    ) -> Remote:
        """Return the source with all sizes that the server tells, its names checked and sorted."""
        unsized = [file for file in files if file.size is None and not file.stamp]
        sized = self._at_once(lambda file: self._server.at(file.place)._replace(name=file.name), unsized, " files")
        of_name = {file.name: file for file in files} | {file.name: file for file in sized}
        above = {str(parent) for name in of_name for parent in PurePosixPath(name).parents} | set(folders)
        for name in (*of_name, *folders):
            is_plain = all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name
            self._require(is_plain, f"lists {name!r:.99}, which is no name of a file; rename it")
        both = next((name for name in of_name if name in above), None)
        self._require(both is None, f"lists {both} as a file and as a folder; rename one")
        self._require(len(of_name) == len(files), "lists two files of one name; rename one")
        files = sorted(of_name.values())
        return Remote(self._address, self._server, root, asked, files, sorted(folders), matches)

    def _at_once(self, function: Callable[[Item], Result], items: Iterable[Item], unit: str) -> list[Result]:
        with closing(in_threads(function, items, stop=Event())) as results:
            return list(listing_progress(results, unit))

    def _require(self, claim: bool, fault: str) -> None:
        if not claim:
            raise SourceError(f"{self._shown}: {fault}")

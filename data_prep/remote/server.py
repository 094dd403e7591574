"""A server as fsspec reads it: what lies at a place, what lies in a folder, and the bytes of a file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from fastbyol.data_prep.remote.failures import persistently

Result = TypeVar("Result")
READ_BYTES = 1 << 23  # a request for a part of a file; each thread holds one
CONNECT_S, SILENT_S = 20.0, 60.0  # of HTTP; fsspec's own limit of five minutes a file would cut large ones
WEB = ("http", "https")
# What tells that a file has changed, the surest first, as the drivers name it.
STAMPS = (
    *("ETag", "etag", "blob_id", "md5Hash", "md5", "Content-MD5", "checksum", "generation", "Digest"),
    *("Last-Modified", "LastModified", "last_modified", "modified", "updated", "mtime", "created"),
)
PARTIAL_CONTENT = 206
# Their errors are raised, too; without a handler of the program, logging would print each with its traceback.
LOGGERS = ("adlfs", "asyncio", "fsspec", "gcsfs", "s3fs")


class Entry(NamedTuple):
    """A file or a folder: its name, fsspec's name for its place, and of a file its size in bytes, if known, and stamp.

    stamp: the first of STAMPS that the server gives, "" if it gives none.
    """

    name: str
    place: str
    is_folder: bool
    size: int | None
    stamp: str


class Restarted(Exception):
    """A file comes from its beginning, though only the rest was asked for."""


class Server:
    """The file system of an address; `path` is what it calls the address. What fsspec and its drivers raise is raised.

    On the web, paths and places are without the query of the address, where a signature may stand; each request has it.
    A request that fails for a reason that may pass is tried again, once the server has answered anything.
    """

    def __init__(self, address: str) -> None:
        import fsspec.core  # noqa: PLC0415 - an extra

        protocol = address.partition("://")[0]
        self.is_web = protocol in WEB
        of_web = {each: _web_options(each) for each in WEB if f"{each}://" in address}
        self._system, path = fsspec.core.url_to_fs(address, **of_web)
        self.path, mark, query = path.partition("?") if self.is_web else (path, "", "")
        self._query = mark + query
        self._has_answered = False
        for name in LOGGERS:
            logging.getLogger(name).addHandler(logging.NullHandler())

    def at(self, place: str) -> Entry:
        """Return what lies at a place."""
        info = self._ask(lambda: self._system.info(place + self._query))
        is_page = self.is_web and (place.endswith("/") or info.get("mimetype") == "text/html")
        is_folder = is_page or info["type"] == "directory"
        return self._entry(self.last_part(place), info["name"].removesuffix(self._query), info, is_folder=is_folder)

    def inside(self, folder: str) -> list[Entry]:
        """List a folder, without what is hidden; a file of the web has its size and stamp by at() alone."""
        listed = self._ask(lambda: self._system.ls(folder + self._query, detail=True))
        placed = ((self._without_query(folder, info["name"]), info) for info in listed)
        named = ((self._name_inside(folder, place), place, info) for place, info in placed)
        return [
            self._entry(name, place, info, is_folder=info["type"] == "directory")
            for name, place, info in named
            if name and not any(part.startswith(".") for part in name.split("/"))
        ]

    def last_part(self, place: str) -> str:
        """Return the name of what lies at a place."""
        return self.decoded(place).rstrip("/").rpartition("/")[2]

    def decoded(self, text: str) -> str:
        """Return a part of a place as a name: on the web, %20 is a space."""
        return unquote(text, errors="surrogateescape") if self.is_web else text

    def read(self, file: Entry, begin: int) -> Iterator[bytes]:
        """Yield the bytes of a file from one on, in parts; raise Restarted if that is not possible or not the same."""
        if self.is_web:
            yield from self._stream(file, begin)
        elif file.size is None:
            with self._system.open(file.place, "rb") as stream:
                while data := stream.read(READ_BYTES):
                    yield data
        else:
            for start in range(begin, file.size, READ_BYTES):
                end = min(start + READ_BYTES, file.size)
                data = self._system.cat_file(file.place, start=start, end=end)
                if len(data) != end - start:
                    raise ConnectionError(f"{len(data)} bytes came where {end - start} were asked for")
                yield data
            if begin or file.size > READ_BYTES:  # so it was read in several requests
                self._system.invalidate_cache(file.place)
                if self.at(file.place)[3:] != file[3:]:
                    raise Restarted  # and its size or stamp will not be what was listed

    def _stream(self, file: Entry, begin: int) -> Iterator[bytes]:
        """Yield the bytes that one request of the web answers with; what has changed in the meantime comes whole."""
        more: dict[str, Any] = {}
        if begin:
            asked = {"Range": f"bytes={begin}-", "If-Range": file.stamp}
            more = {"headers": self._system.kwargs["headers"] | asked}
        # A size spares fsspec a request; block_size 0 asks for a stream.
        with self._system.open(file.place + self._query, "rb", block_size=0, size=file.size, **more) as stream:
            if begin and stream.r.status != PARTIAL_CONTENT:
                raise Restarted
            while data := stream.read(READ_BYTES):
                yield data

    def _ask(self, request: Callable[[], Result]) -> Result:
        answer = persistently(request) if self._has_answered else request()
        self._has_answered = True
        return answer

    def _entry(self, name: str, place: str, info: Mapping[str, Any], *, is_folder: bool) -> Entry:
        stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
        size = info.get("size")
        return Entry(name, place, is_folder, None if size is None else int(size), stamp)

    def _without_query(self, folder: str, place: str) -> str:
        """Return a place as listed, which fsspec puts below the address of a page with its query, without that."""
        asked = folder + self._query
        return folder.rstrip("/") + place.removeprefix(asked) if self._query and place.startswith(asked) else place

    def _name_inside(self, folder: str, place: str) -> str:
        """Return the name of an entry of a folder; "" for what is no part of it, as other links of a page."""
        if not self.is_web:
            is_folder_itself = place.strip("/") == folder.strip("/")
            return "" if is_folder_itself else self.last_part(place)
        above, inside = (re.sub("^https?://", "", each) for each in (folder.rstrip("/") + "/", place))
        rest = inside.removeprefix(above).removeprefix("./").rstrip("/")
        is_below = inside.startswith(above) and not any(mark in rest for mark in "?#") and ":" not in rest.split("/")[0]
        return self.decoded(rest) if is_below else ""


def _web_options(protocol: str) -> dict[str, Any]:
    """Return options of fsspec for the web, with those that its configuration has, such as headers with a token.

    Sizes are those of files as they are stored, so these are asked for without compression on the way.
    """
    import aiohttp  # noqa: PLC0415 - an extra
    import fsspec.config  # noqa: PLC0415

    given = fsspec.config.conf.get(protocol, {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
    return {
        "headers": {"Accept-Encoding": "identity"} | given.get("headers", {}),
        "client_kwargs": {"timeout": timeout, "trust_env": True} | given.get("client_kwargs", {}),
    }

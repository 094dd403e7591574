"""Errors of servers, drivers and fsspec itself, each as one line: what happened, and what to do about it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastbyol.data_prep.sources.base import SourceError
from fastbyol.system.command_line import shown

Result = TypeVar("Result")
WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between tries, when a server is busy or a connection broke
# What fsspec and its drivers raise for bad addresses, missing packages and options; then the errors of the libraries
# below them that are no OSError. A library that is not imported has raised none.
PLAIN = (OSError, EOFError, ImportError, ValueError, TypeError, RuntimeError)
OF_LIBRARIES = (
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),  # of Python 3.10, an OSError since
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko", "SSHException"),
    ("ftplib", "Error"),
    ("zipfile", "BadZipFile"),
    ("tarfile", "TarError"),
)
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
BROKEN = ("ClientPayloadError", "ServerDisconnectedError", "IncompleteReadError")
PACKAGES = {
    **dict.fromkeys(("http", "https"), "'fastbyol[remote]'"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    "hf": "huggingface_hub",
}
CREDENTIALS = {
    **dict.fromkeys(("http", "https"), "a login in ~/.netrc, or headers in fsspec's configuration"),
    **dict.fromkeys(("s3", "s3a"), "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_APPLICATION_CREDENTIALS"),
    "hf": "HF_TOKEN",
}


@contextmanager
def remote_errors(address: str) -> Iterator[None]:
    """Raise SourceError for any error of reading from a server in the with-block."""
    try:
        yield
    except SourceError:
        raise
    except errors() as error:
        raise SourceError(f"{shown(address)}: {describe(error, address)}") from error


def errors() -> tuple[type[BaseException], ...]:
    """Return the types of errors that reading from a server may raise."""
    imported = ((sys.modules[module], name) for module, name in OF_LIBRARIES if module in sys.modules)
    return *PLAIN, *(getattr(module, name) for module, name in imported)


def persistently(call: Callable[[], Result]) -> Result:
    """Return what a call returns, which is tried again after errors that may pass."""
    for wait_s in WAITS_S:
        try:
            return call()
        except errors() as error:
            if not may_pass(error):
                raise
        time.sleep(wait_s)
    return call()


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed later: a broken connection, a timeout, a server that is busy."""
    causes = _causes(error)
    statuses = [status for each in causes if (status := _status(each)) is not None]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in (408, 425, 429)
    lasting = (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError, NotImplementedError)
    return not isinstance(causes[-1], lasting)


def describe(error: BaseException, address: str) -> str:
    """Describe an error of an address in one line, with what to do."""
    causes = _causes(error)
    status = next((found for each in reversed(causes) if (found := _status(each)) is not None), None)
    protocol = address.partition("://")[0]
    said_of_it = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    text = re.sub(r"\w+://\S+", lambda found: shown(found[0]), said_of_it)
    said = "" if status is None else f" (status {status})"
    if status in (401, 403, 407) or any(_is_refusal(each) for each in causes):
        given = CREDENTIALS.get(protocol, "those of its driver")
        return f"access is refused{said}; give credentials where fsspec looks for them: {given}"
    if status in (404, 410) or (status is None and isinstance(causes[-1], FileNotFoundError)):
        return f"no such file or folder there{said}; correct the address"
    if "Timeout" in type(causes[-1]).__name__:
        return "the server does not answer in time; try again, or check the network"
    if type(causes[-1]).__name__ in BROKEN:
        return "the connection breaks; try again later, when what is whole is not fetched again"
    if status is not None:
        return f"the server answers with status {status}; try again later"
    if isinstance(error, ImportError):
        wanted = PACKAGES.get(protocol, "fsspec" if error.name == "fsspec" else None)
        remedy = str(error) if wanted is None else f"pip install {wanted}"
        return f"{protocol}:// needs a package that is not installed ({text}): {remedy}"
    network = "" if isinstance(causes[-1], (ValueError, TypeError)) else " and the network"
    return f"cannot be read: {text}; check the address{network}"


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found and not _is_of_parser(cause):
        found.append(cause)
    return found


def _is_of_parser(error: BaseException) -> bool:
    """Return whether an error is what aiohttp's parser says of an answer, with a status that no server sent."""
    return type(error).__module__ == "aiohttp.http_exceptions"


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error tells; each library has a name of its own for it."""
    answer = getattr(error, "response", None)
    found: Iterator[object]
    if isinstance(answer, dict):  # of botocore
        found = iter((answer.get("ResponseMetadata", {}).get("HTTPStatusCode"),))
    else:
        places = ((place, name) for place in (error, answer) for name in ("status", "status_code", "code"))
        found = (getattr(place, name, None) for place, name in places)
    return next((status for status in found if isinstance(status, int)), None)


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS

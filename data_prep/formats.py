"""Image formats: the suffixes that select files, and the first bytes that tell what a file is, whatever its name."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable

_NAMES = (
    "jpg jpeg jpe jfif mpo png apng webp bmp dib gif tif tiff ppm pgm pbm pnm avif jp2 j2k jpx tga ico heic heif jxl"
)
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
HEAD_BYTES = 32  # that tell a format
_FORMAT_OF_START = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\x28\0\0\0": "DIB",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\xff\x0a": "JXL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JXL",
} | {b"P%d" % number + space: "PPM" for number in range(1, 7) for space in (b"\n", b" ", b"\r", b"\t")}
_FORMAT_OF_BRAND = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF") | {
    b"avis": "AVIF"
}
LOSSLESS = frozenset(("PNG", "BMP", "GIF", "TIFF", "PPM", "ICO", "DIB", "TGA"))
_EXTRAS = {"HEIF": ("pillow_heif", "heif"), "JXL": ("pillow_jxl", "jxl")}  # module and extra of fastbyol


class ImageError(ValueError):
    """Bytes that are not an image which can be stored; the message has the reason."""


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, such as ".jpg", or ""."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million names is slow


def is_image(name: str) -> bool:
    """Return whether a file name has an image's suffix."""
    return suffix_of(name) in SUFFIXES


def is_image_file(name: str, read_head: Callable[[], bytes]) -> bool:
    """Return whether a file has an image's suffix or, without any suffix, an image's first bytes.

    read_head: returns HEAD_BYTES from its start; called only for a file without a suffix.
    """
    suffix = suffix_of(name)
    return suffix in SUFFIXES or (not suffix and format_of(read_head()) is not None)


def format_of(data: bytes | memoryview, name: str = "") -> str | None:
    """Return the format of a file, named as in Pillow, from its first HEAD_BYTES; None if it is none that is read.

    name: its name, by which alone a TGA file is known. EPS, PDF and the like, which would run other programs, are not
    read.
    """
    head = bytes(data[:HEAD_BYTES])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF" if b"avif" in head[8:] else _FORMAT_OF_BRAND.get(head[8:12])
    found = next((of for start, of in _FORMAT_OF_START.items() if head.startswith(start)), None)
    return "TGA" if found is None and suffix_of(name) == ".tga" else found


def available_plugins() -> list[str]:
    """List the formats whose packages are installed, without importing those."""
    return [name for name, (module, _) in _EXTRAS.items() if importlib.util.find_spec(module) is not None]


def load_plugin(name: str) -> None:
    """Import what Pillow needs to read a format; raise ImageError, with what to install, where it is missing."""
    if name not in _EXTRAS:
        return
    module, extra = _EXTRAS[name]
    try:
        plugin = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImageError(f"{name} needs a package ({error}); pip install 'fastbyol[{extra}]'") from error
    except ImportError as error:
        raise ImageError(f"{name} needs {module}, which is installed: mend what its import lacks ({error})") from error
    if name == "HEIF":
        plugin.register_heif_opener()


def describe_ignored(ignored: Counter[str]) -> str:
    """Describe files that were passed over: "12 files: 7 .txt, 3 without a suffix, 2 links"."""
    parts = [f"{count} {kind}" for kind, count in ignored.most_common()]
    return f"{ignored.total()} files: {', '.join(parts[:8])}{', and others' * (len(parts) > 8)}"


def kind_of(name: str) -> str:
    """Return the kind of a file that is passed over: its suffix."""
    return suffix_of(name) or "without a suffix"

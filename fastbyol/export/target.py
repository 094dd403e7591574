"""Where an export goes: its format and its file, from the path and the format that were given."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastbyol.errors import require
from fastbyol.export import IN_FOLDER

SUFFIXES = {  # of the files of a format, the usual one first
    "safetensors": (".safetensors",),
    "pth": (".pth", ".pt", ".bin"),
    "timm": (".safetensors", ".pth", ".bin"),
    "detectron2": (".pkl",),
    "onnx": (".onnx",),
}
READERS = {  # of the files with a suffix, and the format that it stands for
    ".safetensors": ("fastbyol and timm", "safetensors"),
    ".pth": ("torchvision and timm", "pth"),
    ".pt": ("torchvision", "pth"),
    ".bin": ("torchvision and timm", "pth"),
    ".pkl": ("detectron2", "detectron2"),
    ".onnx": ("ONNX", "onnx"),
}
MARK = "fastbyol-eval export"  # in the files that an export writes beside the weights


class Target(NamedTuple):
    """The file of an export, its format, and whether a folder was asked for, whose README.md is the model card."""

    path: Path
    kind: str
    is_folder: bool


def is_folder(out: str) -> bool:
    """Tell whether OUT means a folder: one that exists, or a name without suffix or with a slash at its end."""
    return Path(out).is_dir() or out.endswith("/") or not Path(out).suffix


def choose(out: str, kind: str | None, *, folder_kind: str) -> Target:
    """Choose the file and the format for OUT, a file or a folder, and --format, None where it was not given.

    folder_kind: the format in a folder unless another is given. Raises ConfigError for a suffix that is of another
    format or of none.
    """
    path = Path(out)
    if is_folder(out):
        require(not path.is_file(), f"{path} is a file without a suffix; give {path}.safetensors, or another folder")
        chosen = kind or folder_kind
        return Target((path / IN_FOLDER).with_suffix(SUFFIXES[chosen][0]), chosen, is_folder=True)
    suffixes = tuple(READERS) if kind is None else SUFFIXES[kind]
    require(
        path.suffix in READERS,
        f"{path} ends in {path.suffix}; wanted a name in {', '.join(suffixes)}, or a folder, as in {path}/",
    )
    if kind is not None:
        reader, own = READERS[path.suffix]
        require(
            path.suffix in suffixes,
            f"{path} is a file for {reader} by its suffix, but --format is {kind}; give a name in "
            f"{', '.join(suffixes)}, or --format {own}",
        )
    return Target(path, kind or READERS[path.suffix][1], is_folder=False)


def require_own(path: Path) -> None:
    """Raise ConfigError where a file is there that no export wrote: the user did not name it, and may need it."""
    require(
        not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"),
        f"{path} is there already and comes from no export; give another folder",
    )

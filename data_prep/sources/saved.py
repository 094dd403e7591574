"""A folder as the datasets library writes it with save_to_disk: its arrow files in order, and the features it notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbyol.data_prep.sources.base import SourceError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
AGAIN = "copy it again, or save the data set again"


def files_of_saved(folder: Path) -> list[Path] | None:
    """List the files of a saved data set; None for another folder. Raise SourceError for a folder of several splits."""
    if (folder / SPLITS).is_file():
        splits = _texts(folder / SPLITS, _read(folder / SPLITS).get("splits"))
        raise SourceError(f"{folder}: holds the splits {', '.join(splits)}; give one of them, as {folder / splits[0]}")
    if not _is_saved(folder):
        return None
    state = _read(folder / STATE)
    if state.get("_indices_data_files"):
        raise SourceError(f"{folder}: an index chooses its rows; save it again with datasets 2 or newer")
    listed = state.get("_data_files")
    if listed == []:
        return []
    named = [each.get("filename") if isinstance(each, dict) else None for each in listed or ()]
    return [folder / name for name in _texts(folder / STATE, named)]


def features_of_saved(folder: Path) -> dict[str, Any]:
    """Return the features noted in a folder, by column; {} if it is no saved data set."""
    features = _read(folder / INFO).get("features") if _is_saved(folder) else None
    return features if isinstance(features, dict) else {}


def _is_saved(folder: Path) -> bool:
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file}: cannot be read: {error}; {AGAIN}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{file}: holds no names; {AGAIN}")
    return found


def _texts(file: Path, found: object) -> list[str]:
    """Return the names of files or folders that lie beside a file, as it lists them."""
    if not (isinstance(found, list) and found and all(isinstance(each, str) for each in found)):
        raise SourceError(f"{file}: lists no files or folders; {AGAIN}")
    for name in found:
        if name != Path(name).name:
            raise SourceError(f"{file}: {name!r:.60} does not lie beside it; {AGAIN}")
    return found

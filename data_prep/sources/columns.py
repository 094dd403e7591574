"""The columns of a table that hold images and labels, and the class names that Hugging Face's datasets notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pyarrow as pa

from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.listing import PATH_COLUMNS

IMAGE_NAMES = ("image", "img")  # preferred where several columns hold bytes
LABEL_NAME = "label"
BYTES_FIELD, PATH_FIELD = "bytes", "path"  # of a struct


Column = tuple[str, ...]  # a column and the fields inside it; () for none


class Columns(NamedTuple):
    """The columns to read; `declared` are the class names of the label, if the table or its folder has them.

    The file at a path counts where an image has no bytes.
    """

    data: Column
    path: Column
    label: Column
    declared: list[str] | None

    @property
    def used(self) -> list[Column]:
        """The columns that are there."""
        return [column for column in (self.data, self.path, self.label) if column]


def choose_columns(
    file: Path, schema: Any, label_column: str | None, *, features: Mapping[str, Any], has_labels: bool
) -> Columns:
    """Choose the columns of images and, if they are wanted, of labels; raise SourceError where that is not clear.

    features: those of the datasets library noted beside the table, which count before those in its schema.
    """
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{file}: two columns are named {twice!r}; rename one")
    declared = _declared_names(features or _noted(schema))
    label = _label(file, schema, declared, label_column) if has_labels else None
    return Columns(*_images(file, schema, label), (label,) if label else (), declared.get(label) if label else None)


def _declared_names(features: object) -> dict[str, list[str]]:
    """Return the class names of each label column in the features of the datasets library, whatever they are."""
    if not isinstance(features, dict):
        return {}
    facts = {name: each for name, each in features.items() if isinstance(each, dict)}
    names = {name: each.get("names") for name, each in facts.items() if each.get("_type") == "ClassLabel"}
    return {name: found for name, found in names.items() if is_list_of_texts(found)}


def is_list_of_texts(found: object) -> TypeGuard[list[str]]:
    """Return whether a value read from JSON is a list of texts."""
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _noted(schema: Any) -> object:
    """Return the features in the metadata of a schema; None if there are none."""
    try:
        features: object = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return features


def array_of(batch: Any, column: Column) -> Any:
    """Return the array of a column of a record batch."""
    found = batch.column(column[0])
    for field in column[1:]:
        found = found.flatten()[found.type.get_field_index(field)]
    return found


def _images(file: Path, schema: Any, label: str | None) -> tuple[Column, Column]:
    """Return the columns of bytes and paths: of the only column of images, or of that with a usual name."""
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    found = structs or [field.name for field in schema if _is_bytes(field.type)]
    texts = [] if found else [field.name for field in schema if _is_text(field.type) and field.name != label]
    found = found or [name for name in (*IMAGE_NAMES, *PATH_COLUMNS) if name in texts][:1]
    choice = [name for name in IMAGE_NAMES if name in found][:1] or found
    if len(choice) != 1:
        came = ", ".join(choice or schema.names)
        wanted = "one of image bytes, of paths, or a struct with a field 'bytes'; name it 'image'"
        raise SourceError(f"{file}: columns are {came}; wanted {wanted}")
    column = (choice[0],)
    if not structs:
        return ((), column) if texts else (column, ())
    has_path = _has_field(schema.field(choice[0]).type, PATH_FIELD, _is_text)
    return (*column, BYTES_FIELD), (*column, PATH_FIELD) if has_path else ()


def _label(file: Path, schema: Any, declared: Mapping[str, object], asked: str | None) -> str | None:
    """Return the column of labels: the one asked for, `label`, or the only one in the schema; None if there is none."""
    candidates = [asked] if asked else [LABEL_NAME] if LABEL_NAME in schema.names else sorted(declared)
    if len(candidates) > 1:
        raise SourceError(
            f"{file}: label columns are {', '.join(candidates)}; name one with --label-column, or give --labels none"
        )
    if not candidates:
        return None
    if candidates[0] not in schema.names:
        columns = ", ".join(schema.names)
        raise SourceError(f"{file}: no column {candidates[0]!r}; give one of {columns}, or --labels none")
    of = schema.field(candidates[0]).type
    if not (pa.types.is_integer(of) or _is_text(of)):
        raise SourceError(f"{file}: label column {candidates[0]!r} holds {of}; wanted whole numbers or names")
    return candidates[0]


def _is_image_struct(of: Any) -> bool:
    return bool(pa.types.is_struct(of)) and _has_field(of, BYTES_FIELD, _is_bytes)


def _has_field(struct: Any, name: str, is_wanted: Callable[[Any], bool]) -> bool:
    place = struct.get_field_index(name)
    return place >= 0 and is_wanted(struct.field(place).type)


def _is_bytes(of: Any) -> bool:
    return bool(pa.types.is_binary(of) or pa.types.is_large_binary(of) or pa.types.is_binary_view(of))


def _is_text(of: Any) -> bool:
    return bool(pa.types.is_string(of) or pa.types.is_large_string(of))

"""A description of a .beton: counts, classes, sizes, bytes, and how it was made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.beton import JPEG, UNLABELLED, Reader
from fastbyol.names import names_path

CLASSES_SHOWN = 10


def describe(reader: Reader) -> dict[str, Any]:
    """Describe a file in plain values that JSON can hold."""
    jpegs = int(np.count_nonzero(reader.modes == JPEG))
    return {
        "path": str(reader.path),
        "samples": len(reader),
        "fields": reader.field_names,
        "images": {"jpeg": jpegs, "raw": len(reader) - jpegs},
        "width_px": _statistics(reader.widths),
        "height_px": _statistics(reader.heights),
        "bytes_per_image": _statistics(reader.sizes),
        "image_bytes": int(reader.sizes.sum()),
        "file_bytes": reader.path.stat().st_size,
        "page_bytes": reader.page_bytes,
        "classes": _count_classes(reader),
        "unlabelled": len(reader) if reader.labels is None else int((reader.labels == UNLABELLED).sum()),
        "sidecar": {key: fact for key, fact in reader.sidecar.items() if key not in ("class_names", "checksum")},
        "has_checksum": "checksum" in reader.sidecar,
        "has_names": reader.names() is not None,
    }


def format_lines(facts: dict[str, Any]) -> list[str]:
    """Format a description for reading, one line per fact."""
    sidecar = facts["sidecar"]
    table = {
        "samples": f"{facts['samples']} ({facts['images']['jpeg']} JPEG, {facts['images']['raw']} raw)",
        "fields": ", ".join(facts["fields"]),
        "classes": _summarise(facts["classes"]),
        **({} if facts["unlabelled"] in (0, facts["samples"]) else {"without label": str(facts["unlabelled"])}),
        "width": "{min} / {median:g} / {max} px (min / median / max)".format(**facts["width_px"]),
        "height": "{min} / {median:g} / {max} px".format(**facts["height_px"]),
        "bytes per image": "{min} / {median:g} / {max}, mean {mean:.0f}".format(**facts["bytes_per_image"]),
        "file": f"{facts['file_bytes'] / 1e6:.1f} MB in pages of {facts['page_bytes'] >> 20} MiB",
        "source": sidecar.get("source", "unknown: no sidecar"),
        "settings": ", ".join(f"{key} {value}" for key, value in sidecar.get("settings", {}).items()) or "unknown",
        "skipped": str(len(sidecar.get("skipped", []))),
        "checksum": "in the sidecar" if facts["has_checksum"] else "none",
        "names": f"in {names_path(facts['path']).name}" if facts["has_names"] else "none",
    }
    return [facts["path"], *(f"  {name:16}{printable(text)}" for name, text in table.items())]


def _statistics(values: NDArray[np.int64]) -> dict[str, float]:
    """Return minimum, median, maximum and mean."""
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "max": int(values.max()),
        "mean": float(values.mean()),
    }


def _count_classes(reader: Reader) -> dict[str, int] | None:
    """Count the samples of each class, by name if the sidecar has names; None without labels."""
    if reader.labels is None:
        return None
    labels, counts = np.unique(reader.labels[reader.labels != UNLABELLED], return_counts=True)
    names = reader.class_names
    if names is None:
        return {str(label): int(count) for label, count in zip(labels, counts, strict=True)}
    of_label = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    return {name: of_label.get(label, 0) for label, name in enumerate(names)}


def printable(text: str) -> str:
    """Return text from a file, escaped if it would break the line or move the cursor."""
    return text if text.isprintable() else repr(text)


def _summarise(classes: dict[str, int] | None) -> str:
    """Summarise the number and sizes of the classes, and list them if they are few."""
    if not classes or not any(classes.values()):
        return "none (unlabelled)"
    counts = list(classes.values())
    text = f"{len(counts)}, of {min(counts)} / {np.median(counts):g} / {max(counts)} samples (min / median / max)"
    few = len(counts) <= CLASSES_SHOWN
    return text + (": " + ", ".join(f"{name} {count}" for name, count in classes.items()) if few else "")

"""Score files of a run folder: one for each protocol, training and validation file, the latest only."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fastbyol.errors import ConfigError
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder

Scores = dict[str, Any]


def save_scores(folder: RunFolder, scores: Scores) -> None:
    """Write the scores of fastbyol-eval, replacing earlier ones of the same protocol on the same two files.

    scores: "protocol", "train" and "val" (paths of the data), and the results; "fraction" where only part of the labels
    was used for training, "views" where a protocol has several, "bank" where only that many training images were used.
    Raises OSError.
    """
    folder.scores.mkdir(exist_ok=True)
    path = folder.scores / f"{_name(scores)}.json"
    if _is_of_others(path, scores):
        names = "\0".join(map(str, _files_of(scores))).encode("utf-8", "surrogateescape")
        path = path.with_name(f"{path.stem}-{hashlib.blake2b(names, digest_size=4).hexdigest()}.json")
    files.write(path, json.dumps(scores, indent=2) + "\n")


def _is_of_others(path: Path, scores: Scores) -> bool:
    """Tell whether a score file is of other images, in folders and files of the same names."""
    try:
        return path.exists() and _files_of(json.loads(path.read_text())) != _files_of(scores)
    except (ValueError, KeyError, TypeError):  # damaged: to be replaced
        return False


def _files_of(scores: Scores) -> tuple[Path, Path]:
    """Return the training and the validation file that scores are of."""
    return Path(scores["train"]).resolve(), Path(scores["val"]).resolve()


def _name(scores: Scores) -> str:
    """Name what a score is of: knn-bank-500-data-train-on-val, semi-0.01-cars-train-on-pets-val, quality-data-train."""
    part = f"{scores['fraction']:.2g}" if "fraction" in scores else str(scores.get("views", ""))
    bank = f"bank-{scores['bank']}" if "bank" in scores else ""
    train, val = _files_of(scores)
    elsewhere = "" if val.parent == train.parent else val.parent.name
    scored = () if val == train else ("on", elsewhere, val.stem)
    words = (scores["protocol"], part, bank, train.parent.name, train.stem, *scored)
    return "-".join(re.sub(r"[ /]", "-", word) for word in words if word)


def load_scores(folder: RunFolder) -> list[Scores]:
    """Read every score file of a run folder; raise ConfigError where a file holds no scores."""
    found: list[Scores] = []
    for path in sorted(folder.scores.glob("*.json")):
        try:
            scores = json.loads(path.read_text())
            found.append({**scores, "protocol": scores["protocol"], "train": scores["train"], "val": scores["val"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no score of fastbyol-eval ({error}); remove it") from error
    return found

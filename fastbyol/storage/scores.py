"""Score files of a run folder: one for each protocol and data set, the latest only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbyol.errors import ConfigError
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder

Scores = dict[str, Any]


def save_scores(folder: RunFolder, scores: Scores) -> None:
    """Write the scores of fastbyol-eval, replacing earlier ones of the same protocol on the same training file.

    scores: "protocol", "train" and "val" (paths of the data), and the results; "fraction" where only part of the labels
    was used for training, "views" where a protocol has several. Raises OSError.
    """
    path = Path(scores["train"]).resolve()
    words = [scores["protocol"], scores.get("views", ""), path.parent.name, path.stem]
    if "fraction" in scores:
        words[1] = f"{scores['fraction']:.2g}"
    name = "-".join(word.replace(" ", "-") for word in words if word)
    folder.scores.mkdir(exist_ok=True)
    files.write(folder.scores / f"{name}.json", json.dumps(scores, indent=2) + "\n")


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

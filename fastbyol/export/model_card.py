"""Model card of an exported encoder: network, data, length of training, scores and how to load it."""

from __future__ import annotations

import dataclasses
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastbyol.budget import format_duration
from fastbyol.config import Config, EncoderConfig, ObjectiveConfig, to_json
from fastbyol.export.formats import name_in
from fastbyol.export.target import MARK
from fastbyol.system.shell import quoted

LOADING = {
    "safetensors": 'encoder = fastbyol.load_encoder("{name}")',
    "pth": 'torchvision.models.{arch}().load_state_dict(torch.load("{name}", weights_only=True), strict=False)',
    "timm": 'timm.create_model("{arch}", num_classes=0, checkpoint_path="{name}")',
    "detectron2": 'MODEL.WEIGHTS "{name}", INPUT.FORMAT "RGB", PIXEL_MEAN [123.675, 116.28, 103.53], '
    "PIXEL_STD [58.395, 57.12, 57.375], RESNETS.STRIDE_IN_1X1 False",
    "onnx": 'onnxruntime.InferenceSession("{name}").run(None, {{"images": images}})',
}

FOLDER_LOADING = """timm.create_model("local-dir:{folder}", pretrained=True)
timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # once it is there
encoder = fastbyol.load_encoder("{folder}/{name}")"""

STATE_DICT_LOADING = 'state = torch.load("{name}", weights_only=True)  # a state dict with the names of {library}'


def render(
    config: Config,
    result: dict[str, Any],
    scores: list[dict[str, Any]],
    *,
    kind: str,
    name: str,
    features: int,
    folder: str | None = None,
    unfinished: dict[str, Any] | None = None,
) -> str:
    """Return the card, in Markdown, of the file `name` in format `kind` or, with `folder`, of a folder that holds it.

    result: "epochs", "images" and "elapsed_s" and, of a finished run, all of result.json; unfinished: the "step" and
    the "progress" of a checkpoint; scores: the score files of fastbyol-eval; features: length of a representation.
    """
    encoder = config.recipe.encoder
    colours = "RGB" if encoder.channels == 3 else "gray"
    length = f"{result['epochs']:.4g} epochs, {result['images']} images, {format_duration(result['elapsed_s'])}"
    if unfinished is not None:
        length += f"; **not finished**: step {unfinished['step']}, {unfinished['progress']:.0%} of the run"
    rows = {
        "network": f"{_network(encoder)}; images to {features} features",
        "method": _method(config),
        **({} if config.init is None else {"started from": _source(config.init)}),
        "data": f"{Path(config.data).name}",
        "budget": _budget(config),
        "trained for": length,
        "seed": str(config.seed),
        "input": f"{colours}, float32, ImageNet mean and std; evaluated at {config.recipe.eval_px} px",
        "versions": f"fastbyol {_version()}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""{_hub_facts(kind) if folder else ""}# {folder or name}

| | |
|---|---|
{table}

## Load
```
{_loading(config, kind=kind, name=name, folder=folder)}
```

## Scores
{_scores(result, scores)}

## Train it again
```
{_command(config, result)}
```

## Configuration
```json
{to_json(_without_places(config) if folder else config).rstrip()}
```

Written by {MARK}.
"""


def _without_places(config: Config) -> Config:
    """Leave out where the data lies: a folder may be put on a hub, where paths of a machine have no place."""
    val, labelled = (None if place is None else Path(place).name for place in (config.val, config.labelled))
    init = None if config.init is None else _source(config.init)
    return dataclasses.replace(config, data=Path(config.data).name, val=val, labelled=labelled, init=init)


def _source(init: str) -> str:
    """Return what --init named without the place of a file."""
    return init if init.partition(":")[0] in ("torchvision", "timm") else Path(init).name


def _network(encoder: EncoderConfig) -> str:
    if ":" in encoder.arch:
        return encoder.arch
    return f"{encoder.arch}, width {encoder.width:g}, stem {encoder.stem}"


def _method(config: Config) -> str:
    """Describe the method, and say that no labels were used where that is sure."""
    objective = config.recipe.objective
    is_byol = objective == ObjectiveConfig() and config.recipe.head.predictor_depth > 0
    name = "BYOL (arXiv 2006.07733), recipe" if is_byol else "recipe"
    return f"{name} {config.recipe.name}" + (", no labels used" if config.init is None else "")


def _hub_facts(kind: str) -> str:
    """Return the head of a README.md by which a hub files a model; its licence is the owner's to add."""
    library = "timm" if kind == "timm" else "fastbyol"
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(("image-feature-extraction", library, "fastbyol", "byol")))
    return f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\ntags:\n{tags}\n---\n"


def _loading(config: Config, *, kind: str, name: str, folder: str | None) -> str:
    encoder = config.recipe.encoder
    arch = name_in("timm" if kind == "timm" else "torchvision", encoder)
    library = encoder.arch.partition(":")[0] if ":" in encoder.arch else "torchvision"
    if kind == "pth" and arch is None:
        line = STATE_DICT_LOADING
    elif kind == "timm" and folder:
        line = FOLDER_LOADING
    else:
        line = LOADING[kind]
    if kind == "timm" and encoder.channels != 3:
        line = line.replace("num_classes=0", f"num_classes=0, in_chans={encoder.channels}")
    return line.format(name=name, arch=arch, folder=folder, library=library)


def _budget(config: Config) -> str:
    if config.deadline is not None:
        return f"until {datetime.fromtimestamp(config.deadline).isoformat(' ', 'minutes')}"
    return "none (a number of epochs)" if config.budget_s is None else format_duration(config.budget_s)


def _version() -> str:
    try:
        return version("fastbyol")
    except PackageNotFoundError:
        return "of a checkout"


def _scores(result: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """Return a row for each score, with the files it comes from: the images that are learned from, and those scored."""
    lines = ["| protocol | trained | reference | training file | validation file |", "|---|---|---|---|---|"]
    if result.get("knn_top1") is not None:
        lines.append(
            f"| kNN within the run | {result['knn_top1']:.2f} % | {_percent(result.get('knn_top1_random_init'))} | | |"
        )
    for row in scores:
        reference = next((f"{_headline(row[k])} ({k})" for k in ("random_init", "supervised") if k in row), "")
        places = f"{Path(row['train']).name} | {Path(row['val']).name}"
        lines.append(f"| {_protocol(row)} | {_headline(row['trained'])} | {reference} | {places} |")
    return "\n".join(lines)


def _protocol(row: dict[str, Any]) -> str:
    """Name a protocol with the settings that make it a score of its own."""
    parts = [
        row["protocol"],
        f"{row['fraction']:.3g} of the labels" if "fraction" in row else "",
        str(row.get("views", "")),
        f"bank of {row['bank']}" if "bank" in row else "",
        f"at {row['unfinished']['progress']:.0%} of the run" if "unfinished" in row else "",
    ]
    return ", ".join(part for part in parts if part)


def _headline(scored: dict[str, Any]) -> str:
    if "rankme" in scored:
        return f"RankMe {scored['rankme']:.1f}"
    return _percent(next((scored[key] for key in ("score", "miou", "top1") if key in scored), None))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _command(config: Config, result: dict[str, Any]) -> str:
    if config.budget_s is not None:
        length = f"--budget {config.budget_s:g}s"
    else:
        length = f"--epochs {config.epochs or result['epochs']:g}"  # a deadline is past
    val = f" --val {quoted(Path(config.val).name)}" if config.val else ""
    data = quoted(Path(config.data).name)
    command = f"fastbyol-train {quoted(config.recipe.name)} --data {data}{val} {length} --seed {config.seed}"
    return f"{command}\n# and the settings below"

"""Weights that a run starts from or an evaluation scores: of a run, a file, or a package's network by its name.

The forms, by what the text names:

    RUN                  a run folder: encoder and heads of its newest checkpoint, or its encoder alone
    RUN/checkpoints/...  one checkpoint
    FOLDER               what fastbyol-eval export wrote into a folder
    FILE                 encoder.safetensors or another safetensors or .pth with torchvision's names, DeepMind's .pkl
    torchvision:resnet50, timm:NAME   the package's pretrained weights
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastbyol.config import Config, EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.export import IN_FOLDER
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from fastbyol.weights import deepmind, packages

FORMS = "give a run folder, a checkpoint, a .safetensors or .pth of an encoder, torchvision:NAME or timm:NAME"
WRAPPERS = ("state_dict", "model")  # the entry of a training checkpoint that holds the weights
HEADS = ("projector.", "predictor.", "local_predictor.")
PREFIX = "online.encoder."  # of the encoder's tensors in a checkpoint


@dataclass(frozen=True)
class Weights:
    """Tensors of an encoder, perhaps among others, and of heads, by the names of our networks.

    source: what they were read from. config: the encoder's, None where the source does not say. run: the configuration
    of the run they come from, if they do. is_exported: they are an encoder that fastbyol wrote to a file.
    """

    source: str
    encoder: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    config: EncoderConfig | None = None
    run: Config | None = None
    is_exported: bool = False

    @property
    def digest(self) -> str:
        """The digest of all tensors, by which a resumed run knows the weights it began with."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted((self.encoder | self.heads).items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def check_source(text: str) -> None:
    """Raise ConfigError for a text that names no weights, before they are read."""
    is_named = text.partition(":")[0] in packages.PACKAGES and ":" in text
    require(is_named or Path(text).exists(), f"{text} does not exist; {FORMS}")


def read(text: str) -> Weights:
    """Read the weights that a text names; raise ConfigError or CheckpointError where that cannot be done."""
    check_source(text)
    package, _, name = text.partition(":")
    if package in packages.PACKAGES and not Path(text).exists():
        return Weights(text, packages.pretrained(package, name))
    path = Path(text)
    try:
        if (path / IN_FOLDER).is_file():
            return _of_safetensors(path / IN_FOLDER)
        if path.is_dir():
            return _of_run(RunFolder(path))
        if checkpoint.is_checkpoint(path):
            return _of_state(text, checkpoint.load(path), RunFolder(path.resolve().parent.parent))
        if deepmind.is_checkpoint(path):
            config, encoder, heads = deepmind.load(path)
            return Weights(text, encoder, heads, config)
        return _of_safetensors(path) if path.suffix == ".safetensors" else _of_pth(path)
    except OSError as error:
        raise ConfigError(f"{text} cannot be read ({error.strerror or error}); {FORMS}") from error


def _of_run(folder: RunFolder) -> Weights:
    config = folder.read_config()
    if checkpoint.exists(folder.checkpoints):
        state, damaged = checkpoint.load_newest(folder.checkpoints)
        require(not damaged, "; ".join(damaged) + "; give a checkpoint of the run that is whole")
        return _of_state(str(folder.path), state, folder)
    require(
        folder.encoder.exists(), f"{folder.path} holds neither a checkpoint nor an encoder; give a run that has trained"
    )
    found = _of_safetensors(folder.encoder)
    return Weights(str(folder.path), found.encoder, {}, found.config, config)


def _of_state(source: str, state: dict[str, Any], folder: RunFolder) -> Weights:
    """Take the online network out of the state of a run."""
    require("model" in state, f"{source} holds no state of a run; {FORMS}")
    tensors = state["model"]
    inner = {name.removeprefix("online."): value for name, value in tensors.items() if not name.startswith("target.")}
    heads = {name: value for name, value in inner.items() if name.startswith(HEADS)}
    run = folder.read_config()
    return Weights(source, online_encoder(state), heads, run.recipe.encoder, run)


def online_encoder(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the online encoder's tensors by its own names, from the state of a run; raise KeyError if that is none."""
    named: dict[str, Tensor] = state["model"]
    return {name.removeprefix(PREFIX): value for name, value in named.items() if name.startswith(PREFIX)}


def _of_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("fastbyol")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        config = None if written is None else EncoderConfig(**json.loads(written))
        return Weights(str(path), tensors, config=config, is_exported=written is not None)
    except (SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no encoder ({error}); {FORMS}") from error


def _of_pth(path: Path) -> Weights:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} does not load as weights alone ({reason}); {FORMS}") from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    tensors = (
        {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    require(bool(tensors), f"{path} holds no tensors by name; {FORMS}")
    return Weights(str(path), tensors)

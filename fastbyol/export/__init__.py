"""Encoder file of a run: safetensors with torchvision's parameter names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastbyol.config import EncoderConfig
from fastbyol.encoder import ResNet
from fastbyol.errors import ConfigError
from fastbyol.storage import files

NAME = "encoder.safetensors"  # in a run folder


def save_encoder(path: Path, encoder: ResNet, config: EncoderConfig) -> None:
    """Write weights and batch-norm buffers, with the architecture in the file's metadata; atomic."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    metadata = {"format": "pt", "fastbyol": json.dumps(dataclasses.asdict(config))}
    with files.replacement(path) as file:
        file.write(save(tensors, metadata=metadata))


def load_encoder(path: str | os.PathLike[str]) -> ResNet:
    """Load an encoder from a file of save_encoder or from a run folder, in evaluation mode.

    Raises ConfigError when the file is not one of save_encoder's.
    """
    if Path(path).is_dir():
        path = Path(path) / NAME
    try:
        with safe_open(path, framework="pt") as file:
            config = EncoderConfig(**json.loads(file.metadata()["fastbyol"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        encoder = ResNet(config)
        encoder.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{path} is not an encoder exported by fastbyol ({error}); give a folder in which fastbyol-train finished"
        ) from error
    return encoder.eval()

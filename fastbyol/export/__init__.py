"""Encoder file of a run: safetensors with torchvision's parameter names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.parts import Encoder, build_encoder
from fastbyol.registry import ENCODERS
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder


def save_encoder(path: Path, encoder: Encoder, config: EncoderConfig) -> None:
    """Write weights and batch-norm buffers, with the architecture in the file's metadata; atomic."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    metadata = {"format": "pt", "fastbyol": json.dumps(dataclasses.asdict(config))}
    with files.replacement(path) as file:
        file.write(save(tensors, metadata=metadata))


def load_encoder(path: str | os.PathLike[str], *, trust: bool = False) -> Encoder:
    """Load an encoder from a file of save_encoder or from a run folder, in evaluation mode.

    trust: import the module of an encoder that is not one of ENCODERS, as the file's metadata name it. Loading such a
    file runs code that its author chose. Raises ConfigError for such a file without `trust`, and for a file that is not
    one of save_encoder's.
    """
    if Path(path).is_dir():
        path = RunFolder(Path(path)).encoder
    try:
        with safe_open(path, framework="pt") as file:
            config = EncoderConfig(**json.loads(file.metadata()["fastbyol"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if config.arch not in ENCODERS and not trust:
            raise ConfigError(
                f"{path} wants code of its own, {config.arch!r}, which could do anything; if you trust whoever made "
                "the file, give load_encoder(..., trust=True)"
            )
        encoder = build_encoder(config, seed=None)
        encoder.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} is not an encoder exported by fastbyol ({error}); give a folder in which fastbyol-train finished"
        ) from error
    return encoder.eval()

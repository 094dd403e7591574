"""Encoder file of a run: safetensors with torchvision's parameter names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.export.network import ordinary
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.registry import ENCODERS
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder

IN_FOLDER = "model.safetensors"  # the encoder's file in an exported folder: timm and hubs look for this name


def save_encoder(path: Path, encoder: Encoder, config: EncoderConfig) -> None:
    """Write weights and batch-norm buffers, with the architecture in the file's metadata; atomic.

    Equal weights give equal bytes. A tensor that several names share is written under each of them.
    """
    tensors: dict[str, Tensor] = {}
    places = set[int]()  # in memory, of which a file of this format may name each once
    for name, value in encoder.state_dict().items():
        own = value.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        tensors[name] = own.clone() if place in places else own
        places.add(place)
    metadata = {"format": "pt", "fastbyol": json.dumps(dataclasses.asdict(config))}
    with files.replacement(path) as file:
        file.write(_with_sorted_metadata(save(tensors, metadata=metadata)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in a random order.

    Source: the format, https://huggingface.co/docs/safetensors: 8 bytes of size, the header as JSON, the tensors.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_encoder(path: str | os.PathLike[str], *, trust: bool = False) -> Encoder:
    """Load the encoder of a run folder, or an exported one, as an ordinary torch.nn.Module in evaluation mode.

    path: the folder of a finished run, a .safetensors that fastbyol wrote, or an exported folder that holds one.

    It maps images [N, 3, H, W] to representations [N, features], where `encoder.features` is 2048 for a ResNet-50 and
    512 for a ResNet-18, both of width 1, and `encoder.feature_map(images)` is the map [N, features, h, w] before the
    mean over it. Images are float32 RGB from 0 to 1, normalised by mean (0.485, 0.456, 0.406) and std (0.229, 0.224,
    0.225), of any size; those of the run's own evaluation have the `eval_px` of its config.json a side. Other layouts,
    types and devices raise ConfigError with what to give. Images in channels-last memory are computed faster.

    A ResNet consists of torch's own layers and equals torchvision's of the same weights, also in train mode: there a
    batch is one population for the batch norms, whose running statistics move. torch.compile, torch.export,
    torch.jit.script and trace, copies and pickles work as with any module.

    trust: import the module of an encoder that is not one of ENCODERS, as the file's metadata name it. Loading such a
    file runs code that its author chose. Raises ConfigError for such a file without `trust`, and for a file that is not
    one of save_encoder's.
    """
    return ordinary(load_fused(path, trust=trust))


def load_fused(path: str | os.PathLike[str], *, trust: bool = False) -> Encoder:
    """Load an encoder as load_encoder does, but of the layers that runs and protocols use, fused on a GPU.

    In train mode, too, its batch norms take a batch as one population.
    """
    if Path(path).is_dir():
        own, exported = RunFolder(Path(path)).encoder, Path(path) / IN_FOLDER
        path = exported if exported.is_file() and not own.exists() else own
    try:
        with safe_open(path, framework="pt") as file:
            config = EncoderConfig(**json.loads(file.metadata()["fastbyol"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if config.arch not in ENCODERS and not trust:
            raise ConfigError(
                f"{path} wants code of its own, {config.arch!r}, which could do anything; if you trust whoever made "
                "the file, give load_encoder(..., trust=True)"
            )
        encoder = build_encoder(config, seed=None, views=1)
        encoder.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} is not an encoder exported by fastbyol ({error}); give a folder in which fastbyol-train finished, "
            "or what fastbyol-eval export made of one that has not"
        ) from error
    return encoder.eval()

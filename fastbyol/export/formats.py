"""Writers of encoders in the formats of torchvision, timm, detectron2 and ONNX.

torchvision and timm use the same parameter names. detectron2 calls the stem `stem.conv1`, layer1..4 `res2..5`, a batch
norm `convN.norm` and the projection `shortcut`. Source: the loaders of torchvision 0.28, timm 1.0 and detectron2 0.6.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.export import save_encoder
from fastbyol.export.target import MARK
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD, LUMA
from fastbyol.model.foreign import fixed_px
from fastbyol.model.parts import Encoder
from fastbyol.storage import files

DETECTRON2_NAMES = (  # applied in this order
    (re.compile(r"^(conv1|bn1)\b"), r"stem.\1"),
    (re.compile(r"^layer([1-4])\b"), lambda match: f"res{int(match[1]) + 1}"),
    (re.compile(r"\bdownsample\.0\b"), "shortcut"),
    (re.compile(r"\bdownsample\.1\b"), "shortcut.norm"),
    (re.compile(r"\bbn([1-3])\b"), r"conv\1.norm"),
)
STANDARD = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")  # torchvision's and timm's
OPSET = 18  # torch's own default for ONNX


class EvalView(NamedTuple):
    """What the encoder is evaluated on: squares of px pixels a side, of `margin` times the short side of an image."""

    px: int
    margin: float


def detectron2_name(name: str) -> str:
    """Convert torchvision's name of a parameter to detectron2's."""
    for pattern, replacement in DETECTRON2_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}


def name_in(library: str, config: EncoderConfig) -> str | None:
    """Return the name by which "timm" or "torchvision" builds the network; None where it cannot by a name alone."""
    prefix, colon, name = config.arch.partition(":")
    if config.channels != 3 and library == "torchvision":
        return None
    if colon:
        return name if prefix == library else None
    is_usual = (config.width, config.stem, config.padding) == (1, "imagenet", "symmetric")
    return config.arch if is_usual and config.arch in STANDARD else None


def _require_name(config: EncoderConfig, kind: str) -> str:
    """Return the network's name in another library; raise ConfigError where that has none."""
    name = name_in("torchvision" if kind == "detectron2" else kind, config)
    require(
        name in STANDARD or (kind == "timm" and name is not None),
        f"the encoder is a {config.arch} of width {config.width:g} with stem {config.stem}, padding {config.padding} "
        f"for images of {config.channels} channels; {kind} only has ResNets of width 1 with the ImageNet stem and "
        f"symmetric padding{'' if kind == 'timm' else ' for RGB'}; give --format safetensors, pth or onnx",
    )
    return str(name)


def write_safetensors(path: Path, encoder: Encoder, config: EncoderConfig, view: EvalView) -> None:
    """Write safetensors for fastbyol.load_encoder, with torchvision's names."""
    del view
    save_encoder(path, encoder, config)


def write_pth(path: Path, encoder: Encoder, config: EncoderConfig, view: EvalView) -> None:
    """Write a state dict with torchvision's names, for torch.load(weights_only=True)."""
    del config, view
    with files.replacement(path) as file:
        torch.save(_tensors(encoder), file)


def write_timm(path: Path, encoder: Encoder, config: EncoderConfig, view: EvalView) -> None:
    """Write the weights for timm.create_model(arch, num_classes=0), and timm's config.json beside them.

    As model.safetensors in a folder of their own they are timm's layout, for "local-dir:FOLDER" and for a hub.
    """
    name = _require_name(config, "timm")
    (write_safetensors if path.suffix == ".safetensors" else write_pth)(path, encoder, config, view)
    layers = {"first_conv": "conv1", "classifier": "fc"} if config.arch in STANDARD else {}  # else timm's own
    mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if config.channels == 1:  # as Encoder.take_channels makes gray images
        mean, std = (
            [float(sum(weight * value for weight, value in zip(LUMA, each, strict=True)))]
            for each in (IMAGENET_MEAN, IMAGENET_STD)
        )
    model_config: dict[str, Any] = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.features,
        "global_pool": "avg",
        "written_by": MARK,
        "pretrained_cfg": {
            "input_size": [config.channels, view.px, view.px],
            "crop_pct": view.margin,
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            **layers,
        },
    }
    if config.channels != 3:
        model_config["model_args"] = {"in_chans": config.channels}
    files.write(path.with_name("config.json"), json.dumps(model_config, indent=2) + "\n")


def write_detectron2(path: Path, encoder: Encoder, config: EncoderConfig, view: EvalView) -> None:
    """Write the pickle that detectron2's checkpointer loads as MODEL.WEIGHTS.

    The model expects RGB images, PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375] and
    RESNETS.STRIDE_IN_1X1 False.
    """
    del view
    _require_name(config, "detectron2")
    arrays = {
        detectron2_name(name): value.numpy()
        for name, value in _tensors(encoder).items()
        if not name.endswith("num_batches_tracked")  # detectron2 has no such buffer
    }
    with files.replacement(path) as file:
        pickle.dump({"model": arrays, "__author__": "fastbyol", "matching_heuristics": True}, file)


@contextmanager
def _mute_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def write_onnx(path: Path, encoder: Encoder, config: EncoderConfig, view: EvalView) -> None:
    """Write an ONNX graph from float32 images [N, 3, H, W] to representations [N, features], with N, H and W dynamic,
    or N alone where the network takes images of one size.

    Raises ConfigError where the package onnxscript is missing.
    """
    del config
    require(
        importlib.util.find_spec("onnxscript") is not None,
        "--format onnx needs the package onnxscript; pip install 'fastbyol[onnx]', or choose another --format",
    )
    images = torch.zeros(2, 3, view.px, view.px, device=next(encoder.parameters()).device)
    moving = (0, 2, 3) if fixed_px(getattr(encoder, "network", encoder)) is None else (0,)
    with warnings.catch_warnings(), _mute_logging():
        warnings.simplefilter("ignore")  # torch warns of its own exporter and of a missing torchvision
        program: Any = torch.onnx.export(
            encoder.eval(),
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["representations"],
            dynamic_shapes=(dict.fromkeys(moving, torch.export.Dim.DYNAMIC),),
            opset_version=OPSET,
            verbose=False,
        )
    with files.replacement(path) as file:
        file.write(program.model_proto.SerializeToString())


Writer = Callable[[Path, Encoder, EncoderConfig, EvalView], None]
FORMATS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "pth": write_pth,
    "timm": write_timm,
    "detectron2": write_detectron2,
    "onnx": write_onnx,
}


def write(kind: str, path: Path, encoder: Encoder, config: EncoderConfig, *, px: int, margin: float = 1.0) -> None:
    """Write an encoder in format `kind`; px, margin: the evaluation view, written as the input size and the crop.

    Raises ConfigError where the format does not exist or cannot represent the encoder.
    """
    if kind not in FORMATS:
        raise ConfigError(f"no format {kind!r}; choose one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[kind](path, encoder, config, EvalView(px, margin))

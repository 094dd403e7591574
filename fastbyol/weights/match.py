"""Weights matched with a network by name and shape: what fits is taken, what does not is said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError, require
from fastbyol.model.resnet import ARCHS, Bottleneck

CLASSIFIER = (
    "fc.",
    "head.",
    "heads.",
    "head_dist.",
    "last_linear.",
    "classifier.",
)  # of torchvision's and timm's networks
COUNTER = "num_batches_tracked"  # of a batch norm: some libraries do not keep it, and nothing here uses it
SHOWN = 4  # names in a message


def match(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors for every name in `wanted`, and a text on those that are left over ("" for none).

    All names may have a prefix, as in a whole model's file ("module.encoder.conv1.weight"). A classifier is left out,
    and so is what lies outside the prefix. Raises ConfigError that names what is missing, too much, of another shape or
    not finite.
    """
    prefix = _prefix(given, wanted)
    inside = {name: given[prefix + name] for name in _inside(given, prefix)}
    missing = [name for name in wanted if name not in inside and not name.endswith(COUNTER)]
    extra = [name for name in inside if name not in wanted and not name.startswith(CLASSIFIER)]
    shapes = [
        f"{name} is {list(inside[name].shape)}, wanted {list(wanted[name].shape)}"
        for name in wanted
        if name in inside and inside[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{len(missing)} of its tensors are missing ({listed(missing)})" if missing else "",
        f"{len(extra)} are too many ({listed(extra)})" if extra else "",
        f"{len(shapes)} have another shape ({listed(shapes)})" if shapes else "",
    ]
    if any(complaints):
        raise ConfigError(
            f"{source} does not fit the encoder: {'; '.join(filter(None, complaints))}; give weights of the same "
            "network, or change the recipe's, as in RECIPE+arch=resnet50+width=1+stem=imagenet+padding=symmetric"
        )
    left = [name for name in given if name.removeprefix(prefix) not in wanted or not name.startswith(prefix)]
    taken = {name: inside.get(name, tensor) for name, tensor in wanted.items()}
    check_finite(taken, wanted, source=source, prefix=prefix)
    return taken, f"{listed(left)} {'is' if len(left) == 1 else 'are'} not used" if left else ""


def check_finite(taken: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str, prefix: str = "") -> None:
    """Raise ConfigError that names the first tensor with NaN or Inf in the dtype of its place, under its prefix.

    What the network itself has there, such as a mask of -inf, may stay.
    """
    for name, tensor in taken.items():
        own = wanted[name]
        found = tensor.to(own.dtype)
        require(
            bool(found.isfinite().all()) or torch.equal(found.to(own.device), own),
            f"{source} has NaN or Inf in {prefix}{name}; give weights of a training that did not diverge",
        )


def recognize(given: Mapping[str, Tensor], *, source: str) -> EncoderConfig:
    """Return the configuration of the ResNet that tensors are of, by their names and shapes.

    Its padding, which no tensor shows, is taken to be torchvision's. Raises ConfigError where it is none of ours, and
    for the stems of small images, which differ in their stride alone.
    """
    stems = [name for name, value in given.items() if name.endswith("conv1.weight") and value.shape[1:2] == (3,)]
    require(len(stems) == 1, f"{source} is no ResNet, or holds several; give the weights of one, or of a run")
    prefix, stem = stems[0].removesuffix("conv1.weight"), given[stems[0]]
    require(
        stem.shape[2:] == (7, 7),
        f"{source} does not say what its stem of {'x'.join(map(str, stem.shape[2:]))} strides; give the folder of its "
        "run, or that run's encoder.safetensors",
    )
    names = [re.match(r"layer(\d+)\.(\d+)\.", name) for name in _inside(given, prefix)]
    blocks = {(int(name[1]), int(name[2])) for name in names if name}
    depths = tuple(Counter(stage for stage, _ in sorted(blocks)).values())
    has_bottlenecks = f"{prefix}layer1.0.conv3.weight" in given
    for arch, (block, known) in ARCHS.items():
        if known == depths and (block is Bottleneck) == has_bottlenecks:
            return EncoderConfig(arch, len(stem) / 64)
    raise ConfigError(f"{source} has stages of {depths} blocks; give weights of one of {', '.join(ARCHS)}, or of a run")


def _inside(given: Iterable[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in given if name.startswith(prefix)]


def _prefix(given: Iterable[str], wanted: Mapping[str, Tensor]) -> str:
    """Return the prefix before all wanted names, "" unless exactly one fits."""
    names = set(given)
    first = next(iter(wanted))
    needed = [name for name in wanted if not name.endswith(COUNTER)]
    found = {name[: -len(first)] for name in names if name.endswith(first)}
    fitting = [prefix for prefix in found if all(prefix + name in names for name in needed)]
    return fitting[0] if len(fitting) == 1 else ""


def listed(names: list[str]) -> str:
    """List the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""Checkpoints of DeepMind's released BYOL: read without running what they name, and renamed for our networks.

Such a file is a pickle, by dill, of {"experiment_state", "step", "rng"}. The state has `online_params` and
`online_state`, mappings of haiku's module names ("res_net50/~/block_group_0/~/block_1/~/conv_2") to arrays.
Convolutions are stored as height, width, inputs, outputs and linear layers as inputs, outputs; the running statistics
are the `average` of mean_ema and var_ema. The networks pad as EncoderConfig's "same". Source: byol/ of
github.com/google-deepmind/deepmind-research (byol_experiment.py, utils/networks.py, utils/checkpointing.py) and haiku's
nets/resnet.py and batch_norm.py.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError, require

Tree = Mapping[str, Mapping[str, np.ndarray]]  # module -> name -> array
MARK, MARK_WITHIN = b"experiment_state", 4096  # bytes of the file
INERT = {"byol", "haiku", "jax", "jaxlib", "optax"}  # packages whose classes become records
RESNET = re.compile(r"res_net(50|101|152|200)/~/")
BLOCK = re.compile(r"block_group_(\d)/~/block_(\d+)/~/(shortcut_)?(conv|batchnorm)(?:_(\d))?")
HEAD_LAYERS = {"linear": 0, "batch_norm": 1, "linear_1": 3}  # their places in our MLP


class Record:
    """What a pickled object of a class that is not ours was made from: `args` and, by name, `fields`."""

    names: tuple[str, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args, self.fields = args, dict(zip(self.names, args, strict=False))

    def __new__(cls, *args: Any) -> Record:  # as pickle makes a namedtuple, without __init__
        made = super().__new__(cls)
        made.__init__(*args)  # type: ignore[misc]  # on purpose
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields |= state


def _record(names: tuple[str, ...] = ()) -> type[Record]:
    return type("Record", (Record,), {"names": names})


def _namedtuple(_: str, names: Any, *__: Any) -> type[Record]:
    return _record(tuple(names.split() if isinstance(names, str) else names))


def _array(make: Any, args: Any, state: Any, *_: Any) -> Any:
    array = make(*args)
    array.__setstate__(state)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    require(encoding == "latin1", f"a pickle with text in {encoding!r}; those of arrays are latin1")
    return text.encode("latin1")


# the fields of their experiment's state, where a file names the class and does not describe it
STATE = ("online_params", "target_params", "online_state", "target_state", "opt_state")
KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): dict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("dill._dill", "_create_array"): _array,
    ("dill._dill", "_create_namedtuple"): _namedtuple,
    ("dill.dill", "_create_namedtuple"): _namedtuple,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): np.float32(0).__reduce__()[0] for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes arrays and plain values, and records of everything else; it imports and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if name == "_ByolExperimentState":
            return _record(STATE)
        if module.partition(".")[0] in INERT:
            return _record()
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such checkpoint needs and which was not run")


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file looks like one of theirs."""
    with path.open("rb") as file:
        start = file.read(MARK_WITHIN)
    return start[:1] == b"\x80" and MARK in start


def load(path: Path) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Return the online network of a checkpoint: its encoder's configuration and tensors, and those of its heads.

    Tensors have the names of our networks: "conv1.weight", "projector.0.weight". Raises ConfigError for another file,
    and for networks other than post-activation ResNets of bottlenecks, which their published checkpoints are.
    """
    try:
        with path.open("rb") as file:
            params, state = _online(_Unpickler(file).load())
        return _convert(params, state)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no checkpoint of DeepMind's BYOL that can be read ({error}); give one as their main_loop.py "
            "writes it, such as pretrain_res50x1.pkl"
        ) from error


def _online(contents: Any) -> tuple[Tree, Tree]:
    found = contents["experiment_state"]
    fields = found if isinstance(found, dict) else found.fields
    params, state = (_mapping(fields[name]) for name in ("online_params", "online_state"))
    return tuple({name: _mapping(arrays) for name, arrays in tree.items()} for tree in (params, state))  # type: ignore[return-value]  # two


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping of haiku's as a dict: itself, or what it was made from."""
    while isinstance(value, Record):
        value = value.args[0] if value.args else value.fields["_storage"]
    require(isinstance(value, dict), f"a {type(value).__name__} where parameters should be; wanted a mapping")
    return dict(value)


def _convert(params: Tree, state: Tree) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Tensor]]:
    depths = {match[1] for match in map(RESNET.match, params) if match}
    bottleneck = any(name.endswith("block_group_0/~/block_0/~/conv_2") for name in params)
    before = any(name.endswith("/final_batchnorm") for name in params)
    require(
        len(depths) == 1 and bottleneck and not before,
        f"the checkpoint's networks are {', '.join(sorted({name.split('/')[0] for name in params}))}; wanted an online "
        "network with a ResNet-50, -101, -152 or -200 that normalises after its convolutions, as they published",
    )
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for module, arrays in params.items():
        prefix = RESNET.match(module)
        if prefix:
            name = _layer_name(module[prefix.end() :])
            encoder |= dict(_tensors(name, arrays, module, state))
        elif module.split("/")[0] in ("projector", "predictor"):
            head, layer = module.split("/")
            heads |= dict(_tensors(f"{head}.{HEAD_LAYERS[layer]}", arrays, module, state))
    width = len(encoder["conv1.weight"]) / 64
    return EncoderConfig(f"resnet{depths.pop()}", width, padding="same"), encoder, heads


def _layer_name(module: str) -> str:
    """Convert haiku's name of a layer of the encoder to torchvision's."""
    if module in ("initial_conv", "initial_batchnorm"):
        return "conv1" if module == "initial_conv" else "bn1"
    match = BLOCK.fullmatch(module)
    require(match is not None, f"the checkpoint has a layer {module}; wanted those of a post-activation ResNet")
    assert match is not None
    group, block, shortcut, kind, number = match.groups()
    inside = f"{kind.replace('batchnorm', 'bn')}{int(number or 0) + 1}"
    if shortcut:
        inside = "downsample.0" if kind == "conv" else "downsample.1"
    return f"layer{int(group) + 1}.{block}.{inside}"


def _tensors(name: str, arrays: Mapping[str, np.ndarray], module: str, state: Tree) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layer, with the running statistics of a batch norm."""
    for key, array in arrays.items():
        if key == "w":
            yield f"{name}.weight", _tensor(array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0)))
        else:
            yield f"{name}.{'weight' if key == 'scale' else 'bias'}", _tensor(array.reshape(-1))
    if "scale" in arrays:
        for kind in ("mean", "var"):
            average = state[f"{module}/~/{kind}_ema"]["average"]
            yield f"{name}.running_{kind}", _tensor(average.reshape(-1))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy, in the order of its axes

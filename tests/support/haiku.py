"""Random weights in the layout of DeepMind's released BYOL, drawn without their packages, and the file they lie in."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

Tree = dict[str, dict[str, np.ndarray]]
HIDDEN, OUT = 48, 16  # of the heads
TABLE = 100_003  # random numbers, repeated


class Network(NamedTuple):
    """Parameters and state of an online network, as hk.transform_with_state returns them."""

    params: Tree
    state: Tree


def _convolutions(depths: tuple[int, ...], width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the name of each convolution of a ResNet of bottlenecks, its batch norm's, and its shape."""
    yield "initial_conv", "initial_batchnorm", (7, 7, 3, 64 * width)
    inputs = 64 * width
    for group, depth in enumerate(depths):
        planes = 64 * width * 2**group
        for number in range(depth):
            block = f"block_group_{group}/~/block_{number}/~"
            if number == 0:
                yield f"{block}/shortcut_conv", f"{block}/shortcut_batchnorm", (1, 1, inputs, 4 * planes)
            shapes = ((1, 1, inputs, planes), (3, 3, planes, planes), (1, 1, planes, 4 * planes))
            for index, shape in enumerate(shapes):
                yield f"{block}/conv_{index}", f"{block}/batchnorm_{index}", shape
            inputs = 4 * planes


def draw(encoder: str = "res_net50", depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 1) -> Network:
    """Draw a network; the numbers are the same on every machine."""
    network = Network({}, {})
    table = np.random.RandomState(0).standard_normal(TABLE).astype(np.float32)

    def numbers(shape: tuple[int, ...]) -> np.ndarray:
        start = 7 * len(network.params) % TABLE
        return np.resize(np.roll(table, -start), shape)

    def add_norm(name: str, channels: int, *, rank: int) -> None:
        shape = (1,) * (rank - 1) + (channels,)
        network.params[name] = {"scale": 1 + 0.1 * numbers(shape), "offset": 0.1 * numbers(shape)[..., ::-1]}
        for kind, average in (("mean", 0.1 * numbers(shape)), ("var", 1 + 0.5 * np.abs(numbers(shape)))):
            hidden = np.float32(0.5) * average  # before it is divided by 1 - decay^counter
            state = {"average": average, "hidden": hidden, "counter": np.array(9, np.int32)}
            network.state[f"{name}/~/{kind}_ema"] = state

    for convolution, norm, shape in _convolutions(depths, width):
        fan_in = np.prod(shape[:-1])
        network.params[f"{encoder}/~/{convolution}"] = {"w": numbers(shape) / np.float32(np.sqrt(fan_in))}
        add_norm(f"{encoder}/~/{norm}", shape[-1], rank=4)
    for head, inputs in (("projector", 4 * 64 * width * 2 ** (len(depths) - 1)), ("predictor", OUT)):
        first = {"w": numbers((inputs, HIDDEN)) / np.float32(np.sqrt(inputs)), "b": 0.1 * numbers((HIDDEN,))}
        network.params[f"{head}/linear"] = first
        add_norm(f"{head}/batch_norm", HIDDEN, rank=2)
        network.params[f"{head}/linear_1"] = {"w": numbers((HIDDEN, OUT)) / np.float32(np.sqrt(HIDDEN))}
    return network


def images(height: int, width: int) -> np.ndarray:
    """Draw two normalised images [2, height, width, 3]."""
    return np.random.RandomState(1).standard_normal((2, height, width, 3)).astype(np.float32)


class FlatMapping(dict[str, Any]):
    """A stand-in for haiku's mapping, which is pickled as its class and a dict."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatMapping, (dict(self),)


class _ByolExperimentState(NamedTuple):
    """A stand-in for the state of their experiment, of the same name and fields."""

    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


FOREIGN = {"haiku._src.data_structures": FlatMapping, "byol.byol_experiment": _ByolExperimentState}


def write(path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a checkpoint as their code does: a pickle that names classes of packages which are not installed."""
    params, state = (FlatMapping({name: FlatMapping(tensors) for name, tensors in tree.items()}) for tree in network)
    contents = {
        "experiment_state": _ByolExperimentState(params, None, state, None, None),
        "step": 7,
        "rng": np.zeros(2, np.uint32),
    }
    with monkeypatch.context() as patched:
        for name, kind in FOREIGN.items():
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                patched.setitem(sys.modules, ".".join(parts[:count]), ModuleType(".".join(parts[:count])))
            patched.setattr(sys.modules[name], kind.__name__, kind, raising=False)
            patched.setattr(kind, "__module__", name)
        path.write_bytes(pickle.dumps(contents, protocol=2))
    return path

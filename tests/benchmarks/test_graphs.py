"""Laws of the probe of cuDNN's graphs: torch computes what each is to write, and a missing package is a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases.graphs import IMAGES, PATTERNS, Shape, Sketch, reference, shapes, strides
from benchmarks.gpu import graphs
from benchmarks.gpu.parts import SKIPPED

ROOT = Path(__file__).parents[2]


def test_the_shapes_are_those_of_a_resnet50_after_its_stem() -> None:
    found = shapes()
    assert len(set(found)) == len(found)
    assert sum(shape.times for shape in found) == 52
    for shape in found:
        assert shape.tensors["x"] == (IMAGES, shape.inputs, shape.side, shape.side)
        assert shape.tensors["y"][2] == shape.side // shape.stride


def test_strides_are_those_of_channels_last_memory() -> None:
    x = torch.empty(2, 3, 5, 7).to(memory_format=torch.channels_last)
    assert strides((2, 3, 5, 7)) == x.stride()


def test_torch_computes_the_gradients_that_graphs_write() -> None:
    shape = Shape(4, 6, 3, 2, 8, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=torch.float64, generator=generator)

    given = {"x": drawn(2, 4, 8, 8), "scale": drawn(1, 4, 1, 1), "bias": drawn(1, 4, 1, 1), "dy": drawn(2, 6, 4, 4)}
    weight = drawn(6, 4, 3, 3).requires_grad_()
    image = torch.relu(given["x"] * given["scale"] + given["bias"]).requires_grad_()
    torch.nn.functional.conv2d(image, weight, stride=2, padding=1).backward(given["dy"])
    dweight = reference(given, {"dweight": weight.detach()}, shape)["dweight"]
    torch.testing.assert_close(dweight, weight.grad)
    masked = {"dy": given["dy"], "weight": weight.detach(), "z": drawn(2, 4, 8, 8), "x": given["x"]}
    found = reference(masked, dict.fromkeys(("dx", "g_sum", "g_product"), given["x"]), shape)
    expected = torch.where(masked["z"] > 0, image.grad, 0)
    torch.testing.assert_close(found["dx"], expected)
    torch.testing.assert_close(found["g_sum"].double(), expected.sum((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    assert found["g_product"].shape == (1, 4, 1, 1)


def test_a_missing_package_is_a_row_that_says_so(tmp_path: Path) -> None:
    if not isinstance(graphs.frontend(), str):
        pytest.skip("nvidia-cudnn-frontend and cuDNN are installed here")
    command = [sys.executable, "benchmarks/gpu/graphs.py", "--rows", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == SKIPPED, done.stderr
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["error"].startswith("absent: nvidia-cudnn-frontend cannot be imported")


@pytest.mark.parametrize("name", PATTERNS)
def test_every_graph_can_be_drawn_and_reads_and_writes_what_torch_computes(name: str) -> None:
    cudnn: Any = pytest.importorskip("cudnn", reason="the package nvidia-cudnn-frontend")
    sketch = Sketch(cudnn, shapes()[0], torch.bfloat16)
    PATTERNS[name](sketch)
    assert sketch.outputs
    assert set(sketch.inputs) | set(sketch.outputs) <= set(sketch.shape.tensors)

"""Convolutions of a ResNet-50 fused with what stands around them, as cuDNN's graph API may offer them.

Which of these a card supports, in which precision, only cuDNN knows; what it refuses is a row marked absent. The API is
that of the package nvidia-cudnn-frontend (1.32); per-view statistics are why a graph takes the images of one view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.compare import HALF, HALF_MASKS, agree
from benchmarks.harness import Absent, Case, Ready
from fastbyol.config import EncoderConfig
from fastbyol.model.resnet import ResNet

IMAGES = 512
DTYPES = (torch.bfloat16, torch.float16)
REASON = 200  # characters of a refusal


class Shape(NamedTuple):
    """A convolution: channels in and out, sides of kernel and input, stride, and how often a ResNet-50 has it."""

    inputs: int
    channels: int
    size: int
    stride: int
    side: int
    times: int

    def __str__(self) -> str:
        """Name the shape as rows do."""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{IMAGES}x{self.inputs}x{self.side}x{self.side} to {self.channels}, {self.size}x{self.size}{stride}"

    @property
    def tensors(self) -> dict[str, tuple[int, int, int, int]]:
        """The shapes of what a pattern may read or write, by the name it has there."""
        out = (self.side - 1) // self.stride + 1
        x, y = (IMAGES, self.inputs, self.side, self.side), (IMAGES, self.channels, out, out)
        per_input, per_channel = (1, self.inputs, 1, 1), (1, self.channels, 1, 1)
        weight = (self.channels, self.inputs, self.size, self.size)
        named = {"x": x, "z": x, "dx": x, "y": y, "dy": y, "weight": weight, "dweight": weight}
        named |= dict.fromkeys(("scale", "bias", "g_sum", "g_product"), per_input)
        return named | dict.fromkeys(("sum", "square"), per_channel)


def shapes() -> list[Shape]:
    """List the distinct convolutions of a ResNet-50 at 224 px after its stem, those first that move most bytes."""
    with torch.device("meta"):
        encoder = ResNet(EncoderConfig("resnet50"))
    found: dict[tuple[int, ...], int] = {}

    def note(module: nn.Module, given: Any, _result: Any) -> None:
        if isinstance(module, nn.Conv2d) and module is not encoder.conv1:
            sizes = (module.kernel_size[0], module.stride[0], given[0].shape[-1])
            key = (module.in_channels, module.out_channels, *sizes)
            found[key] = found.get(key, 0) + 1

    for module in encoder.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        encoder(torch.empty(2, 3, 224, 224, device="meta"))
    made = [Shape(*key, times) for key, times in found.items()]
    return sorted(made, key=lambda shape: -shape.times * sum(map(_elements, (shape.tensors["x"], shape.tensors["y"]))))


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class Sketch:
    """A graph of cuDNN's in the making, and its tensors that lie in memory, by name."""

    def __init__(self, cudnn: ModuleType, shape: Shape, dtype: torch.dtype, **where: Any) -> None:
        self.cudnn, self.shape = cudnn, shape
        self.narrow = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
        wide = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=self.narrow, intermediate_data_type=self.narrow, compute_data_type=wide, **where
        )
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.form = {
            "padding": [shape.size // 2] * 2,
            "stride": [shape.stride] * 2,
            "dilation": [1, 1],
        }

    def given(self, name: str) -> Any:
        """Return a tensor that the graph reads."""
        if name not in self.inputs:
            dim = self.shape.tensors[name]
            self.inputs[name] = self.graph.tensor(name=name, dim=dim, stride=strides(dim), data_type=self.narrow)
        return self.inputs[name]

    def result(self, name: str, tensor: Any) -> Any:
        """Make a tensor one that the graph writes."""
        dim = self.shape.tensors[name]
        is_sum = name in ("sum", "square", "g_sum", "g_product")
        tensor.set_output(True).set_dim(dim).set_stride(strides(dim))
        tensor.set_data_type(self.cudnn.data_type.FLOAT if is_sum else self.narrow)
        self.outputs[name] = tensor
        return tensor

    def prologue(self) -> Any:
        """Return relu(x * scale + bias)."""
        scaled = self.graph.scale(input=self.given("x"), scale=self.given("scale"))
        return self.graph.relu(input=self.graph.bias(input=scaled, bias=self.given("bias")))

    def sums(self, name: str, tensor: Any) -> None:
        """Add a tensor up by channel."""
        self.result(name, self.graph.reduction(tensor, mode=self.cudnn.reduction_mode.ADD))


def strides(dim: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the strides of channels-last memory."""
    _, channels, height, width = dim
    return channels * height * width, 1, channels * width, channels


def _forward(s: Sketch, *, has_prologue: bool, statistics: str) -> None:
    image = s.prologue() if has_prologue else s.given("x")
    y = s.result("y", s.graph.conv_fprop(image=image, weight=s.given("weight"), **s.form))
    if statistics == "both":
        for name, tensor in zip(("sum", "square"), s.graph.genstats(input=y), strict=True):
            s.result(name, tensor)
    elif statistics == "sum":
        s.sums("sum", y)


def _weight_gradient(s: Sketch, *, has_prologue: bool) -> None:
    image = s.prologue() if has_prologue else s.given("x")
    s.result("dweight", s.graph.conv_wgrad(image=image, loss=s.given("dy"), **s.form))


def _input_gradient(s: Sketch, *, has_relu: bool, has_sums: bool) -> None:
    dx = s.graph.conv_dgrad(loss=s.given("dy"), filter=s.given("weight"), **s.form)
    if has_relu:
        dx.set_dim(s.shape.tensors["x"])
        dx = s.graph.relu_backward(loss=dx, input=s.given("z"))
    s.result("dx", dx)
    if has_sums:
        s.sums("g_sum", dx)
        s.sums("g_product", s.graph.mul(a=dx, b=s.given("x")))


PATTERNS: dict[str, Callable[[Sketch], None]] = {
    "convolution": partial(_forward, has_prologue=False, statistics=""),
    "convolution, statistics": partial(_forward, has_prologue=False, statistics="both"),
    "convolution, sum": partial(_forward, has_prologue=False, statistics="sum"),
    "scale, bias, ReLU, convolution": partial(_forward, has_prologue=True, statistics=""),
    "scale, bias, ReLU, convolution, statistics": partial(_forward, has_prologue=True, statistics="both"),
    "input gradient": partial(_input_gradient, has_relu=False, has_sums=False),
    "input gradient, ReLU": partial(_input_gradient, has_relu=True, has_sums=False),
    "input gradient, ReLU, sums": partial(_input_gradient, has_relu=True, has_sums=True),
    "weight gradient": partial(_weight_gradient, has_prologue=False),
    "scale, bias, ReLU, weight gradient": partial(_weight_gradient, has_prologue=True),
}


def reference(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Compute by torch what a graph writes, from what it reads."""
    x, form = given.get("x"), {"stride": shape.stride, "padding": shape.size // 2}
    if "scale" in given:
        x = F.relu(x * given["scale"] + given["bias"])
    if "y" in wanted:
        y = F.conv2d(x, given["weight"], **form)
        return {"y": y, "sum": _per_channel(y), "square": _per_channel(y.float().square())}
    weight = given.get("weight", wanted.get("dweight"))
    image = wanted["dx"] if x is None or "dx" in wanted else x
    sides = [shape.stride] * 2, [shape.size // 2] * 2, [1, 1], False, [0, 0], 1
    asked = ["dx" in wanted, "dweight" in wanted, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(given["dy"], image, weight, None, *sides, asked)
    if "z" in given:
        dx = torch.where(given["z"] > 0, dx, 0)
    found = {"dx": dx, "dweight": dweight}
    if "g_sum" in wanted:
        found |= {"g_sum": _per_channel(dx), "g_product": _per_channel(dx.float() * x)}
    return found


def _per_channel(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), keepdim=True, dtype=torch.float32)


def plan(sketch: Sketch) -> None:
    """Ask cuDNN for a plan; raise its cudnnGraphNotSupportedError where it has none."""
    graph, modes = sketch.graph, sketch.cudnn.heur_mode
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([modes.A, modes.FALLBACK])
    graph.check_support()


def _prepare(
    cudnn: ModuleType, handle: Any, pattern: Callable[[Sketch], None], shape: Shape, dtype: torch.dtype
) -> Ready:
    sketch = Sketch(cudnn, shape, dtype, handle=handle)
    pattern(sketch)
    try:
        plan(sketch)
        sketch.graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as refusal:
        raise Absent(f"cuDNN {cudnn.backend_version_string()} refuses: {refusal}"[:REASON]) from refusal
    given, results = _memory(sketch, dtype)
    pack = {sketch.inputs[name]: x for name, x in given.items()}
    pack |= {sketch.outputs[name]: x for name, x in results.items()}
    workspace = torch.empty(max(sketch.graph.get_workspace_size(), 1), device="cuda", dtype=torch.uint8)

    def run() -> None:
        sketch.graph.execute(pack, workspace, handle=handle)

    def check() -> None:
        run()
        expected = reference(given, results, shape)
        tolerance = HALF_MASKS if "g_sum" in results else HALF  # sums of what nearly cancels
        agree(list(results.values()), [expected[name] for name in results], tolerance=tolerance)

    return Ready(run, check)


def _memory(sketch: Sketch, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw what a graph reads and fill what it writes with NaN."""
    generator = torch.Generator("cuda").manual_seed(0)
    named = sketch.shape.tensors

    def made(name: str, fill: Callable[[Tensor], Tensor]) -> Tensor:
        is_sum = name in ("sum", "square", "g_sum", "g_product")
        x = torch.empty(named[name], dtype=torch.float32 if is_sum else dtype, device="cuda")
        return fill(x.to(memory_format=torch.channels_last))

    given = {name: made(name, lambda x: x.normal_(generator=generator)) for name in sketch.inputs}
    return given, {name: made(name, lambda x: x.fill_(torch.nan)) for name in sketch.outputs}


def cases(cudnn: ModuleType, handle: Any, name: str, dtype: torch.dtype) -> Iterator[Case]:
    """Time a pattern on every shape; graphs are built one by one."""
    for shape in shapes():
        sketch = Sketch(cudnn, shape, dtype)
        PATTERNS[name](sketch)
        moved = sum(_elements(shape.tensors[each]) for each in (*sketch.inputs, *sketch.outputs)) * dtype.itemsize
        yield Case(
            f"cuDNN graph: {name}",
            str(shape),
            "cudnn-frontend",
            partial(_prepare, cudnn, handle, PATTERNS[name], shape, dtype),
            images=IMAGES,
            dtype=str(dtype).removeprefix("torch."),
            bytes_moved=moved,
            is_alone=True,
        )

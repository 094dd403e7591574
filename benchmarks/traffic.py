"""The bytes that launches of our kernels and operations of torch read and write, counted as they are called.

Nothing is computed: `counted` watches the block's code run on fake tensors, with real shapes but no numbers. A tensor
counts once for each launch that reads it and once for each that writes it, which is what no cache can save. Which of
its tensors a kernel reads and writes is read in its source; an operation of torch reads the tensors it is given and
writes those it returns.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbyol.kernels.dispatch import allocate_only
from fastbyol.kernels.segments import NUMEL, TARGET

aten = torch.ops.aten
REPLACING = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)  # do not read what they write over
READ_TWICE = {  # so many of the first tensors: for sums over them, then for the result
    aten.native_batch_norm.default: 1,
    aten.native_batch_norm_backward.default: 2,
}
BY_TABLE = ("lars_norms_kernel", "lars_sweep_kernel")  # find their tensors by the table of segments.py

Counts = Counter[str]  # bytes, by the name of a kernel or an operation


class Effects(NamedTuple):
    """The names of the arguments through which a kernel reads, and of those through which it writes."""

    read: frozenset[str]
    written: frozenset[str]


@cache
def effects(function: FunctionType) -> Effects:
    """Find a kernel's loads and stores in its source, and in that of the functions it calls."""
    source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(source, ast.FunctionDef)
    arguments = {argument.arg for argument in source.args.args}
    read: set[str] = set()
    written: set[str] = set()

    def names(node: ast.AST) -> set[str]:
        return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & arguments

    for call in (node for node in ast.walk(source) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(ast.Name(of), "load"):
                read |= names(call.args[0]) if of == "tl" else {of} & arguments  # of a block by its descriptor
            case ast.Attribute(ast.Name(of), "store"):
                written |= names(call.args[0]) if of == "tl" else {of} & arguments
            case ast.Name(called) if inner := getattr(function.__globals__.get(called), "fn", None):
                found = effects(inner)
                for name, given in zip(inspect.signature(inner).parameters, call.args, strict=False):
                    read |= names(given) if name in found.read else set()
                    written |= names(given) if name in found.written else set()
    return Effects(frozenset(read), frozenset(written))


def size(x: Any) -> int:
    """Return the bytes of a tensor or of the one that a descriptor stands for; elements that repeat count once."""
    if isinstance(x, TensorDescriptor):
        x = x.base
    if not isinstance(x, Tensor):
        return 0
    elements = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements * x.element_size()


def launched(function: FunctionType, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes of a launch of a kernel, given as the Python function that it is made of."""
    given = dict(zip(inspect.signature(function).parameters, args, strict=False)) | dict(kwargs)
    moved = sum(size(given[name]) for names in effects(function) for name in names)
    if function.__name__ in BY_TABLE:
        moved += swept(given)
    return moved


def swept(given: Mapping[str, Any]) -> int:
    """Return the bytes of parameters, gradients, momenta and targets, float32, that a LARS kernel finds itself.

    Norms read parameters and gradients; the sweep reads momenta, too, and writes all but gradients.
    """
    table = given["segments_ptr"]
    parameters, targets = (int(table[rows, NUMEL.value].sum()) for rows in (slice(None), table[:, TARGET.value] != 0))
    if "skipped_ptr" not in given:
        return 2 * 4 * parameters
    return 5 * 4 * parameters + 2 * 4 * targets


def convolved(args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes of a convolution's gradients, a launch each: of the input, the weight, the bias."""
    dy, x, weight = map(size, args[:3])
    di, dweight, dbias = (x is not None for x in result)
    return di * (dy + weight + x) + dweight * (dy + x + weight) + dbias * dy


def operated(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes of an operation of torch; none of one that makes no numbers, such as a view of a tensor."""
    if operation is aten.convolution_backward.default:
        return convolved(args, result)
    schema = operation._schema
    given, returned = _tensors((args, kwargs)), _tensors(result)
    is_written = (argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    changed = _tensors([x for x, is_so in zip(args, is_written, strict=False) if is_so])
    made = {key: x for key, x in returned.items() if key not in given}
    is_view = not changed and any(each.alias_info is not None for each in schema.returns)
    if is_view or "empty" in schema.name or not (changed or made):
        return 0
    read = {key: x for key, x in given.items() if not (key in changed and operation in REPLACING)}
    again = list(given.values())[: READ_TWICE.get(operation, 0)]
    return sum(map(size, [*read.values(), *changed.values(), *made.values(), *again]))


def _tensors(values: Any) -> dict[int, Tensor]:
    """Return each of the tensors among nested values once."""
    return {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of torch's operations in the with-block."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = operated(func, args, kwargs or {}, result)
        if moved:
            self.counts[func._schema.name] += moved
        return result


@contextmanager
def launches() -> Iterator[Counts]:
    """Count what the block's launches move; none is launched."""
    counts: Counts = Counter()

    def seen(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[kernel.fn.__name__] += launched(kernel.fn, args, kwargs)

    with allocate_only(seen):
        yield counts


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what the block's launches and operations move; in it, tensors that are made have no numbers."""
    with launches() as counts, FakeTensorMode(allow_non_fake_inputs=True), _Operations(counts):
        yield counts

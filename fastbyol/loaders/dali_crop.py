"""Crops and resizes by NVIDIA DALI, after any loader; colour, blur and the rest stay with fastbyol's kernels.

The boxes are those drawn for each sample, so a seed gives the same boxes as without DALI. The pixels differ: DALI
repeats a crop's border where the kernels leave out taps beyond it, and rounds each crop to uint8 (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import PREFETCH, Batch, host_tensor
from fastbyol.loaders.prefetch import prefetch_in_thread

Draw = Callable[[Batch], ViewParams]


def crop(
    batches: Generator[Batch, None, None],
    draw: Draw,
    *,
    crop_px: int,
    workers: int,
    device: torch.device | str,
    prefetch: int = PREFETCH,
) -> Generator[Batch, None, None]:
    """Yield the batches with the crops of their V views in place of their B images, up to `prefetch` made in advance.

    A thread makes them, on a GPU on a stream of its own, so that the thread waits for DALI and no step does. It also
    calls `draw`, which returns the parameters of a batch's views. pixels: uint8 [V*B * crop_px * crop_px * 3], view 0
    first, not flipped; offsets: [V*B]; sizes: [V*B, 2]. views.params_of_crops() converts the same parameters to those
    that finish such a batch.
    """
    target = torch.device(device)
    return prefetch_in_thread(
        _crop(batches, draw, crop_px=crop_px, workers=workers, device=target), prefetch=prefetch, device=target
    )


def _crop(
    batches: Generator[Batch, None, None], draw: Draw, *, crop_px: int, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    pipelines: dict[int, Pipeline] = {}  # by batch size: the last batch may be smaller
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    with closing(batches), torch.cuda.stream(stream):  # no effect without a GPU
        for batch in batches:
            count, boxes = len(batch.indices), draw(batch).boxes.numpy()
            if count not in pipelines:
                size = {"batch_size": count, "views": len(boxes), "crop_px": crop_px}
                pipelines[count] = build(**size, workers=workers, device=device)
            yield _with_crops(batch, _crops(pipelines[count], batch, boxes), crop_px=crop_px)


def _crops(pipeline: Pipeline, batch: Batch, boxes: NDArray[np.float32]) -> Tensor:
    """Crop every image of a batch to its boxes [V, B, 4] (top, left, height, width); return uint8 [bytes]."""
    pipeline.feed_input("images", _images(batch))
    for view, whole_px in enumerate(boxes.astype(np.int32)):
        pipeline.feed_input(f"starts of {view}", np.ascontiguousarray(whole_px[:, :2]))
        pipeline.feed_input(f"shapes of {view}", np.ascontiguousarray(whole_px[:, 2:]))
    pipeline.schedule_run()
    crops = torch.cat([from_dlpack(each.as_tensor()).flatten() for each in pipeline.share_outputs()])
    if crops.is_cuda:
        torch.cuda.current_stream().synchronize()  # DALI takes its buffers back
    pipeline.release_outputs()
    return crops


def _images(batch: Batch) -> list[Tensor] | list[NDArray[np.uint8]]:
    """Return views of the images in a batch's buffer, [H, W, 3] each."""
    images = []
    for begin, (height, width) in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
        images.append(batch.pixels[begin : begin + height * width * 3].view(height, width, 3))
    return images if batch.pixels.is_cuda else [image.numpy() for image in images]


def _with_crops(batch: Batch, crops: Tensor, *, crop_px: int) -> Batch:
    count, length = len(crops) // (crop_px * crop_px * 3), crop_px * crop_px * 3
    offsets, sizes = np.arange(count) * length, np.full((count, 2), crop_px, np.int64)
    return replace(batch, pixels=crops, offsets=host_tensor(offsets, like=crops), sizes=host_tensor(sizes, like=crops))


def build(*, batch_size: int, views: int, crop_px: int, workers: int, device: torch.device) -> Pipeline:
    """Build the pipeline: slice, then resize with the same cubic as the kernels (a = -1/2, no antialias)."""
    is_gpu = device.type == "cuda"
    where = "gpu" if is_gpu else "cpu"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=workers,
        device_id=device.index if is_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        exec_pipelined=False,  # runs are scheduled one by one
    )
    with pipeline:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC", device=where)
        crops = []
        for view in range(views):
            start, shape = (
                fn.external_source(name=f"{what} of {view}", dtype=types.INT32, ndim=1) for what in ("starts", "shapes")
            )
            box = fn.slice(images, start=start, shape=shape, axes=(0, 1))
            crops.append(fn.resize(box, size=(crop_px, crop_px), interp_type=types.INTERP_CUBIC, antialias=False))
        pipeline.set_outputs(*crops)
    pipeline.build()
    return pipeline

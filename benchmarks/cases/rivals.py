"""Two views of an image as others make them on the host: ffcv and DALI; torchvision and lightly on PIL images.

All read the same .beton file. Each takes a job and returns a function that yields the batches of one run, both views of
each. None is set up to do more than its users' code does.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases.photographs import Job
from benchmarks.harness import Absent
from fastbyol.beton import RAW, Reader
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_PX = 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of crops
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # BYOL's jitter
JITTER, GRAY = 0.8, 0.2  # probabilities
BLUR_SOLARIZE = ((1.0, 0.0), (0.1, 0.2))  # probabilities of the first view and of the second
SIGMA = (0.1, 2.0)  # pixels

TwoViews = Iterable[tuple[Any, Any]]


def ffcv_crops(job: Job) -> Callable[[], TwoViews]:
    """Name the image twice in ffcv's pipelines, with its own decoder that crops and resizes."""
    return _ffcv(job, list)


def ffcv_colors(job: Job) -> Callable[[], TwoViews]:
    """Add what ffcv's own operations cover: no hue, gray, blur or solarization, which FFCV-SSL's fork of it has."""

    def operations() -> list[Any]:
        from ffcv import transforms  # noqa: PLC0415

        return [
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomBrightness(BRIGHTNESS, JITTER),
            transforms.RandomContrast(CONTRAST, JITTER),
            transforms.RandomSaturation(SATURATION, JITTER),
        ]

    return _ffcv(job, operations)


def _ffcv(job: Job, operations: Callable[[], list[Any]]) -> Callable[[], TwoViews]:
    try:
        import numba  # noqa: PLC0415
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder  # noqa: PLC0415  # an extra
        from ffcv.loader import Loader, OrderOption  # noqa: PLC0415
        from ffcv.pipeline import PipelineSpec  # noqa: PLC0415
        from ffcv.transforms import ToTensor  # noqa: PLC0415
    except ImportError as error:
        raise Absent(f"ffcv is not installed ({error})") from error
    reader = job.reader()

    def view() -> Any:
        decoder = RandomResizedCropRGBImageDecoder((CROP_PX, CROP_PX), AREA, RATIO)
        return PipelineSpec("image", decoder=decoder, transforms=[*operations(), ToTensor()])

    others = {name: None for name in reader.field_names if name != "image"}
    array_type = numba.uint8[::1]
    loader = Loader(
        str(reader.path),
        batch_size=job.batch_size,
        num_workers=job.threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.concatenate([rows.indices for rows in job.rows()]).astype(np.uint64),
        drop_last=False,
        pipelines={"image": view(), "second": view(), **others},
    )
    array_type.mutable = True  # numba shares this type, and ffcv has made it read-only for everyone
    return lambda: loader


def dali(job: Job) -> Callable[[], TwoViews]:
    """Decode once, then make both views by DALI on the CPU; DALI's jitter is one matrix, its hue a rotation in YIQ."""
    try:
        from nvidia.dali import fn, pipeline_def, types  # noqa: PLC0415  # an extra
        from nvidia.dali.pipeline import do_not_convert  # noqa: PLC0415
    except ImportError as error:
        raise Absent(f"nvidia.dali is not installed ({error})") from error
    reader, rows = job.reader(), job.rows()
    if (reader.modes == RAW).any():
        raise Absent("raw images, which no DALI decoder takes, are in the file")
    mean, std = ([255 * each for each in values] for values in (IMAGENET_MEAN, IMAGENET_STD))

    @do_not_convert
    def payloads(number: int) -> list[Any]:
        if number >= job.batches:
            raise StopIteration
        return [np.frombuffer(reader.payload(index), np.uint8) for index in rows[number].indices.tolist()]

    def coin(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def about(middle: float, by: float) -> Any:
        return fn.random.uniform(range=(middle - by, middle + by))

    @pipeline_def(enable_conditionals=True)  # what is not drawn costs nothing
    def both_views() -> tuple[Any, ...]:
        jpegs = fn.external_source(source=payloads, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
        made = []
        for blur, solarize in BLUR_SOLARIZE:
            x = fn.random_resized_crop(
                images,
                size=(CROP_PX, CROP_PX),
                random_area=AREA,
                random_aspect_ratio=RATIO,
                interp_type=types.INTERP_CUBIC,
            )
            if coin(JITTER):
                x = fn.color_twist(
                    x,
                    brightness=about(1, BRIGHTNESS),
                    contrast=about(1, CONTRAST),
                    saturation=about(1, SATURATION),
                    hue=about(0, 360 * HUE),
                )
            if coin(GRAY):
                x = fn.saturation(x, saturation=0.0)
            if coin(blur):
                x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=SIGMA))
            if coin(solarize):
                x = fn.cast((x >= 128) * (255 - x) + (x < 128) * x, dtype=types.UINT8)
            mirror = fn.random.coin_flip(probability=0.5)
            made.append(
                fn.crop_mirror_normalize(x, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")
            )
        return tuple(made)

    pipeline = both_views(batch_size=job.batch_size, num_threads=job.threads, device_id=None, seed=0)
    pipeline.build()

    def epoch() -> TwoViews:
        pipeline.reset()
        with contextlib.suppress(StopIteration):
            while True:
                yield pipeline.run()

    return epoch


def torchvision_as_solo_learn(job: Job) -> Callable[[], TwoViews]:
    """Build solo-learn's views for BYOL: torchvision's transforms on PIL images, blurred by Pillow."""
    return _torchvision(job, lambda _: _blur)


def torchvision_alone(job: Job) -> Callable[[], TwoViews]:
    """Blur by torchvision, too, with a window of a tenth of the view as in the paper."""
    return _torchvision(job, lambda transforms: transforms.GaussianBlur(CROP_PX // 10 + 1, SIGMA))


def _torchvision(job: Job, blur_of: Callable[[Any], Any]) -> Callable[[], TwoViews]:
    transforms = _import_peer("torchvision.transforms")

    def view(blur: float, solarize: float) -> Callable[[Image], Tensor]:
        jitter = transforms.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
        operations = [
            transforms.RandomResizedCrop(CROP_PX, AREA, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomApply([jitter], JITTER),
            transforms.RandomGrayscale(GRAY),
            transforms.RandomApply([blur_of(transforms)], blur),
            transforms.RandomSolarize(128, solarize),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        composed: Callable[[Image], Tensor] = transforms.Compose(operations)
        return composed

    first, second = (view(*probabilities) for probabilities in BLUR_SOLARIZE)
    return _pil(job, lambda image: (first(image), second(image)))


def lightly(job: Job) -> Callable[[], TwoViews]:
    """Build lightly's transform for BYOL with its defaults."""
    return _pil(job, _import_peer("lightly.transforms").BYOLTransform())


def _blur(image: Image) -> Image:
    from PIL import ImageFilter  # noqa: PLC0415  # may be missing beside a bare torch

    return image.filter(ImageFilter.GaussianBlur(random.uniform(*SIGMA)))


def _import_peer(name: str) -> Any:
    """Import torchvision, or what imports it, beside a torch its compiled operations were not built for."""
    register = torch.library.register_fake

    def register_others(operation: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(operation, str) and operation.startswith("torchvision::"):
            return lambda function: function
        return register(operation, *args, **settings)

    torch.library.register_fake = register_others
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name.partition('.')[0]} is not installed ({error})") from error
    finally:
        torch.library.register_fake = register


def _pil(job: Job, transform: Callable[[Image], Sequence[Tensor]]) -> Callable[[], TwoViews]:
    """Decode each image once, by Pillow, and transform it twice, in processes of torch's DataLoader."""
    indices = np.concatenate([rows.indices for rows in job.rows()]).tolist()
    loader = DataLoader(
        _Images(job.reader(), transform),
        batch_size=job.batch_size,
        sampler=indices,
        num_workers=job.threads,
        persistent_workers=True,  # as in a training run, they start once
        multiprocessing_context="fork",
    )
    return lambda: loader


class _Images(Dataset[Sequence[Tensor]]):
    """A .beton file as a torch data set."""

    def __init__(self, reader: Reader, transform: Callable[[Image], Sequence[Tensor]]) -> None:
        self._reader, self._transform = reader, transform

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        import PIL.Image  # noqa: PLC0415

        payload = self._reader.payload(index)
        if self._reader.modes[index] == RAW:
            size = (int(self._reader.widths[index]), int(self._reader.heights[index]))
            return self._transform(PIL.Image.frombytes("RGB", size, payload))
        with PIL.Image.open(io.BytesIO(payload)) as image:
            return self._transform(image.convert("RGB"))

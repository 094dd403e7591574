"""The timed augmentations: both views of photographs and of small images, from packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases.compare import FLOAT32, HALF, agree
from benchmarks.harness import Absent, Case, Ready
from fastbyol import views
from fastbyol.config import ViewConfig
from fastbyol.kernels import reference
from fastbyol.recipes import PAPER_VIEWS

SEED = 0
CHECKED = 32  # images the check makes again in float32 and plain torch


@dataclass(frozen=True)
class Problem:
    """The number and the size of the images that become two views of crop_px each."""

    images: int
    height: int
    width: int
    crop_px: int

    def __str__(self) -> str:
        return f"{self.images} of {self.height}x{self.width} to 2x{self.crop_px}"


PROBLEMS = {
    "cuda": (Problem(256, 375, 500, 224), Problem(256, 32, 32, 32)),
    "cpu": (Problem(256, 32, 32, 32), Problem(8, 375, 500, 224)),
}


class Tensors(NamedTuple):
    """Packed images on the device, and both views' draws."""

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    params: Any


def _tensors(problem: Problem, device: str) -> Tensors:
    per_image = problem.height * problem.width * 3
    rng = np.random.default_rng(SEED)
    coarse = rng.integers(0, 256, (problem.images, -(-problem.height // 8), -(-problem.width // 8), 3), np.uint8)
    smooth = coarse.repeat(8, 1).repeat(8, 2)[:, : problem.height, : problem.width]  # crops of noise would be gray
    pixels = torch.from_numpy(np.ascontiguousarray(smooth)).flatten().to(device)
    offsets = torch.arange(problem.images, device=device) * per_image
    sizes = torch.tensor([[problem.height, problem.width]] * problem.images)
    return Tensors(pixels, offsets, sizes.to(device), _draw(problem, sizes).to(device))


def _draw(problem: Problem, sizes: Tensor) -> Any:
    indices = np.arange(problem.images)
    return views.draw(PAPER_VIEWS, seed=SEED, epochs=indices * 0, indices=indices, sizes=sizes.numpy())


def _fastbyol(problem: Problem, dtype: torch.dtype, tensors: Callable[[], Tensors]) -> Ready:
    given = tensors()

    def run() -> Tensor:
        return views.apply(*given, crop_px=problem.crop_px, dtype=dtype)

    def check() -> None:
        few = min(CHECKED, problem.images)
        part = Tensors(
            given.pixels, given.offsets[:few], given.sizes[:few], type(given.params)(given.params.packed[:, :few])
        )
        expected = reference.augment(*part, crop_px=problem.crop_px, dtype=torch.float32)
        made = run().unflatten(0, (2, problem.images))[:, :few].flatten(0, 1)
        agree([made], [expected], tolerance=FLOAT32 if dtype == torch.float32 else HALF)

    return Ready(run, check)


def _reference(problem: Problem, dtype: torch.dtype, tensors: Callable[[], Tensors]) -> Ready:
    given = tensors()
    return Ready(lambda: reference.augment(*given, crop_px=problem.crop_px, dtype=dtype))


def _blur_px(problem: Problem) -> int:
    return 2 * (problem.crop_px // 20) + 1


def _images(problem: Problem, given: Tensors) -> Tensor:
    """View the packed bytes, all of one size here, as [B, 3, H, W]."""
    return given.pixels.view(problem.images, problem.height, problem.width, 3).permute(0, 3, 1, 2)


def _torchvision(problem: Problem, dtype: torch.dtype, tensors: Callable[[], Tensors]) -> Ready:
    """Prepare torchvision's transforms, image by image: they draw once a call. Other definitions: not compared."""
    try:
        from torchvision.transforms import v2  # noqa: PLC0415  # a rival, not a requirement
    except ImportError as error:
        raise Absent(f"torchvision is not installed ({error})") from error

    def pipeline(view: ViewConfig) -> Any:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    problem.crop_px, view.area, view.ratio, v2.InterpolationMode.BICUBIC, antialias=False
                ),
                v2.RandomHorizontalFlip(view.flip),
                v2.RandomApply([jitter], view.jitter),
                v2.RandomGrayscale(view.grayscale),
                v2.RandomApply([v2.GaussianBlur(_blur_px(problem), view.sigma)], view.blur),
                v2.RandomSolarize(128, view.solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(reference.IMAGENET_MEAN), list(reference.IMAGENET_STD)),
            ]
        )

    pipelines, images = [pipeline(view) for view in PAPER_VIEWS], _images(problem, tensors())

    def run() -> Tensor:
        made = torch.stack([pipe(image) for pipe in pipelines for image in images])
        return made.to(dtype, memory_format=torch.channels_last)

    return Ready(run)


def _kornia(problem: Problem, dtype: torch.dtype, tensors: Callable[[], Tensors]) -> Ready:
    """Prepare kornia's transforms of whole batches. Other definitions: not compared."""
    try:
        import kornia.augmentation as ka  # noqa: PLC0415  # a rival, not a requirement
        from kornia.constants import Resample  # noqa: PLC0415
    except ImportError as error:
        raise Absent(f"kornia is not installed ({error})") from error

    side, blur_px = (problem.crop_px,) * 2, (_blur_px(problem),) * 2

    def pipeline(view: ViewConfig) -> Any:
        return torch.nn.Sequential(
            ka.RandomResizedCrop(side, view.area, view.ratio, resample=Resample.BICUBIC, align_corners=False),
            ka.RandomHorizontalFlip(p=view.flip),
            ka.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
            ka.RandomGrayscale(p=view.grayscale),
            ka.RandomGaussianBlur(blur_px, view.sigma, p=view.blur),
            ka.RandomSolarize(p=view.solarize),
            ka.Normalize(torch.tensor(reference.IMAGENET_MEAN), torch.tensor(reference.IMAGENET_STD)),
        )

    given = tensors()
    pipelines, images = [pipeline(view).to(given.pixels.device) for view in PAPER_VIEWS], _images(problem, given)

    def run() -> Tensor:
        whole = images.float() / 255
        return torch.cat([pipe(whole) for pipe in pipelines]).to(dtype, memory_format=torch.channels_last)

    return Ready(run)


def cases(device: str) -> Iterator[Case]:
    """Compare making both views from bytes on the device, and drawing their parameters on the host."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rivals = {"fastbyol": _fastbyol, "torchvision, image by image": _torchvision, "kornia": _kornia}
    if device == "cuda":
        rivals["reference"] = _reference  # on the CPU that is what fastbyol runs
    for problem in PROBLEMS[device]:
        sizes = torch.tensor([[problem.height, problem.width]] * problem.images)
        if device == "cpu":  # the host's work: a GPU's events would not see it
            yield Case(
                "views, parameters",
                str(problem),
                "numpy",
                lambda problem=problem, sizes=sizes: Ready(lambda: _draw(problem, sizes)),  # type: ignore[misc]
                images=problem.images,
            )
        tensors = cache(partial(_tensors, problem, device))
        source, made = problem.height * problem.width * 3, 2 * problem.crop_px**2 * 3 * dtype.itemsize
        for name, prepare in rivals.items():
            yield Case(
                "views",
                str(problem),
                name,
                partial(prepare, problem, dtype, tensors),
                images=problem.images,
                dtype=str(dtype).removeprefix("torch."),
                bytes_moved=problem.images
                * (source + made),  # each once: kernels/augment.py says what is moved between
            )

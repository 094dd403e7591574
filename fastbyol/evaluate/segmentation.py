"""Semantic segmentation: a convolutional head on the encoder's last map, fine-tuned on masks, scored by mean IoU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.errors import ConfigError, require
from fastbyol.evaluate.finetune import HParams, run_sgd
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.masks import IGNORED, Pair, augmented_batches, find_classes, find_pairs, read_pair
from fastbyol.evaluate.protocol import Job, Protocol, add_from_scratch, add_seed
from fastbyol.model.parts import Encoder
from fastbyol.model.resnet import BasicBlock, Bottleneck, ResNet, init_
from fastbyol.ranges import SIDE_MAX
from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import int_range, nonnegative_number, positive_number, whole_number
from fastbyol.system.progress import Progress

STEPS = 30_000  # these constants: He et al. 2020 (MoCo), appendix; docs/numerics.md has the paper's
LR = 3e-3
BATCH = 16
WEIGHT_DECAY = 1e-4
CROP_PX = 513
STRIDE = 16
HEAD_CHANNELS, HEAD_DILATION = 256, 6


def dilate_(encoder: Encoder, stride: int) -> None:
    """Lower the encoder's output stride in place, replacing the stride of the last groups by dilated 3x3 convolutions.

    As in torchvision, the first block of such a group has the dilation of the group before it, and the others have
    the new dilation. Raises ConfigError for a stride that the encoder cannot have, and for one that is no ResNet.
    """
    if not isinstance(encoder, ResNet):
        raise ConfigError(
            f"encoder {encoder.config.arch} has no stages to dilate; segmentation needs a ResNet: give another protocol"
        )
    stem = int(encoder.conv1.stride[0]) * (2 if isinstance(encoder.maxpool, nn.MaxPool2d) else 1)
    strides = [stem * 2**n for n in range(len(encoder.stages))]
    require(
        stride in strides,
        f"output stride is {stride}; this encoder can have {', '.join(map(str, strides))}; give --stride {strides[-1]}",
    )
    for number in range(strides.index(stride) + 1, len(strides)):
        rate = strides[number] // stride
        for index, block in enumerate(encoder.get_submodule(encoder.stages[number]).children()):
            assert isinstance(block, BasicBlock | Bottleneck)
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        dilation = rate // 2 if index == 0 and conv is _strided_conv(block) else rate
                        conv.dilation = conv.padding = (dilation, dilation)


def _strided_conv(block: BasicBlock | Bottleneck) -> nn.Conv2d:
    return block.conv1 if isinstance(block, BasicBlock) else block.conv2


class Segmenter(nn.Module):
    """An encoder, two dilated 3x3 convolutions and a 1x1: maps images [N, 3, H, W] to logits [N, classes, H, W]."""

    def __init__(self, encoder: Encoder, classes: int, *, stride: int, seed: int) -> None:
        super().__init__()
        dilate_(encoder, stride)
        self.encoder = encoder
        layers: list[nn.Module] = []
        channels = encoder.features
        for _ in range(2):
            conv = nn.Conv2d(channels, HEAD_CHANNELS, 3, 1, HEAD_DILATION, HEAD_DILATION, bias=False)
            layers += [conv, nn.BatchNorm2d(HEAD_CHANNELS), nn.ReLU()]
            channels = HEAD_CHANNELS
        self.head = nn.Sequential(*layers, nn.Conv2d(channels, classes, 1))
        init_(self.head, torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits per pixel."""
        logits = self.head(self.encoder.feature_map(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def mean_iou(confusion: Tensor) -> float:
    """Return the mean intersection over union, in percent, of a confusion matrix [C, C] whose rows are true classes.

    A class that neither occurs nor is predicted is left out of the mean.
    """
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (both / union.clamp_min(1))[union > 0].mean().item()


@torch.inference_mode()
def confusion_matrix(network: Segmenter, found: Sequence[Pair], *, classes: int, inputs: InputSettings) -> Tensor:
    """Count the pixels of whole images by true and predicted class: int64 [C, C], without the ignored pixels."""
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    bar = Progress(found, total=len(found), desc="segment val", unit="images")
    for pair in inputs.threads.units(bar, "segment val"):
        image, mask = read_pair(pair)
        with inputs.precision():
            predicted = network(image[None].to(inputs.device))[0].argmax(0).cpu()
        counted = mask != IGNORED
        counts += torch.bincount(mask[counted] * classes + predicted[counted], minlength=classes * classes)
    return counts.view(classes, classes)


def score(
    encoder: Encoder,
    found: tuple[Sequence[Pair], Sequence[Pair]],
    *,
    classes: int,
    hparams: HParams,
    stride: int = STRIDE,
    inputs: InputSettings,
    seed: int = 0,
    label: str = "segment",
) -> dict[str, Any]:
    """Fine-tune encoder and head on the first pairs by cross-entropy per pixel; score mean IoU on the second pairs.

    Training uses crops of side `inputs.px`, scoring whole images. The learning rate follows a cosine; the paper's falls
    in two steps.
    """
    train, val = found
    network = Segmenter(encoder.with_views(1), classes, stride=stride, seed=seed).to(inputs.device)
    batches = augmented_batches(
        train, px=inputs.px, batch=hparams.batch, steps=hparams.steps, seed=seed, device=inputs.device
    )
    run_sgd(network, batches, _pixel_loss, hparams=hparams, inputs=inputs, label=label)
    confusion = confusion_matrix(network, val, classes=classes, inputs=inputs)
    right = confusion.diagonal().sum().double() / confusion.sum().clamp_min(1)
    return {"miou": mean_iou(confusion), "pixel_accuracy": 100 * right.item(), "stride": stride, **hparams._asdict()}


def _pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Average the cross-entropy over the pixels that are not ignored; 0 if a batch has none."""
    return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / (masks != IGNORED).sum().clamp_min(1)


def hold_out(found: Sequence[Pair], *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split the pairs at random into four fifths to train on and one fifth to score on."""
    require(len(found) >= 2, f"{len(found)} pairs of image and mask; give at least 2, or --val-images and --val-masks")
    order = np.random.default_rng(seed).permutation(len(found))
    cut = max(len(found) // 5, 1)
    return [found[i] for i in sorted(order[cut:])], [found[i] for i in sorted(order[:cut])]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--images", type=Path, required=True, metavar="DIR", help="images to learn from")
    data.add_argument(
        "--masks",
        type=Path,
        required=True,
        metavar="DIR",
        help="PNG masks of class numbers, named as their images; 255 is ignored",
    )
    data.add_argument(
        "--val-images", type=Path, metavar="DIR", help="images to score on (default: a fifth of --images)"
    )
    data.add_argument("--val-masks", type=Path, metavar="DIR", help="their masks")
    parser.add_argument(
        "--stride", type=whole_number, default=STRIDE, metavar="N", help="pixels of the image per cell of the last map"
    )
    parser.add_argument(
        "--crop-px", type=int_range(1, SIDE_MAX), default=CROP_PX, metavar="PX", help="side of a training crop"
    )
    parser.add_argument("--steps", type=whole_number, default=STEPS, metavar="N", help="steps of the training")
    parser.add_argument("--batch-size", type=whole_number, default=BATCH, metavar="N", help="images in a step")
    parser.add_argument("--lr", type=positive_number, default=LR, metavar="X", help="peak learning rate")
    parser.add_argument(
        "--weight-decay", type=nonnegative_number, default=WEIGHT_DECAY, metavar="X", help="weight decay of SGD"
    )
    add_seed(parser)
    add_from_scratch(parser)


def _pairs_of(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """Find the pairs to train on and those to score on; raise ConfigError for unusable folders."""
    require(
        (args.val_images is None) == (args.val_masks is None),
        "only one of --val-images and --val-masks is given; give both, or neither to score on a fifth of --images",
    )
    found = find_pairs(args.images, args.masks)
    if args.val_images is None:
        return hold_out(found, seed=args.seed)
    return found, find_pairs(args.val_images, args.val_masks)


def _prepare(args: argparse.Namespace, _: None, inputs: InputSettings) -> tuple[Scores, Job]:
    train, val = _pairs_of(args)
    known, scored = find_classes(train), find_classes(val)
    absent = sorted(set(scored.tolist()) - set(known.tolist()))
    require(
        not absent,
        f"the validation masks hold classes {absent[:5]} that no training mask holds; add training images of them",
    )
    hparams = HParams(args.lr, args.weight_decay, args.steps, min(args.batch_size, len(train)))
    crops, classes = replace(inputs, px=args.crop_px, margin=1.0), int(known.max()) + 1

    def job(encoder: Encoder, label: str) -> Scores:
        return score(
            encoder,
            (train, val),
            classes=classes,
            hparams=hparams,
            stride=args.stride,
            inputs=crops,
            seed=args.seed,
            label=label,
        )

    places = {"train": str(args.images), "val": str(args.val_images or args.images)}
    return {**places, "classes": len(known)}, job


PROTOCOL = Protocol(_add_arguments, _prepare, has_files=False, scores_baseline=lambda args: args.from_scratch)

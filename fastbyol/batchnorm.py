"""Know batch norm per view: each view of a batch is its own population, as if the network ran once a view."""

from __future__ import annotations

from torch import Tensor, nn

from fastbyol.kernels import reference

EPS = 1e-5
MOMENTUM = 0.1


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Batch norm over [V*B, ...] whose training statistics are taken per view; names and buffers are torch's own."""

    def __init__(self, channels: int, *, views: int = 2) -> None:
        super().__init__(channels, eps=EPS, momentum=MOMENTUM)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [V*B, C, ...] per view in training, by the running statistics in evaluation."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.views)
        return reference.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            views=self.views,
            momentum=MOMENTUM,
            eps=EPS,
        )


class BatchNorm1d(_PerView, nn.BatchNorm1d):
    """Per-view batch norm of vectors [V*B, C]."""


class BatchNorm2d(_PerView, nn.BatchNorm2d):
    """Per-view batch norm of feature maps [V*B, C, H, W]."""

"""Laws of the copies of weights that only a GPU can show: a captured step keeps them and is autocast's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastbyol import optim
from fastbyol.byol import BYOL
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.system.device import make_deterministic
from fastbyol.train import step
from fastbyol.train.shadows import ShadowedForward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
HEAD = HeadConfig(hidden=64, out=32)
OPTIM = OptimConfig(base_lr=0.4, weight_decay=1e-6, tau_base=0.9, warmup_epochs=0)


@pytest.fixture(autouse=True)
def _deterministic_cudnn() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


@pytest.mark.parametrize(
    ("encoder", "px"),
    [(EncoderConfig("resnet18", width=1 / 4, stem="cifar"), 32), (EncoderConfig("resnet50", width=1 / 4), 64)],
    ids=["resnet18", "resnet50"],
)
def test_replayed_steps_by_copies_are_autocasts_bit_for_bit(encoder: EncoderConfig, px: int) -> None:
    make_deterministic()
    try:
        engines = []
        for copies in (False, True):
            model = BYOL(encoder, HEAD, seed=1).cuda()
            lars = optim.build(model, model.target_of(), OPTIM)
            engine = step.engine("graph", model, lars, precision="bfloat16")
            if copies:
                engine.forward = ShadowedForward(model, lars)
            for number in range(step.WARM_UP + 4):
                generator = torch.Generator("cuda").manual_seed(number)
                views = torch.randn(32, 3, px, px, generator=generator, device="cuda")
                engine(views.to(memory_format=torch.channels_last), lr=1e-3, tau=0.9)
            engines.append(engine)
    finally:
        torch.use_deterministic_algorithms(False)
    states = [engine.model.state_dict() for engine in engines]
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    copied = engines[1].forward
    assert isinstance(copied, ShadowedForward)
    assert all(torch.equal(bits, x.bfloat16()) for x, bits in copied.shadows.of.items())

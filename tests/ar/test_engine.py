"""What the params ask of DeepSpeed, by what one step does to the weights."""

from __future__ import annotations

import pytest
import torch

from crt.ar.engine import (
    build_optimizer,
    deepspeed_engine,
    deepspeed_session,
    gather_weights,
    gradient_norm,
    set_learning_rate,
)
from crt.distributed import World, join_world
from crt.errors import UserError
from crt.params import load_params
from tests.ar.conftest import small_config
from tests.conftest import ROOT


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_are_clipped(zero_stage: int, precision: str) -> None:
    """Adam divides by the gradient's size, so only one that is clipped far below its epsilon hardly moves a weight.

    Unclipped, the first step is as long as the learning rate: moments that begin at zero are corrected for it.
    """
    params = load_params(ROOT / "params.yaml").train_ar
    config = small_config()
    codes, labels = torch.zeros(4, config.num_tokens, dtype=torch.int64), torch.arange(4)

    def largest_change(clip_norm: float) -> float:
        optimizer = params.optimizer.model_copy(update={"clip_norm": clip_norm, "weight_decay": 0.0})
        changes = {"precision": precision, "zero_stage": zero_stage, "batch_size": 4, "micro_batch_size": None}
        asked = params.model_copy(update=changes | {"optimizer": optimizer})
        with join_world() as world, deepspeed_session(world), deepspeed_engine(asked, config, 0, world) as engine:
            before = gather_weights(engine, world)
            set_learning_rate(engine, 1e-2)
            engine.backward(engine(codes, labels).mean())
            engine.step()
            after = gather_weights(engine, world)
            assert gradient_norm(engine) > 0.1  # before clipping
        return max((after[name] - before[name]).abs().max().item() for name in before)

    assert largest_change(1e9) == pytest.approx(1e-2, rel=0.02)
    assert largest_change(1e-12) < 1e-4


def test_offload_without_a_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs alone: DeepSpeed compiles the optimizer at first use."""
    params = load_params(ROOT / "params.yaml").train_ar
    with deepspeed_session(World(0, 1, torch.device("cpu"))):
        from deepspeed.ops import adam

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("requires the cpu_adam op") from RuntimeError("Ninja is required\nto load it")

        monkeypatch.setattr(adam, "DeepSpeedCPUAdam", fail)
        with pytest.raises(UserError, match=r"^train_ar\.offload: .*\(Ninja is required\): install a C\+\+ compiler"):
            build_optimizer(torch.nn.Linear(2, 2), params.optimizer, "optimizer", torch.device("cuda", 0))


def test_the_first_weights_are_those_of_the_seed() -> None:
    params = load_params(ROOT / "params.yaml").train_ar
    with join_world() as world, deepspeed_session(world):

        def first_weights(seed: int) -> dict[str, torch.Tensor]:
            with deepspeed_engine(params, small_config(), seed, world) as engine:
                return gather_weights(engine, world)

        one, again, other = first_weights(1), first_weights(1), first_weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = {name for name, weight in one.items() if weight.unique().numel() > 1}
    assert drawn and not any(torch.equal(one[name], other[name]) for name in drawn)

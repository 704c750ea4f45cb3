"""Oracles: the types of the modules, the params' rates, and the optimizer's own moments after one step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from crt.distributed import World
from crt.params import Params, load_params
from crt.stages.train_tokenizer import _update
from crt.tokenizer.objective import Objective
from crt.tokenizer.state import TrainingState

CPU = torch.device("cpu")
CHANGES = {
    "discriminator__kind": "patchgan",
    "discriminator__channels": 4,
    "discriminator__layers": 1,
    "discriminator__start_step": 3,
    "discriminator__learning_rate": 3e-4,
    "regularizer__learning_rate": 7e-4,
    "regularizer__weight_decay": 0.03,
    "optimizer__learning_rate": 5e-4,
    "optimizer__weight_decay": 0.01,
}


@pytest.fixture
def params(params_file) -> Params:
    return load_params(params_file(**{f"train_tokenizer__{key}": value for key, value in CHANGES.items()}))


@pytest.fixture
def state(params) -> TrainingState:
    return TrainingState(params.train_tokenizer, 1.0, 0, CPU)


def test_only_linear_maps_are_decayed(state):
    """Neither biases and norms nor the codebook and positions, which are tables of places."""
    networks = {"tokenizer": state.model, "regularizer": state.regularizer, "discriminator": state.discriminator}
    for name, network in networks.items():
        maps = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        decayed, free = state.optimizers[name].param_groups
        assert {id(p) for p in decayed["params"]} == {id(module.weight) for module in maps}
        assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))
        assert decayed["weight_decay"] == (0.03 if name == "regularizer" else 0.01)
        assert free["weight_decay"] == 0.0


def test_each_network_has_its_own_learning_rate_under_one_schedule(state):
    state.set_learning_rates(1.0)
    state.set_learning_rates(0.5)
    rates = {name: {group["lr"] for group in opt.param_groups} for name, opt in state.optimizers.items()}
    assert rates == {"tokenizer": {2.5e-4}, "regularizer": {3.5e-4}, "discriminator": {1.5e-4}}


@pytest.mark.parametrize("autocast", [False, True])
def test_each_network_compiles_in_one_piece(params, autocast):
    """A break in the graph would be an error, of its own or of another's tracing."""
    settings = params.train_tokenizer.model_copy(update={"channels_last": True})
    state = TrainingState(settings, 1.0, 0, CPU)
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    latents = state.model.latents(images).detach()
    quantized = state.model.quantizer(latents)
    calls = {
        state.model.encoder: (images,),
        state.model.decoder: (state.model.from_latent(quantized.values).detach(),),
        state.discriminator: (images,),
        state.regularizer: (
            latents.flatten(2).transpose(1, 2), quantized.codes.flatten(1), state.model.quantizer.vectors().detach()
        ),
    }  # fmt: skip
    for network, inputs in calls.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled = torch.compile(network, backend="eager", fullgraph=True)(*inputs)
            torch.testing.assert_close(compiled, network(*inputs), rtol=0.02, atol=0.02)


def test_the_state_before_the_last_stays_and_a_damaged_one_does_not_take_its_place(params, state, tmp_path):
    path = tmp_path / "checkpoint.pt"

    def found() -> tuple[int, TrainingState]:
        continued = TrainingState(params.train_tokenizer, 1.0, 0, CPU)
        return continued.load(path), continued

    assert found()[0] == 0
    for step in (1, 2, 3):
        state.save(path, step)
    assert found()[0] == 3
    path.rename(tmp_path / "kept")  # as a kill between the two renames of a save leaves it
    assert found()[0] == 2
    (tmp_path / "kept").rename(path)
    for _ in range(2):
        path.write_bytes(path.read_bytes()[:-10])
        step, continued = found()
        assert step == 2
        continued.save(path, 4)
    assert found()[0] == 4


def test_a_step_descends_the_clipped_gradient_and_tells_its_norm_before(state):
    """Oracle: Adam's first moment after one step is the gradient times 1 - beta_1."""
    optimizer = state.optimizers["tokenizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    norm = sum(parameter.numel() for parameter in parameters) ** 0.5
    assert state.descend("tokenizer", 0.5).item() == pytest.approx(norm, rel=1e-5)
    moments = torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in parameters])
    beta = optimizer.param_groups[0]["betas"][0]
    assert moments.norm().item() == pytest.approx((1 - beta) * 0.5, rel=1e-4)
    assert all(parameter.grad is None for parameter in parameters)


def test_dropout_differs_between_steps_and_processes_and_comes_back(params):
    architecture = params.train_tokenizer.architecture.model_copy(update={"dropout": 0.5})
    section = params.train_tokenizer.model_copy(update={"architecture": architecture})
    run = SimpleNamespace(params=params.model_copy(update={"train_tokenizer": section}))
    images = torch.rand(section.batch_size // 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def pixel(step: int, rank: int) -> float:
        state = TrainingState(section, 0.0, 0, CPU)
        objective = Objective(section, state.model, None, None, perceptual=None, device=torch.device("cpu"))
        return _update(step, images, state, objective, run=run, world=World(rank, 2, CPU))[0]["pixel"].item()

    assert pixel(0, 0) == pixel(0, 0)
    assert len({pixel(0, 0), pixel(1, 0), pixel(0, 1)}) == 3

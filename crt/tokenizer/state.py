"""Everything that tokenizer training changes, in one place: built from the params, saved, and continued bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from crt.distributed import average_gradients
from crt.errors import UserError
from crt.files import is_undamaged_archive, replacing
from crt.params import TrainTokenizer
from crt.progress import logger
from crt.randomness import seed_torch
from crt.tokenizer.discriminator import build_discriminator
from crt.tokenizer.initial_weights import load_initial_weights
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokenizer.quantizer import CodebookUpkeep
from crt.tokenizer.regularizer import Regularizer, build_regularizer


class TrainingState:
    """Networks, their optimizers, the codebook's upkeep and the averaged weights.

    What is not needed is not built: no regularizer at lambda 0, no discriminator of kind "none".

    Args:
        params: section train_tokenizer.
        lambda_: weight of the regularizer.
        seed: of the initial weights; each network draws from a stream of its own, so none depends on another.
        device: where to train.

    Raises:
        UserError: the weights to begin with, which the params name, are missing or another tokenizer's.
    """

    def __init__(self, params: TrainTokenizer, lambda_: float, seed: int, device: torch.device) -> None:
        self._newest_is_damaged = False
        seed_torch(seed, "tokenizer_init")
        self.model = Tokenizer(TokenizerConfig.from_params(params))
        load_initial_weights(self.model, params)
        self.regularizer: Regularizer | None = None
        if lambda_ > 0:
            seed_torch(seed, "regularizer_init")
            self.regularizer = build_regularizer(
                params.regularizer,
                params.quantizer.codebook_dim,
                self.model.num_tokens,
                params.quantizer.codebook_size,
            )
        seed_torch(seed, "discriminator_init")
        self.discriminator = build_discriminator(params.discriminator, params.image_size)
        for network in self._networks().values():
            network.to(device)
            if params.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.average_decay = params.weight_ema_decay

        quantizer = params.quantizer
        ema_decay = quantizer.ema_decay if quantizer.update == "ema" else None
        self.upkeep = CodebookUpkeep(self.model.quantizer, ema_decay, quantizer.revive_after_steps, seed)
        self.optimizers = build_optimizers(params, self.model, self.regularizer, self.discriminator)

    def compile(self) -> None:
        """Compile the networks that training runs; their weights keep their names."""
        # The adaptive weight goes through the decoder's graph before the loss does: its buffers must outlive that.
        torch._functorch.config.donated_buffer = False
        self.model.encoder.compile()
        self.model.decoder.compile()
        if self.regularizer is not None:
            self.regularizer.compile()
        if self.discriminator is not None:
            self.discriminator.compile()

    @property
    def learning_rate(self) -> float:
        """The tokenizer's learning rate, as last set."""
        return float(self.optimizers["tokenizer"].param_groups[0]["lr"])

    def set_learning_rates(self, factor: float) -> None:
        """Give every optimizer its own learning rate times `factor`."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def descend(self, name: str, clip_norm: float) -> Tensor:
        """One step of one optimizer on gradients averaged over the processes and clipped; clears them.

        Returns:
            Norm of the network's gradient before clipping, a scalar.
        """
        return descend(self.optimizers[name], clip_norm)

    @torch.no_grad()
    def average_weights(self, step: int, replaced_codes: Tensor) -> None:
        """Move the averaged weights towards the current ones, after step number `step`.

        The decay grows to its value as min(decay, (1 + step) / (10 + step)), so that the initial weights are soon
        forgotten; with decay 0 the average is the current weights.

        Args:
            step: counted from 0.
            replaced_codes: (R,) codes that became something else altogether, so that averaging makes no sense.
        """
        decay = min(self.average_decay, (1 + step) / (10 + step))
        targets: list[Tensor] = [*self.averaged.parameters()]
        torch._foreach_lerp_(targets, [parameter.detach() for parameter in self.model.parameters()], 1 - decay)
        if len(replaced_codes):
            codebook = self.model.quantizer.codebook
            self.averaged.quantizer.codebook[replaced_codes] = codebook[replaced_codes]

    def save(self, path: Path, step: int) -> None:
        """Write the state after `step` steps; the one that was there before stays beside it."""
        state = {
            "step": step,
            "networks": {name: network.state_dict() for name, network in self._networks().items()},
            "averaged": self.averaged.state_dict(),
            "upkeep": self.upkeep.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            if path.exists() and not self._newest_is_damaged:
                os.replace(path, _previous(path))
        self._newest_is_damaged = False

    def load(self, path: Path) -> int:
        """Continue from the last file that `save` wrote, or the one before it if that is damaged.

        Returns:
            The number of steps done; 0 if there is no file.

        Raises:
            UserError: all that there is is damaged.
        """
        places = [place for place in (path, _previous(path)) if place.exists()]
        for place in places:
            if is_undamaged_archive(place):
                self._newest_is_damaged = place != path  # it must not take the place of the one that is whole
                return self._restore(place)
            logger.warning("%s: damaged, its checksums are wrong: is ignored", place)
        if places:
            raise UserError(f"{path}: damaged, and none before it is whole: delete it to train from the start")
        return 0

    def _restore(self, path: Path) -> int:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            for name, network in self._networks().items():
                network.load_state_dict(state["networks"][name])
            self.averaged.load_state_dict(state["averaged"])
            self.upkeep.load_state_dict(state["upkeep"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            return int(state["step"])
        except (
            *(RuntimeError, KeyError, ValueError, TypeError, AttributeError, EOFError),
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path}: not this training's state ({reason}): delete it to train from the start"
            ) from None

    def _networks(self) -> dict[str, nn.Module]:
        networks = {"tokenizer": self.model, "regularizer": self.regularizer, "discriminator": self.discriminator}
        return {name: network for name, network in networks.items() if network is not None}


def _previous(path: Path) -> Path:
    """Where the state stays that `path` held before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def descend(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """See `TrainingState.descend`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def build_optimizers(
    params: TrainTokenizer, model: Tokenizer, regularizer: nn.Module | None, discriminator: nn.Module | None
) -> dict[str, torch.optim.AdamW]:
    """One optimizer per network, by the network's name, each with a learning rate of its own.

    Args:
        params: section train_tokenizer.
        model, regularizer, discriminator: the networks; None: there is none, and no optimizer.
    """
    optimizers = {"tokenizer": _adamw(model, params.optimizer, params.optimizer.learning_rate)}
    if discriminator is not None:
        optimizers["discriminator"] = _adamw(discriminator, params.optimizer, params.discriminator.learning_rate)
    if regularizer is not None:
        optimizers["regularizer"] = _adamw(regularizer, params.regularizer, params.regularizer.learning_rate)
    return optimizers


def _adamw(network: nn.Module, params: Any, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and convolutions only: biases, norms and the codebook are no linear maps."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.endswith(("codebook", "positions"))

    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": params.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(params.betas), fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = learning_rate
    return optimizer

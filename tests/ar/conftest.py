"""Inputs for the tests of stage 2: small models, and token caches with the lineage of a real run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt.ar.model import ARConfig, ARTransformer, save_model
from crt.params import load_params
from crt.progress import logger
from crt.stage import open_run, publish
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokens.layout import CacheHeader, write_index, write_shard
from tests.conftest import ROOT, write_params

CODEBOOK, GRID, CLASSES = 32, (4, 4), 5

# A model and a run of seconds, whatever the defaults are; a batch that two processes can share.
SMALL = {
    "prepare_data.image_size": 16,
    "train_tokenizer.architecture.encoder_channels": 16,
    "train_tokenizer.architecture.decoder_channels": 16,
    "train_tokenizer.quantizer.codebook_size": CODEBOOK,
    "train_ar.model.layers": 2,
    "train_ar.model.heads": 2,
    "train_ar.model.width": 32,
    "train_ar.model.ffn_multiple": 16,
    "train_ar.model.dropout": 0.1,
    "train_ar.model.label_dropout": 0.1,
    "train_ar.optimizer.learning_rate": 2.0e-3,
    "train_ar.optimizer.weight_decay": 0.05,
    "train_ar.optimizer.schedule": "cosine",
    "train_ar.optimizer.warmup_steps": 2,
    "train_ar.steps": 10,
    "train_ar.batch_size": 16,
    "train_ar.precision": "float32",
    "train_ar.zero_stage": 1,
    "train_ar.validate_every": 5,
    "train_ar.checkpoint_every": 4,
    "train_ar.keep_checkpoints": 2,
    "train_ar.sample_images": 5,
    "sample.num_images": 20,
    "sample.batch_size": 8,
}


def small_config(**changes: Any) -> ARConfig:
    values: dict[str, Any] = {
        "layers": 2,
        "heads": 2,
        "width": 32,
        "ffn_multiple": 16,
        "norm_eps": 1e-5,
        "rope_base": 10000.0,
        "dropout": 0.1,
        "init_std": 0.02,
        "codebook_size": CODEBOOK,
        "grid": GRID,
        "num_classes": CLASSES,
        "class_names": tuple("abcde"),
        "tokenizer_content": None,
    }
    return ARConfig(**values | changes)


def small_model(seed: int = 0, scale: float = 1.0, **changes: Any) -> ARTransformer:
    """A model whose predictions differ from each other: all its matrices are drawn, the head's too."""
    torch.manual_seed(seed)
    model = ARTransformer(small_config(**changes)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=scale * parameter.shape[-1] ** -0.5)
    return model


def draw_codes(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, T) that a model can learn: each follows from the class and the code before, most of the time."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    codes = rng.integers(0, CODEBOOK, (rows, GRID[0] * GRID[1]))
    for position in range(1, codes.shape[1]):
        likely = (3 * codes[:, position - 1] + labels) % CODEBOOK
        codes[:, position] = np.where(rng.random(rows) < 0.8, likely, codes[:, position])
    return codes, labels


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Each run in this process logs to the test's own stderr."""
    yield
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make params and a published token cache; returns the command line of `train_ar` on them."""
    monkeypatch.chdir(ROOT)

    def make(folder: Path = tmp_path, **changes: Any) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        params = write_params(folder / "params.yaml", SMALL | changes)
        tokens = publish_tokens(folder, params)
        return ["train_ar", "--params", str(params), "--tokens", str(tokens), "--out", str(folder / "ar")]

    return make


def publish_tokens(folder: Path, params: Path) -> Path:
    """The output folders of the stages before `train_ar`: no images, an untrained tokenizer, and made-up codes."""
    data, tokenizer, tokens = folder / "data", folder / "tokenizer", folder / "tokens"
    run = open_run("prepare_data", params, {}, data)
    run.staging.mkdir(parents=True)
    (run.staging / "file").write_text("stands for the images")
    publish(run)
    run = open_run("train_tokenizer", params, {"data": data}, tokenizer)
    torch.manual_seed(0)
    Tokenizer(TokenizerConfig.from_params(run.params.train_tokenizer)).save(run.staging)
    publish(run)
    run = open_run("tokenize", params, {"data": data, "tokenizer": tokenizer}, tokens)
    run.staging.mkdir(parents=True)
    codebook_size = load_params(params).train_tokenizer.quantizer.codebook_size
    for split, rows in (("train", 256), ("val", 27)):
        codes, labels = draw_codes(rows, seed=rows)
        header = CacheHeader(
            split=split,
            rows=rows,
            views=("center",),
            grid=GRID,
            codebook_size=codebook_size,
            num_classes=CLASSES,
            tokenizer_content=run.manifests["train_tokenizer"].content,
            data_content=run.manifests["prepare_data"].content,
            block_rows=64,
        )
        write_shard(
            run.staging,
            run.work / "tmp",
            header,
            0,
            codes=codes[:, None],
            labels=labels,
            source_index=np.arange(rows),
        )
        write_index(run.staging, run.work / "tmp", header, list("abcde"))
    publish(run)
    return tokens


def publish_model(folder: Path, params: Path, **changes: Any) -> Path:
    """An output folder of `train_ar` on `publish_tokens`, with a model of `small_model` that was not trained."""
    run = open_run("train_ar", params, {"tokens": folder / "tokens"}, folder / "ar")
    run.staging.mkdir(parents=True)
    content = run.manifests["tokenize"].inputs["train_tokenizer"]["content"]
    model = small_model(scale=2.0, **{"tokenizer_content": content} | changes)
    save_model(model.state_dict(), model.config, run.staging)
    publish(run)
    return folder / "ar"

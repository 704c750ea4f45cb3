"""The CIFAR-10 and ImageNet presets on real images, shortened to what two cores do in some minutes (`make prove`).

The ImageNet rehearsal keeps the preset's 256 px, 256 tokens, 16,384 codes, discriminator, precision and ten-crop
views; it narrows the networks and takes its images from a folder. Pictures stay in the folder that pytest names.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from crt.params import load_params
from tests.conftest import ROOT, write_params
from tests.test_end_to_end import make_project

# Revival: without it so few steps end with a handful of codes in use, and the pictures show nothing.
CIFAR10 = {
    "prepare_data.max_images_per_class": 300,
    "train_tokenizer.quantizer.revive_after_steps": 20,
    "train_tokenizer.steps": 150,
    "train_tokenizer.batch_size": 32,
    "train_tokenizer.weight_ema_decay": 0.95,
    "train_tokenizer.regularizer.anneal_steps": 50,
    "train_tokenizer.optimizer.warmup_steps": 20,
    "train_ar.model.layers": 4,
    "train_ar.steps": 150,
    "train_ar.batch_size": 32,
    "train_ar.optimizer.warmup_steps": 10,
    "sample.num_images": 200,
    "evaluate.classifier.channels": 16,
    "evaluate.classifier.steps": 200,
}
IMAGENET = {
    # The preset's, in so few steps of so small a net, leaves a handful of codes and a grey picture (dev/LOG.md).
    "lambda": 0.3,
    "prepare_data.source": "imagefolder",
    "prepare_data.val_fraction": 0.2,
    "prepare_data.max_rejected_fraction": 0.0,
    "train_tokenizer.quantizer.revive_after_steps": 10,
    "train_tokenizer.architecture.encoder_channels": 16,
    "train_tokenizer.architecture.decoder_channels": 16,
    "train_tokenizer.architecture.norm_groups": 16,
    "train_tokenizer.loss.lpips_weight": 0.0,
    "train_tokenizer.discriminator.channels": 16,
    "train_tokenizer.discriminator.start_step": 250,
    "train_tokenizer.optimizer.learning_rate": 1.0e-3,
    "train_tokenizer.regularizer.width": 64,
    "train_tokenizer.regularizer.heads": 4,
    "train_tokenizer.regularizer.anneal_steps": 200,
    "train_tokenizer.steps": 300,
    "train_tokenizer.batch_size": 4,
    "train_tokenizer.weight_ema_decay": 0.95,
    "train_tokenizer.compile": False,
    "train_tokenizer.checkpoint_every": 100,
    "tokenize.views": ["ten_crop@1.1"],
    "tokenize.batch_size": 8,
    "train_ar.model.layers": 2,
    "train_ar.model.heads": 4,
    "train_ar.model.width": 128,
    "train_ar.steps": 40,
    "train_ar.batch_size": 8,
    "train_ar.compile": False,
    "sample.num_images": 12,
    "sample.batch_size": 6,
    "evaluate.features": "classifier",
    "evaluate.image_size": None,
    "evaluate.generation_reference": "val",
    "evaluate.adm_reference": None,
    "evaluate.lpips": False,
    "evaluate.classifier.channels": 8,
    "evaluate.classifier.steps": 20,
    "evaluate.classifier.batch_size": 8,
    "evaluate.batch_size": 6,
}


@pytest.mark.parametrize(("preset", "changes"), [("cifar10", CIFAR10), ("imagenet256", IMAGENET)])
def test_shortened_presets_are_valid(preset, changes, tmp_path):
    path = write_params(
        tmp_path / "params.yaml", changes | {"prepare_data.path": "images"}, base=ROOT / "presets" / f"{preset}.yaml"
    )
    assert load_params(path).train_tokenizer.steps == changes["train_tokenizer.steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "source", "changes", "psnr"),
    [("cifar10", "cifar10_archive", CIFAR10, 17.0), ("imagenet256", "imagenet_sample", IMAGENET, 13.0)],
)
def test_shortened_preset_runs_every_stage_and_shows_the_images(preset, source, changes, psnr, tmp_path, request):
    path = request.getfixturevalue(source)
    project = make_project(tmp_path, {})
    write_params(project.params, changes | {"prepare_data.path": str(path)}, base=ROOT / "presets" / f"{preset}.yaml")
    project.run("snakemake", "--cores", "1", "all")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # A grey picture of the mean colour scores 11 to 12 dB: above that the reconstruction shows the image.
    assert metrics["psnr"] > psnr
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(tmp_path / "out/evaluation" / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    print(project.run("python", "-m", "crt", "results"), tmp_path)

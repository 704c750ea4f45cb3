"""crt/params.py against the files that ship and against mistakes that users make."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from typing import Any

import pytest

from crt.errors import UserError
from crt.params import load_params, parse_view, validate_params
from crt.yaml_files import read_yaml
from tests.conftest import ROOT, override

FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return read_yaml(ROOT / "params.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_files_are_complete_and_valid(path):
    params = load_params(path)
    assert params.model_dump(by_alias=True) == read_yaml(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_ar.steps": -1}, "train_ar.steps: must be greater than or equal to 0, got -1"),
        ({"train_ar.steps": 0}, "train_ar: steps is 0, which takes the weights of init_from as they are"),
        ({"train_ar.batch_size": 0}, "train_ar.batch_size: must be greater than 0, got 0"),
        ({"train_ar.steps": "100"}, 'train_ar.steps: must be a whole number, got "100"'),
        ({"train_ar.steps": True}, "train_ar.steps: must be a whole number, got true"),
        ({"lambda": -0.1}, "lambda: must be greater than or equal to 0"),
        ({"lambda": float("nan")}, "lambda: must be"),
        ({"lambda": None}, "lambda: must be a number, got null"),
        ({"tokenize.views": "center"}, 'tokenize.views: must be a list, got "center"'),
        ({"tokenize.views": []}, "tokenize.views: too few entries: give at least 1, got []"),
        ({"sample.labels": []}, "sample.labels: too few entries: give at least 1, or write null, got []"),
        ({"sample.guidance_interval": [0, 0, 1]}, "guidance_interval: too many entries: give at most 2, got [0, 0, 1]"),
        ({"train_ar.zero_stage": {(1,): 2}}, "train_ar.zero_stage: must be 0, 1, 2 or 3, got {(1,): 2}"),
        ({"train_ar.zero_stage": 4}, "train_ar.zero_stage: must be 0, 1, 2 or 3"),
        *(
            ({"train_ar.zero_stage": value}, f"train_ar.zero_stage: must be 0, 1, 2 or 3, got {shown}")
            for value, shown in ((True, "true"), (False, "false"), (1.0, "1.0"), (2**63, 2**63), (None, "null"))
        ),
        *(
            ({key: 2**62}, f"{key}: must be less than or equal to {most}, got {2**62}")
            for key, most in (
                ("train_tokenizer.architecture.z_channels", 2**16),
                ("train_tokenizer.architecture.decoder_blocks", 2**16),
                ("train_tokenizer.quantizer.codebook_dim", 2**16),
                ("train_ar.model.layers", 2**16),
                ("train_ar.model.ffn_multiple", 2**16),
                ("evaluate.classifier.channels", 2**16),
                ("train_tokenizer.batch_size", 2**31),
                ("train_ar.batch_size", 2**31),
                ("sample.batch_size", 2**31),
                ("train_ar.sample_images", 2**16),
            )
        ),
        ({"sample.num_images": 2**63}, f"sample.num_images: must be less than {2**63}, got {2**63}"),
        ({"train_ar.model.heads": 3}, "train_ar.model: width 128 is not divisible by heads 3"),
        ({"train_ar.model.heads": 64}, "2D RoPE"),
        ({"train_ar.micro_batch_size": 100}, "micro_batch_size 100 does not divide batch_size 64"),
        ({"train_ar.offload": "optimizer_and_parameters"}, "needs zero_stage 3"),
        ({"train_ar.offload": "optimizer", "train_ar.zero_stage": 0}, "offload 'optimizer' needs zero_stage 1, 2 or 3"),
        ({"train_ar.compile": True, "train_ar.zero_stage": 3}, "compile needs zero_stage 0, 1 or 2"),
        ({"train_tokenizer.image_size": 18}, "not divisible by the downsampling 4"),
        ({"train_tokenizer.image_size": 32}, "both must be equal"),
        (
            {"prepare_data.storage": "encoded", "prepare_data.image_size": 12},
            "prepare_data.image_size 12 is smaller than the crop train_tokenizer.image_size 16",
        ),
        ({"prepare_data.image_size": None}, "stores images of one size: set prepare_data.image_size to a number"),
        ({"train_tokenizer.architecture.norm_groups": 24}, "norm_groups 24 does not divide"),
        (
            {
                "train_tokenizer.architecture.encoder_channels": 12,
                "train_tokenizer.architecture.channel_multipliers": [2, 4, 4],
            },
            "norm_groups 8 does not divide a width of 12 channels: choose encoder_channels as a multiple",
        ),
        *(
            (
                {
                    f"train_tokenizer.architecture.{coder}_channels": 8,
                    "train_tokenizer.architecture.channel_multipliers": multipliers,
                },
                "norm_groups 8 leave one value for each group at the lowest level, which is a single pixel, and "
                f"normalising makes it 0: lower norm_groups, or raise {coder}_channels",
            )
            for coder, multipliers in (
                ("encoder", [1, 1, 1, 1, 1]),
                ("encoder", [1, 1, 1, 1, 2]),
                ("decoder", [2, 2, 2, 2, 1]),
            )
        ),
        ({"train_tokenizer.architecture.decoder_channels": 12}, "12 channels: choose decoder_channels as a multiple"),
        ({"train_tokenizer.regularizer.kind": "none"}, "set lambda to 0 or choose a regularizer"),
        ({"train_tokenizer.regularizer.heads": 3}, "train_tokenizer.regularizer: width 64 is not divisible by heads 3"),
        ({"tokenize.views": ["centre"]}, "unknown view 'centre'"),
        ({"tokenize.views": ["center", "flop"]}, "tokenize.views.1: unknown view 'flop': use 'center', 'flip' or"),
        ({"tokenize.views": ["ten_crop@1.1"]}, "set prepare_data.storage to 'encoded'"),
        (
            {"tokenize.views": ["ten_crop@1.1", "ten_crop@1.10"]},
            "views ['ten_crop@1.1', 'ten_crop@1.10'] names a view twice: name each once",
        ),
        ({"sample.top_k": 1000}, "exceeds train_tokenizer.quantizer.codebook_size 64"),
        ({"sample.guidance_scale": 0.5}, "sample.guidance_scale"),
        # What the sampler would refuse, once all is trained.
        (
            {"sample.guidance_scale": 1e7},
            "sample.guidance_scale: must be less than or equal to 1000000, got 10000000.0",
        ),
        ({"sample.guidance_sweep": [1.0, 1e7]}, "sample.guidance_sweep.1: must be less than or equal to 1000000"),
        ({"sample.temperature": 1e-7}, "sample.temperature: must be greater than or equal to 0.000001, got 1e-07"),
        *(
            ({key: 1e38}, f"{key}: must be less than or equal to 1000000000000000")
            for key in ("lambda", "train_ar.optimizer.learning_rate", "train_tokenizer.loss.pixel_weight")
        ),
        ({"train_tokenizer.min_crop": 1e-300}, "train_tokenizer.min_crop: must be greater than or equal to 0.01"),
        ({"sample.guidance_interval": [0.7, 0.3]}, "guidance_interval [0.7, 0.3] must ascend"),
        ({"sample.export": ["png", "png"]}, "sample: export ['png', 'png'] names a format twice: name each once"),
        ({"sample.guidance_sweep": [1.5, 1.5]}, "guidance_sweep [1.5, 1.5] names a scale twice"),
        ({"sample.guidance_scale": 2.0, "sample.guidance_sweep": [2.0]}, "or guidance_scale 2 again"),
        *(
            ({"prepare_data.source": source}, f"source '{source}' needs a folder or archive: set prepare_data.path")
            for source in ("imagefolder", "imagenet", "webdataset", "tfrecord", "parquet", "arrow", "lmdb", "arrays")
        ),
        ({"prepare_data.path": "digits"}, "source 'digits' comes with scikit-learn: set prepare_data.path to null"),
        ({"prepare_data.path": 2012}, "prepare_data.path: must be text, got 2012: put it into quotes"),
        ({"prepare_data.path": ""}, "prepare_data.path: is empty: give a path, or null for none"),
        ({"prepare_data.path": "a\0b"}, r"prepare_data.path: 'a\x00b' holds a character that no path may"),
        ({"prepare_data.path": "\ud800"}, r"prepare_data.path: '\ud800' holds a character that no path may"),
        ({"evaluate.adm_reference": "a\0b"}, "evaluate.adm_reference: "),
        ({"prepare_data.source": "mnist"}, "prepare_data.source: must be 'digits', 'cifar10'"),
        ({"evaluate.generation_reference": "adm_train"}, "set evaluate.adm_reference"),
        (
            {"evaluate.generation_reference": "adm_train", "evaluate.adm_reference": "adm.npz"},
            "generation_reference 'adm_train' needs evaluate.features 'inception'",
        ),
        ({"train_ar.model": 3}, "train_ar.model: must be a mapping with the keys layers"),
        ({"train_ar.model.label_dropout": 0.0}, "set sample.guidance_scale to 1 and guidance_sweep to []"),
        (
            {"train_ar.model.label_dropout": 0.0, "sample.guidance_scale": 1.0, "sample.guidance_sweep": [1.5]},
            "no unconditional prediction for the guidance scale 1.5",
        ),
        ({"train_tokenizer.discriminator.kind": "patchgan"}, "discriminator.start_step 20000 is not before the end"),
        (
            {"train_tokenizer.discriminator.kind": "patchgan", "train_tokenizer.steps": 20_000},
            "discriminator.start_step 20000 is not before the end, steps is 20000",
        ),
        (
            {"train_tokenizer.discriminator.kind": "patchgan", "train_tokenizer.discriminator.start_step": 0},
            "discriminator.layers 3 leave no patch of an image of 16 px: lower train_tokenizer.discriminator.layers",
        ),
        (
            {
                "train_tokenizer.discriminator.kind": "stylegan",
                "train_tokenizer.discriminator.start_step": 0,
                "train_tokenizer.discriminator.layers": 5,
            },
            "discriminator.layers 5 halve the image's 16 px to a fraction",
        ),
        ({"train_tokenizer.quantizer.codebook_dim": 1}, "leaves two codes, 1 and -1"),
        ({"evaluate.image_size": 256}, "image_size is for features 'inception'"),
        (
            {"train_tokenizer.loss.lpips_weight": 1.0, "train_tokenizer.image_size": 8, "prepare_data.image_size": 8},
            "loss.lpips_weight 1 needs images of 16 px at least",
        ),
        (
            {"evaluate.lpips": True, "train_tokenizer.image_size": 8, "prepare_data.image_size": 8},
            "evaluate.lpips needs images of 16 px at least",
        ),
    ],
)
def test_bad_values_are_refused_by_key_and_remedy(values, change, expected):
    with pytest.raises(UserError) as caught:
        validate_params(override(copy.deepcopy(values), change), "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        (None, "lamda", "lamda: unknown key: did you mean 'lambda'?"),
        ("train_ar", "step", "train_ar.step: unknown key: did you mean 'steps'?"),
        ("sample", "zzz", "sample.zzz: unknown key: known keys: num_images"),
        ("sample", 3, "sample.3: unknown key: known keys: num_images"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(values, section, key, expected):
    changed = copy.deepcopy(values)
    (changed if section is None else changed[section])[key] = 1
    with pytest.raises(UserError, match=f"^params.yaml: {expected.replace('?', '[?]')}"):
        validate_params(changed, "params.yaml")


@pytest.mark.parametrize(
    "change",
    [
        {"sample.top_k": 64},  # all codes
        {"sample.guidance_interval": [0.5, 0.5]},
        {"sample.guidance_scale": 1e6, "sample.temperature": 1e-6},
        {"tokenize.views": ["ten_crop@1"]},
        {"tokenize.views": ["ten_crop@1", "ten_crop@4"], "prepare_data.storage": "encoded"},
        {"train_tokenizer.loss.lpips_weight": 1.0, "evaluate.lpips": True},  # at 16 px
        # Without a step there is no adversary that could come too late.
        {
            "train_tokenizer.steps": 0,
            "train_tokenizer.init_from": "out/tokenizer",
            "train_tokenizer.discriminator.kind": "patchgan",
        },
    ],
)
def test_the_last_values_before_those_that_are_refused_are_fine(values, change):
    validate_params(override(copy.deepcopy(values), change), "params.yaml")


def test_every_wrong_key_gets_its_own_line(values):
    changed = override(copy.deepcopy(values), {"train_ar.steps": -1, "sample.top_p": 2.0})
    del changed["seed"]
    with pytest.raises(UserError) as caught:
        validate_params(changed, "p")
    assert {line.split(": ")[1] for line in str(caught.value).splitlines()} == {
        "seed",
        "train_ar.steps",
        "sample.top_p",
    }


def test_numbers_are_read_as_dvc_writes_them(tmp_path):
    # DVC writes 1e-5 as 1e-05, which PyYAML reads as text.
    (tmp_path / "p.yaml").write_text("rate: 1e-05\nflag: yes\n")
    assert read_yaml(tmp_path / "p.yaml") == {"rate": 1e-5, "flag": "yes"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "line 1"),
        ("- 1\n- 2\n", "is not a mapping of keys to values: give a file of lines `key: value`"),
        ("a: 1\na: 2\n", 'line 2, column 1: the key "a" stands here a second time: remove one of the two'),
        ("a: 'b\n", "line 2, column 1: while scanning a quoted scalar, found unexpected end of stream"),
        ("a: 1\nseed: 2024-13-45", "value cannot be read (month must be in 1..12)"),
        ("a: 1\nseed: 2024-13-45", "line 2, column 7"),
        ("seed: !!int abc", "value cannot be read (invalid literal for int() with base 10: 'abc'): correct it, or put"),
        ("seed: !!bool abc", "value cannot be read"),
        (f"seed: {'9' * 5000}", "value cannot be read (Exceeds the limit"),
        (f"seed: 0x{'f' * 5000}", "value cannot be read"),
        (f"a: {'[' * 1000}{']' * 1000}", "nested too deep"),
        (r'a: "\UFFFFFFFF"', "impossible escape"),
        ("a:\n\tb: 1", "line 2, column 1: while scanning for the next token, found character '\\t' that"),
        ("a:\n\tb: 1", "token: write spaces instead of tabs"),
        ("a:\t1", "write spaces instead of tabs"),
        ("%YAML 1.3\n---\na: 1", "version minor part can only be 2 or 1, got (1, 3): leave the %YAML line out"),
        ("a: 1\0", "holds the character #x0000: save it as UTF-8 text without that"),
        ("a: 1".encode("utf-16"), "cannot be read (not UTF-8 text): save it as UTF-8, or give the path of a YAML file"),
        ("a: 1".encode("utf-16-le"), "holds the character #x0000: save it as UTF-8 text without that"),
    ],
)
def test_broken_yaml_is_one_line(tmp_path, text, expected):
    path = tmp_path / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_is_fast_and_loads_no_torch():
    script = "import sys; from crt.params import load_params; load_params('params.yaml'); print('torch' in sys.modules)"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    # The promise is two seconds; a loaded test machine may double what a quiet one needs (0.4 s).
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("view", "parsed"), [("center", ("center", 1.0)), ("flip", ("flip", 1.0)), ("ten_crop@1.05", ("ten_crop", 1.05))]
)
def test_view_names(view, parsed):
    assert parse_view(view) == parsed


@pytest.mark.parametrize(
    "view", ["", "ten_crop", "center@1.1", "ten_crop@0.5", "ten_crop@4.1", "ten_crop@x", "ten_crop@nan"]
)
def test_bad_view_names(view):
    with pytest.raises(ValueError, match="unknown view"):
        parse_view(view)


def test_the_imagenet_preset_trains_stage_1_as_llamagen_does():
    """Oracle: tokenizer_image/vq_train.py at ce98ec4: Adam without decay, rate 1e-4, betas (0.9, 0.95)."""
    params = load_params(ROOT / "presets/imagenet256.yaml").train_tokenizer
    optimizer = params.optimizer.model_dump()
    assert optimizer | {"warmup_steps": 0, "final_fraction": 1.0} == {
        "learning_rate": 1e-4,
        "betas": [0.9, 0.95],
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "final_fraction": 1.0,
    }
    assert params.discriminator.learning_rate == 1e-4

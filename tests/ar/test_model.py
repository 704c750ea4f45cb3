"""The transformer against the paper's numbers, definitions written out as loops, and PyTorch's own layers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from crt import Generator, Tokenizer
from crt.ar.cpu_decoder import CPUDecoder
from crt.ar.decoder import Decoder
from crt.ar.model import (
    ARConfig,
    ARTransformer,
    Block,
    RMSNorm,
    count_parameters,
    load_model,
    rotary_table,
    rotate,
    save_model,
)
from crt.errors import UserError
from tests.ar.conftest import CODEBOOK, draw_codes, small_config, small_model
from tests.tokenizer.conftest import tiny_config

# Layers, heads, width, feed-forward width and parameters of LlamaGen's models (arXiv 2406.06525 and its code).
PUBLISHED = {
    "B": (12, 12, 768, 2048, 110_888_448),
    "L": (24, 16, 1024, 2816, 342_910_976),
    "XL": (36, 20, 1280, 3584, 774_699_520),
    "XXL": (48, 24, 1536, 4096, 1_410_972_672),
    "3B": (24, 32, 3200, 8704, 3_096_659_200),
}


def codes_and_labels(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    codes, labels = draw_codes(rows, seed=0)
    return torch.from_numpy(codes), torch.from_numpy(labels)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_their_parameters_to_the_digit(size: str) -> None:
    layers, heads, width, ffn_width, parameters = PUBLISHED[size]
    config = small_config(
        layers=layers, heads=heads, width=width, ffn_multiple=256, codebook_size=16384, grid=(16, 16), num_classes=1000
    )
    assert config.ffn_width == ffn_width
    assert count_parameters(config) == parameters


def test_an_untrained_model_is_uniform() -> None:
    torch.manual_seed(0)
    losses = ARTransformer(small_config())(*codes_and_labels())
    assert losses.shape == (6, 16)
    torch.testing.assert_close(losses, torch.full((6, 16), math.log(CODEBOOK)))


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    model = ARTransformer(small_config(width=256, heads=4, init_std=0.05))
    for name, parameter in model.named_parameters():
        expected = 0.0 if name == "head.weight" or "norm" in name else 0.05
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_rotation_is_that_of_the_definition() -> None:
    """Oracle: complex multiplication by e^(i angle), position by position and pair by pair."""
    rows, columns, width, base = 3, 5, 16, 100.0
    table = rotary_table((rows, columns), width, base)
    x = torch.randn(2, rows * columns, 3, width, dtype=torch.float64)
    turned = rotate(x, table)
    assert torch.equal(turned[:, 0], torch.zeros_like(turned[:, 0]))  # the class
    for position in range(1, rows * columns):
        row, column = divmod(position - 1, columns)
        for pair in range(width // 2):
            half, place = divmod(pair, width // 4)
            angle = (row, column)[half] * base ** (-place / (width // 4))
            value = torch.complex(x[:, position, :, 2 * pair], x[:, position, :, 2 * pair + 1])
            expected = value * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(turned[:, position, :, 2 * pair], expected.real, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(turned[:, position, :, 2 * pair + 1], expected.imag, atol=1e-6, rtol=1e-6)


def test_block_is_that_of_the_definition() -> None:
    """Oracle: norm, attention and SwiGLU in loops over heads and positions, in float64."""
    model = small_model().double()
    block = model.blocks[0]
    assert isinstance(block, Block)
    heads, width = model.config.heads, model.config.head_width
    table = rotary_table(model.config.grid, width, model.config.rope_base)
    x = torch.randn(2, 16, model.config.width, dtype=torch.float64)

    def norm(x: torch.Tensor, layer: RMSNorm) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * layer.weight

    q, k, v = (norm(x, block.attention_norm) @ block.attention.qkv.weight.T).chunk(3, dim=-1)
    attended = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q_head = rotate(q[:, :, None, part], table)[:, :, 0]
        k_head = rotate(k[:, :, None, part], table)[:, :, 0]
        for t in range(16):
            scores = torch.stack([(q_head[:, t] * k_head[:, s]).sum(-1) / width**0.5 for s in range(t + 1)], dim=-1)
            weights = scores.softmax(-1)
            attended[:, t, part] = sum(weights[:, s, None] * v[:, s, part] for s in range(t + 1))
    h = x + attended @ block.attention.out.weight.T
    gate, up = (norm(h, block.ffn_norm) @ block.ffn.gate_up.weight.T).chunk(2, dim=-1)
    expected = h + (gate / (1 + (-gate).exp()) * up) @ block.ffn.down.weight.T
    # The rotation is rounded to float32, as in a real model.
    torch.testing.assert_close(block(x, table), expected, atol=1e-5, rtol=1e-5)


def test_a_prediction_sees_only_the_class_and_the_codes_before() -> None:
    model = small_model()
    codes, labels = codes_and_labels()
    before = model.logits(codes, labels)
    for position in (0, 7, 15):
        changed = codes.clone()
        changed[:, position] = (codes[:, position] + 1) % CODEBOOK
        differs = (model.logits(changed, labels) != before).any(-1).all(0)  # T
        assert differs.tolist() == [t > position for t in range(16)]
    assert (model.logits(codes, (labels + 1) % 5) != before).any(-1).all()


@pytest.mark.parametrize("kind", [Decoder, CPUDecoder])
@pytest.mark.parametrize("changes", [{}, {"grid": (2, 8)}, {"heads": 1, "width": 20}, {"layers": 1, "heads": 8}])
def test_cached_predictions_equal_uncached(changes: dict, kind: type[Decoder]) -> None:
    model = small_model(scale=2.0, **changes)
    codes, labels = codes_and_labels()
    expected = model.logits(codes, labels)
    assert expected.std() > 0.5
    decoder = kind(model)
    for _ in range(2):  # position 0 begins anew
        previous = labels
        for position in range(16):
            torch.testing.assert_close(
                decoder.next_logits(previous, position), expected[:, position], atol=1e-4, rtol=0
            )
            previous = codes[:, position]


def test_losses_are_the_cross_entropy_of_the_predictions() -> None:
    model = small_model()
    codes, labels = codes_and_labels()
    expected = -model.logits(codes, labels).log_softmax(-1).gather(-1, codes[:, :, None])[..., 0]
    torch.testing.assert_close(model(codes, labels), expected)


def test_activation_checkpointing_changes_no_gradient() -> None:
    codes, labels = codes_and_labels()
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train().requires_grad_(True)
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)  # dropout is on
        model(codes, labels).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_it_compiles_in_one_piece() -> None:
    """As one GPU trains it: a break in the graph would be an error."""
    model = small_model(dropout=0.0).requires_grad_(True).train()
    codes, labels = codes_and_labels()
    expected = torch.autograd.grad(model(codes, labels).mean(), list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(codes, labels).mean(), list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_only_and_never_on_attention_weights() -> None:
    codes, labels = codes_and_labels()
    model = small_model(dropout=0.5)
    assert torch.equal(model.logits(codes, labels), model.logits(codes, labels))
    model.train()
    assert not torch.equal(model.logits(codes, labels), model.logits(codes, labels))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model.logits(codes, labels), model.logits(codes, labels))


def test_a_saved_model_predicts_the_same(tmp_path) -> None:
    model = small_model(class_names=("cat", "hund", "猫", "d", "e"), tokenizer_content="abc")
    save_model(model.state_dict(), model.config, tmp_path)
    loaded = load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert loaded.config == model.config
    codes, labels = codes_and_labels()
    assert torch.equal(loaded.logits(codes, labels), model.logits(codes, labels))


def test_a_folder_that_is_no_model_is_refused(tmp_path) -> None:
    def refused(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern) as error:
            load_model(tmp_path, torch.float32, torch.device("cpu"))
        assert "\n" not in str(error.value)

    refused("config.json: not found: name the folder of a trained or imported transformer of stage 2")
    (tmp_path / "manifest.json").write_text('{"stage": "tokenize"}')
    refused("holds what tokenize made, no model: name the folder")
    model = small_model()
    save_model(model.state_dict(), model.config, tmp_path)
    path = tmp_path / "model.safetensors"
    path.rename(tmp_path / "aside")
    refused("model.safetensors: not found")
    (tmp_path / "aside").rename(path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors: truncated or damaged")
    save_model(model.state_dict(), small_config(width=64), tmp_path)
    refused(r"another architecture: weight 'class_embedding.weight' has shape \(6, 32\), expected \(6, 64\)")
    save_model(model.state_dict() | {"surplus": torch.zeros(1)}, model.config, tmp_path)
    refused("weight 'surplus' is left over")
    name = "head.weight"
    save_model(model.state_dict() | {name: model.state_dict()[name].to(torch.int8)}, model.config, tmp_path)
    refused("weight 'head.weight' is of type torch.int8, expected floats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "no transformer of stage 2 \\(kind 'other', not 'crt_ar'\\)"),
        ({"schema": 99}, "has schema 99, this version reads 1"),
        ({"colour": 1}, "key 'colour' is unknown"),
        ({"layers": "2"}, "key 'layers' is '2'"),
        ({"layers": 0}, "key 'layers' is 0"),
        ({"grid": [4]}, "key 'grid' is \\[4\\]"),
        ({"class_names": "abcde"}, "key 'class_names' is 'abcde'"),
        ({"heads": 3}, "width 32 is not a multiple of 4 channels for each of 3 heads"),
    ],
)
def test_a_config_that_is_no_models_is_refused(tmp_path, changes, message) -> None:
    model = small_model()
    save_model(model.state_dict(), model.config, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message) as error:
        Generator.load(tmp_path)
    assert "\n" not in str(error.value)
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in changes}))
    if changes.keys() <= values.keys() - {"kind", "schema"}:
        with pytest.raises(UserError, match=f"key '{next(iter(changes))}' is missing"):
            Generator.load(tmp_path)


def test_a_model_of_another_kind_is_named(tmp_path) -> None:
    Tokenizer(tiny_config()).save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer: holds a tokenizer, for crt.Tokenizer.load: name the folder"):
        Generator.load(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"config.json: is a file: name the folder"):
        Generator.load(tmp_path / "tokenizer" / "config.json")
    with pytest.raises(UserError, match=r"precision 'fp16': use one of float32, bf16"):
        Generator.load(tmp_path / "tokenizer", precision="fp16")


def test_config_survives_json(tmp_path) -> None:
    config = small_config(grid=(3, 7), class_names=None)
    save_model({}, config, tmp_path)
    assert ARConfig.load(tmp_path) == config

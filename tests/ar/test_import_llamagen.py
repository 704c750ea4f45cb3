"""Import of LlamaGen's transformers, against its architecture written out anew on its own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crt.__main__ import main
from crt.ar import import_llamagen
from crt.ar.generator import Generator
from crt.ar.import_llamagen import import_llamagen_ar, is_llamagen_ar
from crt.ar.model import ARConfig
from crt.errors import UserError
from crt.tokenizer.import_llamagen import is_llamagen_tokenizer

LAYERS, HEADS, WIDTH, FFN, CODES, CLASSES, SIDE = 2, 2, 32, 256, 48, 7, 3


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(import_llamagen._HEADS, (LAYERS, WIDTH), HEADS)


def llamagen_weights() -> dict[str, torch.Tensor]:
    """Tensors under the names and in the shapes of LlamaGen's `Transformer`."""
    shapes = {
        "cls_embedding.embedding_table.weight": (CLASSES + 1, WIDTH),
        "tok_embeddings.weight": (CODES, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (CODES, WIDTH),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": (FFN, WIDTH),
            f"layers.{layer}.feed_forward.w3.weight": (FFN, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": (WIDTH, FFN),
            f"layers.{layer}.attention_norm.weight": (WIDTH,),
            f"layers.{layer}.ffn_norm.weight": (WIDTH,),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def llamagen_logits(w: dict[str, torch.Tensor], codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The architecture as LlamaGen's paper and code state it: complex rotations, explicit mask and softmax."""
    count, tokens, per_head = len(codes), SIDE * SIDE, WIDTH // HEADS

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * scale

    frequencies = 10000.0 ** (-torch.arange(0, per_head // 2, 2) / (per_head // 2))
    places = [(row * frequencies, column * frequencies) for row in range(SIDE) for column in range(SIDE)]
    angles = torch.stack([torch.cat(pair) for pair in places])[: tokens - 1]
    turn = torch.cat((torch.zeros(1, per_head // 2, dtype=torch.complex64), torch.exp(1j * angles)))
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.view(count, tokens, HEADS, per_head // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2).transpose(1, 2)

    embeddings = w["cls_embedding.embedding_table.weight"][labels][:, None], w["tok_embeddings.weight"][codes[:, :-1]]
    h = torch.cat(embeddings, 1)
    for layer in range(LAYERS):

        def matrix(name: str, prefix: str = f"layers.{layer}.") -> torch.Tensor:
            return w[f"{prefix}{name}.weight"]

        q, k, v = (norm(h, matrix("attention_norm")) @ matrix("attention.wqkv").T).split(WIDTH, -1)
        weights = (rotated(q) @ rotated(k).transpose(-1, -2) / per_head**0.5 + mask).softmax(-1)
        attended = weights @ v.view(count, tokens, HEADS, per_head).transpose(1, 2)
        h = h + attended.transpose(1, 2).flatten(2) @ matrix("attention.wo").T
        x = norm(h, matrix("ffn_norm"))
        gate = x @ matrix("feed_forward.w1").T
        h = h + (gate * gate.sigmoid() * (x @ matrix("feed_forward.w3").T)) @ matrix("feed_forward.w2").T
    return norm(h, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_imported_weights_give_the_same_logits(tmp_path: Path, wrapper: str | None) -> None:
    weights = llamagen_weights()
    state = {wrapper: weights, "steps": 1} if wrapper else weights
    assert is_llamagen_ar(state)
    config = import_llamagen_ar(state, tmp_path, grid=(SIDE, SIDE))
    assert (config.codebook_size, config.num_classes, config.ffn_width) == (CODES, CLASSES, FFN)
    codes = torch.randint(0, CODES, (4, SIDE * SIDE), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 6, 7])
    expected = llamagen_logits(weights, codes, labels)
    assert expected.std() > 0.3
    torch.testing.assert_close(Generator.load(tmp_path).model.logits(codes, labels), expected, atol=1e-4, rtol=0)


def test_half_precision_checkpoints_become_float32(tmp_path: Path) -> None:
    import_llamagen_ar({name: tensor.bfloat16() for name, tensor in llamagen_weights().items()}, tmp_path, (SIDE, SIDE))
    assert Generator.load(tmp_path).model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("c2i_B_256.pt", [], 16),
        ("c2i_B_384.pt", [], 24),
        ("model.pt", [], 16),
        ("step_0384000.pt", [], 16),
        ("c2i_B_384.pt", ["--image-size", "256"], 16),
        ("model.pt", ["--image-size", "512"], 32),
    ],
)
def test_the_grid_is_that_of_the_image_size(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, options: list[str], side: int
) -> None:
    torch.save({"model": llamagen_weights()}, tmp_path / name)
    assert main(["import_llamagen", str(tmp_path / name), str(tmp_path / "imported"), *options]) == 0
    assert ARConfig.load(tmp_path / "imported").grid == (side, side)
    _, note = capsys.readouterr().err.splitlines()
    assert f"grid of {side} x {side} codes, for images of {16 * side} px" in note
    assert "--image-size" in note


@pytest.mark.parametrize("size", ["250", "0", "-16"])
def test_image_sizes_of_no_whole_grid_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, size: str) -> None:
    torch.save(llamagen_weights(), tmp_path / "model.pt")
    assert main(["import_llamagen", str(tmp_path / "model.pt"), str(tmp_path / "imported"), "--image-size", size]) == 2
    error = capsys.readouterr().err
    assert f"--image-size {size}: " in error and "give a multiple of 16" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "imported").exists()


def test_weights_lie_under_any_usual_key_and_name(tmp_path: Path) -> None:
    weights = llamagen_weights()
    for key in ("model", "module", "state_dict", "ema"):
        import_llamagen_ar(
            {key: {f"module._orig_mod.{name}": weights[name] for name in weights}}, tmp_path, (SIDE, SIDE)
        )
        assert torch.equal(Generator.load(tmp_path).model.head.weight, weights["output.weight"])


def test_what_draws_by_a_text_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = llamagen_weights()
    del weights["cls_embedding.embedding_table.weight"]
    torch.save({"model": weights | {"cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2)}}, tmp_path / "t2i.pt")
    assert main(["import_llamagen", str(tmp_path / "t2i.pt"), str(tmp_path / "imported")]) == 2
    error = capsys.readouterr().err
    assert "t2i.pt: a transformer that draws by a text: only class-conditional ones" in error
    assert error.count("\n") == 1


def test_what_is_no_such_transformer_is_refused(tmp_path: Path) -> None:
    def refused(state: dict, pattern: str) -> None:
        with pytest.raises(UserError, match=pattern) as error:
            import_llamagen_ar(state, tmp_path)
        assert "\n" not in str(error.value)

    weights = llamagen_weights()
    assert not is_llamagen_ar({"model": {"quantize.embedding.weight": torch.zeros(1)}})
    assert not is_llamagen_tokenizer(weights)
    refused({"model": {}}, "no class-conditional LlamaGen transformer")
    refused(
        {k: v for k, v in weights.items() if k != "layers.1.attention.wo.weight"}, "attention.wo.weight' is missing"
    )
    refused(weights | {"cls_embedding.cap_proj.weight": torch.zeros(1)}, "cap_proj.weight' belongs to no")
    refused({k: v for k, v in weights.items() if "layers.1." not in k}, "1 layers of width 32 are none")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.attention.wqkv.weight", torch.zeros(5, 5), r"has shape \(5, 5\), expected \(96, 32\)"),
        ("layers.0.feed_forward.w1.weight", torch.zeros(FFN, 5), r"has shape \(256, 5\), expected \(256, 32\)"),
        ("layers.0.feed_forward.w2.weight", torch.zeros(WIDTH, 512), r"has shape \(32, 512\), expected \(32, 256\)"),
        ("norm.weight", torch.zeros(()), r"has shape \(\), expected \(32,\)"),
        ("tok_embeddings.weight", torch.zeros(CODES), r"has shape \(48,\), expected a table"),
        ("cls_embedding.embedding_table.weight", torch.zeros(()), r"has shape \(\), expected a table"),
        ("cls_embedding.embedding_table.weight", torch.zeros(1, WIDTH), r"has shape \(1, 32\), expected a table"),
        ("output.weight", [1.0], "is list, no tensor"),
        ("tok_embeddings.weight", None, "is NoneType, no tensor"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path: Path, name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^checkpoint: .*{name}' {message}") as error:
        import_llamagen_ar(llamagen_weights() | {name: value}, tmp_path, (SIDE, SIDE))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []

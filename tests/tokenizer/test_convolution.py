"""Convolutions by tiles against torch's own, and that they are used where they may be only."""

import functools
import io
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from crt.tokenizer import convolution
from crt.tokenizer.convolution import Convolution, convolve_by_tiles, transform_weights, weight_gradient_by_tiles
from crt.tokenizer.model import Tokenizer, TokenizerConfig

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def threads():
    """Sets the number of threads, back to what it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_matrix_units(monkeypatch):
    """A processor where tiles are the faster way in bf16 too."""
    monkeypatch.setattr(convolution, "processor_features", lambda: frozenset({"avx2"}))


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=CHANNELS_LAST)


def exact(layer: Convolution, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)


def plain(layer: Convolution, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize(
    ("batch", "width", "outputs", "height", "length"),
    [(1, 64, 64, 32, 32), (3, 64, 128, 36, 40), (2, 128, 64, 64, 32), (1, 16, 32, 4, 4), (5, 16, 16, 8, 20)],
)
def test_rounds_less_than_twice_as_much_as_the_direct_convolution(batch, width, outputs, height, length):
    layer, x = Convolution(width, outputs), 1 + images(batch, width, height, length)
    y = convolve_by_tiles(x, transform_weights(layer.weight), layer.bias)
    assert y.shape == (batch, outputs, height, length) and y.is_contiguous(memory_format=CHANNELS_LAST)
    error, direct = ((t - exact(layer, x)).square().mean().sqrt() for t in (y, plain(layer, x)))
    scale = float(exact(layer, x).std())
    assert error < 2 * direct + 1e-7 * scale  # of few channels the direct one's rounding is hardly any
    assert (y - exact(layer, x)).abs().max() < 3e-5 * scale


def test_each_border_and_corner_sees_zeros_around():
    layer, x = Convolution(64, 64), torch.zeros(1, 64, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    for y in (0, 3, 4, 31):
        for column in (0, 3, 4, 31):
            x[0, :, y, column] = 1 + y + column
    torch.testing.assert_close(layer(x), exact(layer, x).float(), rtol=0, atol=1e-4)


def test_the_bits_do_not_depend_on_the_number_of_threads_nor_on_the_batch(threads):
    layer, x = Convolution(64, 64), images(3, 64, 64, 64)
    threads(1)
    expected = layer(x)
    assert not torch.equal(expected, plain(layer, x))  # by tiles indeed
    for count in (2, 3):
        threads(count)
        assert torch.equal(layer(x), expected)
        assert torch.get_num_threads() == count
        assert layer(x[:0]).shape == (0, 64, 64, 64)
    assert torch.equal(layer(x[1:2]), expected[1:2])


def test_changed_weights_are_seen():
    layer, x = Convolution(64, 64), images(1, 64, 32, 32)
    layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), plain(layer, x))
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-3)
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()}, assign=True)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True)
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-3)


def test_changed_weights_are_seen_where_torch_counts_no_version():
    layer, x = Convolution(64, 64), images(1, 64, 32, 32)

    def check(layer):
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-3)

    layer(x)
    layer.weight.data.mul_(2)
    check(layer)
    layer.weight.mul_(2)
    file = io.BytesIO()
    torch.save(layer, file)  # with factors of the weights before
    file.seek(0)
    check(torch.load(file, weights_only=False))
    with torch.enable_grad():
        layer(x).square().mean().backward()
    check(layer)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    check(layer)
    with torch.inference_mode():
        made_here = Convolution(64, 64)
        made_here(x)
        made_here.weight.mul_(2)
        check(made_here)


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias")])
def test_gradients_are_nearly_as_exact_as_torchs(frozen):
    layer, x = Convolution(64, 128), 1 + images(2, 64, 32, 40)
    slopes = torch.randn(2, 128, 32, 40, generator=torch.Generator().manual_seed(1))
    wanted = [name for name in ("x", "weight", "bias") if name not in frozen]

    def gradients(convolve, dtype):
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        tensors = {name: t.detach().to(dtype).clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        with torch.enable_grad():
            return torch.autograd.grad(convolve(*tensors.values()), [tensors[n] for n in wanted], slopes.to(dtype))

    truth = gradients(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), torch.float64)
    ours = gradients(convolution._ByTiles.apply, torch.float32)
    direct = gradients(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), torch.float32)
    for name, true, mine, torchs in zip(wanted, truth, ours, direct, strict=True):
        assert mine.shape == true.shape
        error, usual = ((t - true).norm() / true.norm() for t in (mine, torchs))
        # The direct gradient of the weights adds up far fewer terms before it rounds than a tile's transforms do.
        assert error < (1e-6 if name == "weight" else 2 * usual + 1e-7)


@pytest.mark.parametrize(("batch", "channels", "outputs", "height", "width"), [(3, 64, 128, 36, 40), (1, 16, 32, 4, 4)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weights_adds_up_all_tiles(threads, batch, channels, outputs, height, width, precision):
    """Oracle: float64. By two threads also where one has fewer tiles than fill its arrays."""
    x, slopes = images(batch, channels, height, width).to(precision), 1 + images(batch, outputs, height, width)
    slopes = slopes.to(precision)
    true = torch.nn.grad.conv2d_weight(x.double(), (outputs, channels, 3, 3), slopes.double(), padding=1)
    for count in (1, 2):
        threads(count)
        mine = weight_gradient_by_tiles(x, slopes)
        assert mine.dtype == torch.float32 and mine.shape == true.shape
        assert (mine - true).norm() < 2e-6 * true.norm()
        assert torch.equal(mine, weight_gradient_by_tiles(x, slopes))


@pytest.mark.usefixtures("no_matrix_units")
@pytest.mark.parametrize(("precision", "rounding"), [("float32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_penalty_has_all_its_parts(frozen, precision, rounding):
    """Oracle: torch's own convolution. The slopes of a sum are constants: nothing of them needs gradients."""
    layer, x = Convolution(64, 64).requires_grad_(not frozen), images(1, 64, 32, 32).requires_grad_()
    wanted = (x,) if frozen else (x, layer.weight)

    def penalty(convolve):
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = convolve(x)
            (slope,) = torch.autograd.grad((y * y.detach().sin() + y.square()).sum(), x, create_graph=True)
            return slope, *torch.autograd.grad(slope.square().sum(), wanted)

    ours = penalty(layer)
    for mine, theirs in zip(ours, penalty(lambda x: plain(layer, x)), strict=True):
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() < rounding * theirs.norm()


def test_training_uses_tiles_too():
    layer, x = Convolution(64, 64), images(1, 64, 32, 32)
    expected = layer(x)
    with torch.enable_grad():
        y = layer(x)
        assert torch.equal(y, expected) and type(y.grad_fn).__name__ == "_ByTilesBackward"
        y.square().sum().backward()
        with torch.no_grad():
            layer.weight -= 0.01 * layer.weight.grad
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("no_matrix_units")
def test_autocast_rounds_by_tiles_only_what_goes_in_and_comes_out(threads):
    layer, x = Convolution(64, 128), 1 + images(2, 64, 32, 40)
    truth = exact(layer, x.bfloat16())
    for count in (1, 2):
        threads(count)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)  # wider than bf16: rounded first, as torch's autocast does
            assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=CHANNELS_LAST)
            assert torch.equal(y, layer(x.bfloat16()))
            direct = plain(layer, x)
        error, usual, least = ((t - truth).norm() / truth.norm() for t in (y, direct, truth.bfloat16()))
        assert error < 1.01 * least < 0.9 * usual


def test_gradients_under_autocast_are_those_of_float32_from_rounded_ends():
    layer, x = Convolution(64, 128), 1 + images(2, 64, 32, 40)
    slopes = torch.randn(2, 128, 32, 40, generator=torch.Generator().manual_seed(1))

    def gradients(convolve, x, weight, bias):
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=weight.dtype == torch.float32):
                y = convolve(x, weight, bias)
            return torch.autograd.grad(y, (x, weight, bias), slopes.bfloat16().to(y.dtype))

    tensors = [t.detach().requires_grad_() for t in (x.bfloat16(), layer.weight, layer.bias)]
    ours = gradients(convolution._ByTiles.apply, *tensors)
    direct = gradients(functools.partial(F.conv2d, padding=1), *tensors)
    truth = gradients(functools.partial(F.conv2d, padding=1), *(t.detach().double().requires_grad_() for t in tensors))
    for true, mine, torchs, tensor in zip(truth, ours, direct, tensors, strict=True):
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
        # What is not rounded: the weights on the way to the input's gradient, and the parameters' gradients.
        least = 1e-6 if tensor.dtype == torch.float32 else (true.bfloat16() - true).norm() / true.norm()
        error, usual = ((t - true).norm() / true.norm() for t in (mine, torchs))
        assert error < 1.05 * least < usual


@pytest.mark.parametrize("features", [{"avx2", "amx-bf16"}, {"neon", "bf16"}])
def test_autocast_keeps_torchs_convolution_where_that_is_faster(monkeypatch, features):
    monkeypatch.setattr(convolution, "processor_features", lambda: frozenset(features))
    layer, x = Convolution(64, 64), images(1, 64, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(layer, x))


@pytest.mark.usefixtures("no_matrix_units")
def test_other_types_and_layouts_keep_torchs_convolution():
    layer, x = Convolution(64, 64), images(1, 64, 32, 32)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x), plain(layer, x))
    half = Convolution(64, 64).bfloat16()
    assert torch.equal(half(x.bfloat16()), plain(half, x.bfloat16()))
    assert torch.equal(layer(x.contiguous()), plain(layer, x.contiguous()))
    assert torch.equal(layer(x[..., :30].contiguous(memory_format=CHANNELS_LAST)), plain(layer, x[..., :30]))
    double = Convolution(64, 64).double()
    assert torch.equal(double(x.double()), plain(double, x.double()))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_traces_and_counts_see_the_convolution(gradients):
    layer, x = torch.nn.Sequential(Convolution(64, 64)), images(1, 64, 32, 32)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert torch.equal(traced(x + 1), plain(layer[0], x + 1))
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert counter.get_total_flops() == 2 * 9 * 64 * 64 * 32 * 32


def test_works_in_a_forked_process_after_the_parent_used_its_threads(threads):
    threads(2)
    layer, x = Convolution(64, 64), images(1, 64, 64, 64)
    expected = layer(x).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    process = context.Process(target=lambda: results.put(layer(x).numpy().tobytes() == expected))
    process.start()
    assert results.get(timeout=60)
    process.join()


def test_codes_and_pixels_are_those_of_the_direct_convolution(monkeypatch):
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=64, encoder_channels=128, decoder_channels=128, channel_multipliers=(1, 1, 2), encoder_blocks=1,
        decoder_blocks=1, attention=False, norm_groups=32, z_channels=64, dropout=0.0, codebook_size=512,
        codebook_dim=8, l2_normalize=True,
    )  # fmt: skip
    model = Tokenizer(config).eval().to(memory_format=CHANNELS_LAST)
    x = F.interpolate(images(4, 3, 16, 16), scale_factor=4, mode="bicubic").clamp(-1, 1)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    codes = model.encode(x)
    pixels = model.decode(codes)
    monkeypatch.setattr(convolution, "_LEAST_PIXELS", 10**9)
    assert len(codes.unique()) > 50
    assert torch.equal(codes, model.encode(x))
    direct = model.decode(codes)
    assert not torch.equal(pixels, direct)
    torch.testing.assert_close(pixels, direct, rtol=0, atol=2e-5)

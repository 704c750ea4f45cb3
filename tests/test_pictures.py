"""Oracle: the pixels that went in; a picture is decoded again and its cells compared."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crt.evaluation.curves import _panels, plot_code_usage, plot_losses, plot_sweep
from crt.history import History
from crt.pictures import image_grid, lines_by_class, reconstruction_grid, save_png, spread

rng = np.random.default_rng(0)


def cells(picture: Image.Image, columns: int, cell: int, gap: int = 4) -> list[list[np.ndarray]]:
    """The images of a grid, found from its right and top edge."""
    pixels = np.asarray(picture)
    rows = (pixels.shape[0] - gap) // (cell + gap)
    left = pixels.shape[1] - columns * (cell + gap)
    return [
        [pixels[top : top + cell, start : start + cell] for start in range(left, pixels.shape[1] - gap, cell + gap)]
        for top in (gap + row * (cell + gap) for row in range(rows))
    ]


def test_small_images_are_enlarged_by_whole_pixels_to_be_seen(tmp_path):
    images = rng.integers(0, 256, (3, 4, 24, 24, 3), np.uint8)
    save_png(image_grid(list(images), ["zero", "one", "two"]), tmp_path / "grid.png")
    grid = cells(Image.open(tmp_path / "grid.png"), columns=4, cell=72)
    for row, expected_row in zip(grid, images, strict=True):
        for cell, expected in zip(row, expected_row, strict=True):
            np.testing.assert_array_equal(cell, np.kron(expected, np.ones((3, 3, 1), np.uint8)))


def test_large_images_keep_their_resolution():
    images = rng.integers(0, 256, (1, 2, 100, 100, 3), np.uint8)
    picture = image_grid(list(images))
    assert picture.size == (4 + 2 * 104, 108)
    np.testing.assert_array_equal(cells(picture, 2, 100)[0][1], images[0, 1])


def test_labels_stand_left_of_their_rows_and_long_ones_are_cut():
    images = np.full((2, 1, 64, 64, 3), 255, np.uint8)
    pixels = np.asarray(image_grid(list(images), ["", "a name that is much too long for any margin, und größer"]))
    ink = (pixels < 128).all(axis=-1)
    assert not ink[:70].any()
    assert ink[70:].any()
    assert pixels.shape[1] <= 4 + 160 + 4 + 64 + 4


def test_line_breaks_in_labels_are_drawn_as_spaces():
    images = np.zeros((3, 1, 64, 64, 3), np.uint8)
    broken = image_grid(list(images), ["two\nlines", "a\r\n b", "\x85\u2029"])
    assert np.array_equal(np.asarray(broken), np.asarray(image_grid(list(images), ["two lines", "a b", ""])))


def test_reconstructions_stand_below_their_originals():
    originals, copies = rng.integers(0, 256, (2, 5, 64, 64, 3), np.uint8)
    grid = cells(reconstruction_grid(originals, copies, columns=4), columns=4, cell=64)
    assert len(grid) == 4
    for index in range(4):
        np.testing.assert_array_equal(grid[0][index], originals[index])
        np.testing.assert_array_equal(grid[1][index], copies[index])
    np.testing.assert_array_equal(grid[2][0], originals[4])
    np.testing.assert_array_equal(grid[3][0], copies[4])


def test_originals_and_reconstructions_are_called_so():
    originals, copies = rng.integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    named = image_grid([originals, copies], ["original", "reconstruction"])
    assert np.array_equal(np.asarray(reconstruction_grid(originals, copies, columns=3)), np.asarray(named))


@pytest.mark.parametrize(("count", "wanted", "rows"), [(10, 4, [0, 3, 6, 9]), (3, 8, [0, 1, 2]), (5, 1, [0])])
def test_rows_are_spread_from_the_first_to_the_last(count, wanted, rows):
    assert spread(count, wanted).tolist() == rows


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(2, [(0, [1, 5]), (3, [0, 2])]), (3, [(0, [1, 5]), (3, [0, 2]), (5, [4])]), (1, [(0, [1, 5])])],
)
def test_a_line_shows_the_first_images_of_a_class(lines, expected):
    chosen = lines_by_class(np.array([3, 0, 3, 3, 5, 0]), lines, images_per_line=2)
    assert [(label, rows.tolist()) for label, rows in chosen] == expected


def test_few_classes_fill_the_lines():
    chosen = lines_by_class(np.array([3, 0, 3, 3, 3, 3, 0]), lines=5, images_per_line=2)
    assert [(label, rows.tolist()) for label, rows in chosen] == [(0, [1, 6]), (3, [0, 2]), (3, [3, 4])]


def test_curves_show_training_and_validation_and_repeat_bit_for_bit(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train = History(folder / "train.csv", ["loss", "learning_rate"])
    validation = History(folder / "validation.csv", ["loss", "psnr"])
    (folder / "loss_per_position.csv").write_text("position,loss\n0,2.5\n1,1.5\n")
    for step in range(1, 20):
        train.append(step, {"loss": 1 / step, "learning_rate": 0.1})
    validation.append(10, {"loss": 0.2, "psnr": float("nan")})
    for name in ("a.png", "b.png"):
        plot_losses("tokenizer", folder, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10
        assert "Software" not in image.info
    titles = [panel.title for panel in _panels("tokenizer", folder)]
    assert titles == ["tokenizer: loss", "tokenizer: loss per position"]
    by_place = _panels("transformer", folder)[-1]
    assert by_place.series["validation"][0].tolist() == [0, 1] and by_place.x_name.endswith("from 0")
    assert [panel.unit for panel in _panels("transformer", folder)] == ["nats per code", "nats per code"]
    plot_losses("tokenizer", tmp_path / "absent", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_shares_of_training_and_validation_stand_in_one_panel(tmp_path):
    History(tmp_path / "train.csv", ["code_usage"]).append(1, {"code_usage": 0.5})
    History(tmp_path / "validation.csv", ["codebook_usage", "mse"]).append(1, {"codebook_usage": 0.25, "mse": 0.1})
    (panel,) = _panels("tokenizer", tmp_path)
    assert {kind: y.tolist() for kind, (_, y) in panel.series.items()} == {"training": [0.5], "validation": [0.25]}


def test_a_sweep_shows_the_chosen_scale_and_what_perfect_images_score(tmp_path):
    """Oracle: without the one or the other the picture differs; without what it is not to show, it does not."""
    row = {"gfid": 3.0, "gfid_of_perfect_images": 1.0, "inception_score_std": 0.1, "recall": 0.5}
    rows = [row | {"guidance_scale": scale} for scale in (1.0, 2.0, 3.0)]

    def drawn(rows, chosen):
        plot_sweep(rows, chosen, tmp_path / "sweep.png")
        return (tmp_path / "sweep.png").read_bytes()

    def without(name):
        return [{key: value for key, value in row.items() if key != name} for row in rows]

    whole = drawn(rows, 2.0)
    assert drawn(rows, 3.0) != whole
    assert drawn(without("gfid_of_perfect_images"), 2.0) != whole
    assert drawn(without("inception_score_std"), 2.0) == whole


@pytest.fixture
def axes(monkeypatch):
    """The axes of all pictures saved since, by title."""
    found = {}
    save = Figure.savefig

    def keep(figure, *args, **options):
        found.update({axis.get_title(): axis for axis in figure.axes})
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_codes_are_drawn_by_their_shares_the_most_frequent_first(tmp_path, axes):
    plot_code_usage(np.array([1, 0, 5, 2]), tmp_path / "usage.png")
    shares, alike = axes["3 of 4 codes in use"].lines
    assert shares.get_xydata().tolist() == [[1, 5 / 8], [2, 2 / 8], [3, 1 / 8]]
    assert set(alike.get_ydata()) == {1 / 4}


def test_a_sweep_draws_the_figures_and_those_of_perfect_images(tmp_path, axes):
    rows = [{"guidance_scale": x, "gfid": 3.0 + x, "gfid_of_perfect_images": 1.0} for x in (1.0, 2.0)]
    plot_sweep(rows, 1.0, tmp_path / "sweep.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in axes["gFID (lower is better)"].lines}
    assert lines["perfect images"] == [1.0, 1.0] and [4.0, 5.0] in lines.values()


@pytest.mark.parametrize(
    ("last", "scale", "ticks"), [(9.0, "linear", None), (100.0, "log", [5, 10, 20]), (1e4, "log", [10, 100])]
)
def test_losses_over_decades_get_a_logarithmic_axis(tmp_path, axes, last, scale, ticks):
    history = History(tmp_path / "train.csv", ["loss", "discriminator_grad_norm"])
    for step, loss in enumerate((last, 1.0), 1):
        history.append(step, {"loss": loss, "discriminator_grad_norm": 1.0})
    plot_losses("tokenizer", tmp_path, tmp_path / "losses.png")
    assert list(axes) == ["tokenizer: loss"]
    axis = axes["tokenizer: loss"]
    assert axis.get_yscale() == scale
    if ticks:
        first = axis.get_yticks().tolist().index(ticks[0])
        assert axis.get_yticks().tolist()[first:][: len(ticks)] == ticks


def test_shares_have_an_axis_of_0_to_1(tmp_path, axes):
    rows = [{"guidance_scale": scale, "gfid": 3.0 * scale, "recall": recall} for scale, recall in ((1, 1.0), (2, 0.0))]
    plot_sweep(rows, 1.0, tmp_path / "sweep.png")
    assert axes["recall (higher is better)"].get_ylim() == (0, 1)
    assert axes["gFID (lower is better)"].get_ylim()[1] > 6
    usage = History(tmp_path / "train.csv", ["code_usage"])
    for step, share in enumerate((1.0, 0.5), 1):
        usage.append(step, {"code_usage": share})
    plot_losses("tokenizer", tmp_path, tmp_path / "usage.png")
    shares = axes["tokenizer: share of codes in use"]
    assert shares.get_ylim() == (0, 1)
    assert not shares.lines[0].get_clip_on()  # a marker on the edge is drawn whole


def test_code_usage_is_drawn_for_unused_codes_too(tmp_path):
    plot_code_usage(np.array([5, 0, 1, 0]), tmp_path / "usage.png")
    with Image.open(tmp_path / "usage.png") as image:
        assert image.width > 300

"""Tables, sentences and pictures of a study whose numbers are known in advance."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure as MplFigure
from PIL import Image

from crt.analysis.comparison import cells
from crt.analysis.figures import compute_optimal, draw_figure, draw_position_losses, line_name
from crt.analysis.scaling import fit_scaling_law
from crt.analysis.statements import savings_lines, scaling_lines, winner_lines
from crt.analysis.study_page import (
    PageSection,
    contrast_table,
    published_table,
    read_results,
    summary_table,
    write_study_page,
)
from crt.errors import UserError
from crt.evaluation.metric_table import METRICS, axis_title
from crt.study import TRAINING_FLOPS, Contrast, Figure, Published, Scale, Study

FIGURE = Figure(x="stage2_training_flops", y="loss", lines="tokenizer")
AXES = ["tokenizer", "generator"]


def make_rows(factor: float = 1.0, spread: float = 0.0) -> list[dict]:
    """L(C) = 1 + 40 C^-0.5 for the plain tokenizer; the other needs 1 / `factor` of its compute."""
    rng = np.random.default_rng(0)
    return [
        {
            "tokenizer": tokenizer,
            "generator": f"{compute:g}",
            "seed": seed,
            "stage2_training_flops": compute,
            "loss": 1 + 40 * (compute * gain) ** -0.5 + spread * rng.normal(),
        }
        for tokenizer, gain in (("plain", 1.0), ("crt", factor))
        for compute in (1e3, 4e3, 1.6e4, 6.4e4)
        for seed in (0, 1, 2)
    ]


def test_fitted_exponent_and_saved_compute_are_those_of_the_laws():
    rows = make_rows(factor=2.0)
    plain, crt = scaling_lines(rows, FIGURE)
    assert plain.startswith("plain: alpha -0.500 (-0.500 .. -0.500), L_min 1")
    assert crt.startswith("crt: alpha -0.500")
    (saved,) = savings_lines(rows, FIGURE, "plain")
    # Between the points the curves are taken as straight.
    assert "median 2.0" in saved
    assert winner_lines(rows, FIGURE) == ["from 1e+03 FLOPs on: crt (loss 1.894)"]


def chinchilla_rows(rising: bool = False) -> list[dict]:
    """L(N, D) = 2 + N^-0.3 + D^-0.3 of every size with every budget: optimal models fall as C^-0.15 (C = 6 N D)."""
    return [
        {
            "tokenizer": "plain",
            "generator": f"{size:g}",
            "budget": f"{tokens:g}",
            "seed": 0,
            "stage2_training_flops": 6 * size * tokens,
            "loss": 2 + 50 * size**-0.3 + 50 * tokens**-0.3 + rising * 1e-19 * size * tokens,
        }
        for size in np.geomspace(1e6, 1e9, 7)
        for tokens in np.geomspace(1e6, 1e10, 9)
    ]


def test_the_law_is_that_of_models_whose_size_suits_their_compute():
    rows = chinchilla_rows()
    (line,) = scaling_lines(rows, FIGURE)
    alpha = float(line.split("alpha ")[1].split()[0])
    assert alpha == pytest.approx(-0.15, abs=0.012)
    every = fit_scaling_law(*zip(*((row["stage2_training_flops"], row["loss"]) for row in rows), strict=True))
    assert abs(every.alpha + 0.15) > 0.03  # as far off a law through all of them is
    assert re.search(r", on its \d\d compute-optimal cells of 63", line)


def test_no_law_is_read_off_the_start_of_a_loss_that_rises_again():
    (line,) = scaling_lines(chinchilla_rows(rising=True), FIGURE)
    assert re.fullmatch(r"plain: no fit: beyond .* FLOPs nothing is better than what less compute reaches", line)


def test_the_winner_changes_where_the_curves_cross():
    rows = [
        {"tokens": tokens, "codes": "256", "budget": str(x), "seed": 0, "training_flops": x, "loss": y}
        for tokens, curve in (("16", [(1, 5.0), (10, 4.0), (100, 3.9)]), ("64", [(2, 6.0), (20, 4.5), (200, 2.0)]))
        for x, y in curve
    ]
    figure = Figure(x="training_flops", y="loss", lines=["tokens", "codes"])
    assert winner_lines(rows, figure) == [
        "from 1 FLOPs on: tokens = 16, codes = 256 (loss 5)",
        "from 200 FLOPs on: tokens = 64, codes = 256 (loss 2)",
    ]


def test_the_winner_is_the_best_in_the_mean_over_seeds():
    rows = [
        {"tokenizer": name, "seed": seed, "stage2_training_flops": 1.0, "loss": loss}
        for name, losses in (("plain", (5.0, 1.0)), ("crt", (2.5, 2.7)))
        for seed, loss in enumerate(losses)
    ]
    assert winner_lines(rows, FIGURE) == ["from 1 FLOPs on: crt (loss 2.6)"]


def test_of_figures_that_rise_with_quality_the_highest_wins(tmp_path, drawn):
    """A score S(C) = 9 - 40 C^-0.5, which the one tokenizer reaches with half of the other's compute."""
    rows = [
        {name: row[name] for name in ("tokenizer", "generator", "seed", "stage2_training_flops")}
        | {"inception_score": 10 - row["loss"]}
        for row in make_rows(factor=2.0)
    ]
    figure = Figure(x="stage2_training_flops", y="inception_score", lines="tokenizer")
    first = next(row["inception_score"] for row in rows if row["tokenizer"] == "crt")
    assert winner_lines(rows, figure) == [f"from 1e+03 FLOPs on: crt (Inception score {first:.4g})"]
    (saved,) = savings_lines(rows, figure, "plain")
    (losses,) = savings_lines(make_rows(factor=2.0), FIGURE, "plain")
    assert saved.split(", where")[0] == losses.split(", where")[0]
    reached = [float(word) for word in saved.rsplit("Inception score ", 1)[1].split(" to ")]
    assert reached == pytest.approx([8.105, 8.842], abs=1e-3)
    assert scaling_lines(rows, figure) == [
        f"{name}: no fit: the law is one of figures that fall with compute" for name in ("plain", "crt")
    ]
    draw_figure(rows, figure, tmp_path / "figure.png")
    lines = drawn[0].axes[0].lines
    assert not any(line.get_linestyle() == "--" for line in lines)
    (frontier,) = [line for line in lines if line.get_label() == "compute-optimal"]
    assert list(frontier.get_ydata()) == sorted(row["inception_score"] for row in rows[12::3])


def test_models_that_were_given_and_not_trained_have_no_law_and_a_page_all_the_same(tmp_path, drawn):
    rows = [row | {"stage2_training_flops": 0} for row in make_rows(factor=2.0)]
    reason = "of models that were given, not trained, the compute is unknown"
    assert scaling_lines(rows, FIGURE) == [f"{name}: no fit: {reason}" for name in ("plain", "crt")]
    assert savings_lines(rows, FIGURE, "plain") == [f"crt: {reason}"]
    draw_figure(rows, FIGURE, tmp_path / "figure.png")
    assert drawn[0].axes[0].get_xscale() == "linear"  # a logarithmic one would show no point


def test_too_few_computes_give_no_law():
    rows = [row for row in make_rows() if row["stage2_training_flops"] < 1e4]
    assert all("no fit" in line for line in scaling_lines(rows, FIGURE))


def test_tables():
    rows = make_rows(factor=4.0)
    header, first, *_ = summary_table(rows, AXES, ["loss"])
    assert header == ["tokenizer", "generator", "seeds", "loss"]
    assert first[:3] == ["plain", "1000", "3"]
    assert " ± " in first[3]
    _, alone, *_ = summary_table([row for row in rows if row["seed"] == 0], AXES, ["loss"])
    assert alone[2:] == ["1", f"{1 + 40 * 1000**-0.5:.4g}"]  # of one seed nobody knows the spread
    assert len(cells(rows)) == 8
    _, first, *_ = contrast_table(rows, AXES, ["loss"], Contrast(axis="tokenizer", baseline="plain"))
    expected = 40 * 4000**-0.5 - 40 * 1000**-0.5
    assert first[:4] == ["1000", "crt", "loss", f"{expected:+.4g}"]


def make_scale(**changes) -> Scale:
    base = {
        "base": "params.yaml", "overrides": {}, "axes": {"tokenizer": {"plain": {}, "crt": {}}}, "seeds": [0, 1, 2],
        "metrics": ["loss"], "figures": [],
    }  # fmt: skip
    return Scale.model_validate(base | changes)


def test_published_values_stand_beside_ours():
    value = {"cell": {"tokenizer": "plain", "generator": "1000"}, "metric": "loss", "value": 2.0, "source": "here"}
    other = value | {"metric": "gfid"}
    _, ours, absent = published_table(make_rows(), make_scale(published=[value, other]))
    assert ours == ["plain, 1000", "loss", "2", f"{1 + 40 * 1000**-0.5:.4g} ± 0", "here"]
    assert absent[3] == "-"


def test_what_the_runs_of_one_seed_share_is_one_measurement_beside_a_published_one():
    """Such as rFID, where several generators have one tokenizer: their number says nothing about its spread."""
    rows = [dict(row, rfid=2.0 + row["seed"]) for row in make_rows()]
    value = Published(cell={"tokenizer": "plain"}, metric="rfid", value=2.0, source="here")
    for seeds, expected in ([0], "2"), ([0, 1, 2], "3 ± 1"):
        chosen = [row for row in rows if row["seed"] in seeds]
        assert published_table(chosen, make_scale(published=[value]))[1][3] == expected


def test_pictures_show_points_and_published_values(tmp_path):
    published = Published(cell={"tokenizer": "plain", "generator": "1000"}, metric="loss", value=3.5, source="here")
    draw_figure(make_rows(spread=0.01), FIGURE, tmp_path / "without.png")
    draw_figure(make_rows(spread=0.01), FIGURE, tmp_path / "with.png", [published])
    with Image.open(tmp_path / "without.png") as a, Image.open(tmp_path / "with.png") as b:
        assert a.size == b.size
        assert np.asarray(a).std() > 5
        assert not np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def drawn(monkeypatch) -> list[MplFigure]:
    """Every picture that was saved, as matplotlib holds it."""
    pictures: list[MplFigure] = []
    save = MplFigure.savefig
    monkeypatch.setattr(MplFigure, "savefig", lambda self, *a, **k: pictures.append(self) or save(self, *a, **k))
    return pictures


def test_the_dashed_law_is_that_of_the_compute_optimal_cells(tmp_path, drawn):
    rows = chinchilla_rows()
    draw_figure(rows, FIGURE, tmp_path / "figure.png")
    (curve,) = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == "--"]
    best = [(row["stage2_training_flops"], row["loss"]) for (row,) in compute_optimal(rows, FIGURE, "plain")]
    law = fit_scaling_law(*zip(*best, strict=True), resamples=0)
    np.testing.assert_allclose(curve.get_ydata(), law.predict(curve.get_xdata()))


def test_points_bear_the_spread_over_seeds(tmp_path, drawn):
    rows = [row for row in make_rows() if row["generator"] == "1000" and row["tokenizer"] == "plain"]
    draw_figure(
        [row | {"loss": float(loss)} for row, loss in zip(rows, (1, 2, 6), strict=True)], FIGURE, tmp_path / "x.png"
    )
    ((low, high),) = (bar[:, 1] for bar in drawn[0].axes[0].collections[0].get_segments())
    assert (low, high) == pytest.approx((3 - np.std([1, 2, 6], ddof=1), 3 + np.std([1, 2, 6], ddof=1)))


@pytest.mark.parametrize(("values", "scale"), [((0.8, 20.0), "log"), ((2.0, 19.0), "linear"), ((-0.1, 20.0), "linear")])
def test_values_that_span_decades_get_a_logarithmic_axis(tmp_path, drawn, values, scale):
    rows = [row | {"loss": values[i % 2]} for i, row in enumerate(row for row in make_rows() if row["seed"] == 0)]
    draw_figure(rows, FIGURE, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale


@pytest.mark.parametrize("lines", [2, 40])
def test_legends_lie_beside_the_axes_and_within_the_picture(tmp_path, drawn, lines):
    """Oracle: matplotlib's own boxes, once the picture is laid out."""
    rows = [row | {"tokenizer": f"a tokenizer of a long name, {n}"} for n in range(lines) for row in make_rows()[:12:3]]
    draw_figure(rows, FIGURE, tmp_path / "figure.png")
    losses = {(row["tokenizer"],): [[3.0, 2.0]] for row in rows}
    draw_position_losses(losses, ["tokenizer"], "tokenizer", tmp_path / "positions.png")
    for canvas in drawn:
        (legend,), (axes,) = canvas.legends, canvas.axes
        beside, inside, whole = legend.get_window_extent(), axes.get_window_extent(), canvas.bbox
        assert len(legend.get_texts()) >= lines
        assert inside.x1 < beside.x0 < beside.x1 < whole.x1
        assert whole.y0 < beside.y0 < beside.y1 < whole.y1
        assert inside.width > 6 * canvas.dpi
    assert len(drawn) == 2


def test_pictures_name_axes_and_lines_for_people(tmp_path, drawn):
    names = {"plain": "0", "crt": "0.3"}
    rows = [
        {"lambda": names[row["tokenizer"]], "generator": f"width {row['generator']}", "seed": row["seed"],
         "stage2_training_flops": row["stage2_training_flops"], "stage2_val_loss": row["loss"]}
        for row in make_rows(factor=2.0)
    ]  # fmt: skip
    figure = Figure(x="stage2_training_flops", y="stage2_val_loss", lines="lambda")
    draw_figure(rows, figure, tmp_path / "figure.png")
    draw_position_losses({("w", "0"): [[3.0]], ("w", "0.3"): [[2.0]]}, ["g", "lambda"], "lambda", tmp_path / "p.png")
    for canvas, more in zip(drawn, (["compute-optimal"], []), strict=True):
        (legend,) = canvas.legends
        assert legend.get_title().get_text() == "lambda"
        shown = [text.get_text() for text in legend.get_texts()]
        assert sorted(shown) == sorted(["lambda = 0", "lambda = 0.3", *more])
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "training FLOPs of stage 2"
    assert axes.get_ylabel() == drawn[1].axes[0].get_ylabel() == "validation loss of stage 2 (nats per code)"
    # Words speak for themselves.
    assert line_name(rows[0], Figure(x="x", y="y", lines=["lambda", "generator"])) == "lambda = 0, width 1000"
    (saved,) = savings_lines(rows, figure, "0")
    assert saved.startswith("lambda = 0.3: ") and " less compute than lambda = 0, median 2.0" in saved


def test_every_figure_has_a_name_without_underscores():
    assert all("_" not in axis_title(name) for name in (*METRICS, TRAINING_FLOPS))


def test_positions_count_as_in_their_file(tmp_path, drawn):
    draw_position_losses({("plain",): [[3.0, 2.0, 1.0]]}, ["tokenizer"], "tokenizer", tmp_path / "positions.png")
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert axes.get_xlabel().endswith("from 0")


def test_losses_per_position_leave_out_sequences_of_another_length(tmp_path):
    losses = {("plain", "a"): [[3.0, 2.0], [3.2, 2.2]], ("crt", "a"): [[2.5, 1.5]]}
    draw_position_losses(losses, AXES, "tokenizer", tmp_path / "two.png")
    longer = losses | {("crt", "b"): [[9.0, 9.0, 9.0]]}
    draw_position_losses(longer, AXES, "tokenizer", tmp_path / "with_another.png")
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "with_another.png").read_bytes()


def test_a_contrast_of_the_baseline_alone_makes_a_page_without_the_empty_section(tmp_path):
    rows = [row for row in make_rows() if row["tokenizer"] == "plain"]
    contrast = Contrast(axis="tokenizer", baseline="plain")
    study = Study(question="?", contrast=contrast, scales={"small": make_scale()})
    sections = [
        PageSection("Results", summary_table(rows, AXES, ["loss"])),
        PageSection("Paired differences", contrast_table(rows, AXES, ["loss"], contrast)),
        PageSection("Compute saved", savings_lines(rows, FIGURE, "plain")),
        PageSection("Scaling law", scaling_lines(rows, FIGURE), "how to read it"),
    ]
    write_study_page(tmp_path / "index.html", "Study", study, sections, ["gfid", "psnr", "gfid"])
    page = (tmp_path / "index.html").read_text()
    assert "<h2>Results</h2>\n<table class=" in page
    assert '<h2>Scaling law</h2>\n<p class="note">how to read it</p>\n<ul>\n<li>plain: alpha' in page
    assert "Compute saved" not in page and "Paired differences" not in page
    # What its figures are, once each, and the words that these need.
    assert page.count("<dt><code>gfid</code></dt><dd>gFID; lower is better</dd>") == 1
    assert "<dd>PSNR of reconstructions (dB); higher is better</dd>" in page
    assert "<dt>FID (rFID, gFID)</dt>" in page and "<dt>Inception score</dt>" not in page


def test_results_are_read_with_the_compute_of_both_stages(tmp_path):
    file = tmp_path / "metrics.json"
    run = SimpleNamespace(choices={"tokenizer": "plain"}, seed=0, metrics_file=file)
    with pytest.raises(UserError, match="missing or damaged"):
        read_results([run], make_scale())
    for text in ("[1.0]", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match="missing or damaged: delete its folder"):
            read_results([run], make_scale())
    metrics = {"loss": 1.0, "stage1_training_flops": 5, "stage2_training_flops": 7, "features": "classifier"}
    file.write_text(json.dumps(metrics))
    (row,) = read_results([run], make_scale())
    assert row["training_flops"] == 12 and row["tokenizer"] == "plain" and "features" not in row
    with pytest.raises(UserError, match="has no 'gfid'"):
        read_results([run], make_scale(metrics=["gfid"]))

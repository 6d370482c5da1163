"""The pictures of a run and of a report: what the figures hold, and the pixels that are written."""

import math
from itertools import combinations

import numpy as np
import pytest
from helpers import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from run_folders import EPOCHS, FOUR, PER_EPOCH, THREE, write_csv, write_run

from grap_solo.records.runs import read_run
from grap_solo.report import plots
from grap_solo.report.curves import (
    epoch_medians,
    last_epoch_median,
    mean_and_std,
    running_median,
    step_epochs,
)
from grap_solo.report.groups import _group, _read_summary
from grap_solo.report.plots import plot_weights, term_colors, weights_figure
from grap_solo.report.point_names import Point, _overlap
from grap_solo.report.sections import _gramian, _points


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept instead of written."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, target: drawn.append(figure))
    return drawn


def series(values, per_epoch=PER_EPOCH):
    epochs = np.arange(len(values)) // per_epoch
    return step_epochs(epochs), np.asarray(values, dtype=float)


def test_steps_stand_where_they_end_in_their_epoch():
    np.testing.assert_allclose(
        step_epochs(np.array([0, 0, 0, 0, 1, 1])), [0.25, 0.5, 0.75, 1, 1.25, 1.5]
    )


def test_mean_and_deviation_leave_out_what_is_missing():
    mean, std = mean_and_std([np.array([1, np.nan, np.nan]), np.array([3, 5, np.nan])])
    np.testing.assert_array_equal(mean, [2, 5, np.nan])
    np.testing.assert_allclose(std, [math.sqrt(2), np.nan, np.nan])


def test_the_smoothing_is_the_median_of_the_steps_half_an_epoch_around():
    values = np.random.default_rng(0).normal(size=40)
    values[[3, 17]] = np.nan
    epochs, _ = each = series(values)
    grid = np.array([0.25, 2.0, 7.3, 10.0])
    expected = [
        np.nanmedian(values[(epochs >= place - 0.5) & (epochs <= place + 0.5)]) for place in grid
    ]
    np.testing.assert_allclose(epoch_medians(each, grid), expected)
    assert np.isnan(epoch_medians(series([np.nan] * 8), grid)).all()
    assert np.isnan(epoch_medians(each, np.array([20.0]))).all()


def test_the_last_epoch_is_that_of_the_last_step():
    assert last_epoch_median(series([9, 9, 9, 9, 1, 2, np.nan, 3])) == 2
    assert np.isnan(last_epoch_median(series([1, np.nan, np.nan, np.nan, np.nan], 1)))


def test_terms_keep_their_colours():
    colors = term_colors([*FOUR, *THREE])
    assert [colors[term] for term in FOUR] == list(plots.COLORS[:4])
    assert len(set(term_colors([str(i) for i in range(18)]).values())) == 18


def test_weights_are_drawn_as_mean_and_band_with_dashed_references(figures):
    panels = {
        "a": {"x": [series([1.0] * 8), series([3.0] * 8)], "y": [series([0.0] * 8)] * 2},
        "b": {"z": [series([8.0] * 4)], "x": [series([8.0] * 4)]},
    }
    colors = term_colors(["x", "y", "z"])
    plots.plot_weight_panels(panels, "", colors, {"a": {"x": 0.5}})
    first, second = figures[0].axes
    dashed, x, y = first.lines
    assert dashed.get_ydata()[0] == 0.5 and dashed.get_color() == colors["x"]
    assert set(x.get_ydata()) == {2.0} and set(y.get_ydata()) == {0.0}
    low, high = first.collections[0].get_datalim(first.transData).intervaly
    np.testing.assert_allclose([low, high], [2 - math.sqrt(2), 2 + math.sqrt(2)])
    bottom, top = first.get_ylim()
    assert bottom < 0 < 8 < top and second.get_ylim() == (bottom, top)
    assert first.get_xlim() == second.get_xlim() == (0, 2)  # The longest run's epochs.
    # Lines in one place take turns with their dashes, or one would hide the other.
    assert all(line.is_dashed() for line in second.lines)
    assert [first.get_title("left"), first.get_title("right")] == ["a", "2 runs"]


def test_negative_weights_are_in_the_picture(figures):
    plots.plot_weight_panels({"a": {"x": [series([-2.0] * 8)]}}, "", {"x": "k"}, {})
    low, high = figures[0].axes[0].get_ylim()
    assert low < -2 and high > 0


def test_alignment_has_the_other_methods_in_grey_and_its_last_epoch_in_words(figures):
    composite = plots.COMPOSITE
    panels = {
        "a": {composite: [series([0.1] * 8), series([0.3] * 8)], "x": [series([0.5] * 8)]},
        "b": {composite: [series([-0.0004] * 4)]},
    }
    plots.plot_alignment(panels, "", {"x": "#0072B2"})
    first, second = figures[0].axes
    drawn = [(line.get_color(), line.get_ydata()[0]) for line in first.lines[1:]]
    assert drawn == [
        (plots.PALE, -0.0004),
        ("#0072B2", 0.5),
        (plots.DARK, pytest.approx(0.2)),
    ]
    assert first.get_xlim() == (0, 2)
    assert first.get_title("right") == "0.200 ± 0.141"
    assert second.get_title("right") == "0.000"


def test_the_gramian_is_the_mean_over_the_last_epoch_of_all_runs(tmp_path):
    weights = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5)))
    for seed in (0, 1):
        write_run(tmp_path / f"grap-seed{seed}", weights, seed=seed, cosine=0.2 + 0.2 * seed)
    runs = [read_run(folder) for folder in sorted(tmp_path.iterdir())]
    (group,) = _group(runs, {})
    for run in runs:  # The first epochs do not count.
        for values in run.diagnostics.columns.values():
            values[: (EPOCHS - 1) * PER_EPOCH] = 0.9
    np.testing.assert_allclose(_gramian(group), np.where(np.eye(4), 1, 0.3))


def test_gramian_cells_hold_numbers_and_a_dash_for_none(figures):
    matrix = np.array([[1, -0.123, np.nan], [-0.123, 1, 0.5], [np.nan, 0.5, 1]])
    plots.plot_gramians({"a": (("x", "y", "z"), matrix), "b": (("x",), np.eye(1))}, "")
    first, second = figures[0].axes[:2]
    texts = [text.get_text() for text in first.texts]
    assert texts[:4] == ["1.00", "\N{MINUS SIGN}0.12", "\N{EN DASH}", "\N{MINUS SIGN}0.12"]
    assert first.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in second.texts] == ["1.00"]


def test_names_of_methods_do_not_cover_each_other(figures):
    costs = (1.0, 1.002, 1.01, 1.004, 1.12, 1.13, 1.14, 1.24)
    linear = (97.15, 96.7, 97.1, 96.95, 97.05, 97.0, 97.05, 96.5)
    points = [
        Point(f"method_{i}", (x, x - 0.03, x + 0.05), {"linear probe": (y, 0.3)})
        for i, (x, y) in enumerate(zip(costs, linear))
    ]
    points.append(Point("one seed", (1.3, math.nan, math.nan), {"linear probe": (96, math.nan)}))
    plots.plot_accuracy_cost(points, "")
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == len(points)
    assert all(_overlap(a, b) == 0 for a, b in combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_a_cost_of_many_times_gets_a_logarithmic_axis(figures):
    points = [Point(str(x), (x, x, x), {"k-NN": (90, 1)}) for x in (1.0, 24.0)]
    plots.plot_accuracy_cost(points, "")
    assert figures[0].axes[0].get_xscale() == "log"


# ---- weights.png --------------------------------------------------------------------------------


def write_noise(folder, count=200, per_epoch=20):
    """Writes noisy weights of two terms; returns them, (N, 2)."""
    weights = np.abs(np.random.default_rng(0).normal([1, 4], 0.2, (count, 2))).round(4)
    rows = [[i + 1, i // per_epoch, *each] for i, each in enumerate(weights.tolist())]
    write_csv(folder / "weights.csv", ["step", "epoch", "a", "b"], rows)
    return weights


def median_by_loop(values, width):
    half = width // 2
    return [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


@pytest.mark.parametrize("width", [1, 2, 3, 8, 19, 50, 99])
@pytest.mark.parametrize("broken", [(), (np.nan,), (np.inf, -np.inf), (np.nan, np.inf, 1.0)])
def test_the_running_median_is_that_of_a_plain_loop(width, broken):
    values = np.random.default_rng(width).normal(size=47)
    values[5 : 5 + 9 * len(broken) : 9] = broken
    np.testing.assert_array_equal(running_median(values, width), median_by_loop(values, width))


def test_the_picture_of_a_run_has_its_weights_their_medians_and_the_references(tmp_path):
    weights = write_noise(tmp_path)
    figure = weights_figure(tmp_path / "weights.csv", {"a": 0.5, "b": 0.5}, warmup_epochs=2)
    (axes,) = figure.axes
    *drawn, dashed = axes.lines
    assert [line.get_color() for line in drawn] == [plots.COLORS[i] for i in (0, 0, 1, 1)]
    for k in range(2):
        each, median = drawn[2 * k : 2 * k + 2]
        np.testing.assert_allclose(each.get_xdata(), np.arange(1, 201) / 20)
        np.testing.assert_array_equal(each.get_ydata(), weights[:, k])
        np.testing.assert_array_equal(median.get_ydata(), median_by_loop(weights[:, k], 20))
    assert set(dashed.get_ydata()) == {0.5} and dashed.is_dashed()
    assert [text.get_text() for text in axes.texts] == ["reference\na, b"]
    medians = np.median(weights[40:], axis=0)  # Two epochs of warm-up are left out.
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"{term}: median {value:.2f}" for term, value in zip("ab", medians)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "effective weight")
    assert axes.get_xlim() == (0, 10) and axes.get_ylim()[0] == 0


def test_the_written_picture_shows_the_lines_in_their_colours(tmp_path):
    weights = write_noise(tmp_path)
    plot_weights(tmp_path / "weights.csv", tmp_path / "weights.png", {"a": 0.5})
    pixels = imread(tmp_path / "weights.png")[..., :3]
    assert pixels.shape == (630, 1350, 3)  # 9 x 4.2 inches at 150 dots.
    figure = weights_figure(tmp_path / "weights.csv", {"a": 0.5}, 0)
    figure.set_dpi(150)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for k in range(2):
        medians = median_by_loop(weights[:, k], 20)
        for place in range(20, 200, 20):
            x, y = axes.transData.transform(((place + 1) / 20, medians[place]))
            around = pixels[round(630 - y) - 2 : round(630 - y) + 3, round(x)]
            assert np.abs(around - to_rgb(plots.COLORS[k])).max(axis=-1).min() < 0.05
    x, y = axes.transData.transform((5, 2.5))  # Between the two lines.
    assert (pixels[round(630 - y), round(x)] == 1).all()


def text_boxes(figure):
    """The texts that a figure shows and their boxes, after its layout."""
    figure.draw_without_rendering()
    texts = [each for each in figure.texts if each.get_text()]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axes in filter(lambda each: each.get_visible(), figure.axes):
        titles = (axes.title, axes._left_title, axes._right_title)
        texts += [title for title in titles if title.get_text()]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts]


def test_no_text_of_the_panels_covers_another(figures):
    panels = {
        name: {term: [series(np.full(12, 0.5 + i)), series(np.full(12, 0.4))] for term in FOUR}
        for i, name in enumerate(["fixed", "without_attn_nnclr", "equal", "grap_tuned", "mgda"])
    }
    references = {"fixed": dict.fromkeys(FOUR, 0.5)}
    plots.plot_weight_panels(panels, "", term_colors(FOUR), references)
    (figure,) = figures
    assert sum(axes.get_visible() for axes in figure.axes) == 5
    titles = [axes.get_title("left").strip() for axes in figure.axes if axes.get_visible()]
    assert titles == list(panels)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*FOUR, "reference weight"]
    boxes = text_boxes(figure)
    assert len(boxes) > 20
    pairs = combinations(boxes, 2)
    assert [(a, b) for (a, one), (b, two) in pairs if _overlap(one, two) > 0] == []


def test_names_stand_off_the_points_of_the_digits_results(figures):
    (summary,) = [_read_summary(ROOT / "docs" / "results" / "digits")]
    plots.plot_accuracy_cost(_points([summary]), "")
    (figure,) = figures
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert len(figure.axes) == 2
    for axes, column in zip(figure.axes, ("linear_mean", "knn_mean")):
        boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
        assert sorted(text.get_text() for text in axes.texts) == sorted(
            row["method"] for row in summary.rows
        )
        assert all(_overlap(a, b) == 0 for a, b in combinations(boxes, 2))
        for row in summary.rows:
            place = float(row["cost"]), float(row[column])
            x, y = axes.transData.transform(place)
            assert not any(box.contains(x, y) for box in boxes)
            assert any(place == tuple(line.get_xydata()[0]) for line in axes.lines)

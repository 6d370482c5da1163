"""A report on runs whose files are written here by hand: no training."""

import base64
import csv
import json
import math
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from grap_solo.errors import ConfigError
from grap_solo.records.runs import read_run
from grap_solo.report import plots
from grap_solo.report.curves import epoch_medians, last_epoch_median, mean_and_std, step_epochs
from grap_solo.report.groups import _group
from grap_solo.report.labels import Point, _overlap
from grap_solo.report.page import report
from grap_solo.report.plots import term_colors
from grap_solo.report.sections import _gramian

FOUR = ("nnclr", "attn_nnclr", "byol", "barlow")
THREE = ("nnclr", "attn_nnclr", "feature")
EPOCHS, PER_EPOCH = 3, 4
PICTURES = ["weights.png", "alignment.png", "gramian.png", "accuracy_cost.png"]


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def steps():
    return [(step + 1, step // PER_EPOCH) for step in range(EPOCHS * PER_EPOCH)]


def write_run(folder, weights, *, seed=0, cosine=None, method=None, linear=None, dataset="digits"):
    """A run with constant weights; with ``cosine``, one that looked at gradients: all cosines are
    that, but of the last epoch's first step, which was skipped."""
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "seed": seed,
        "max_epochs": EPOCHS,
        "data": {"dataset": dataset},
        "weighting": {"name": "grap" if cosine is not None else "fixed"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [[*each, *weights.values()] for each in steps()]
    write_csv(folder / "weights.csv", ["step", "epoch", *weights], rows)
    if cosine is not None:
        names = ["alignment", *(f"alignment/{term}" for term in weights)]
        names += [f"norm/{term}" for term in weights]
        names += [f"gramian/{a}/{b}" for a, b in combinations(weights, 2)]
        rows = []
        for i, each in enumerate(steps()):
            skipped = i == (EPOCHS - 1) * PER_EPOCH
            values = [math.nan if skipped else cosine] * len(names)
            rows.append([*each, *values, "unlabelled" if skipped else ""])
        write_csv(folder / "diagnostics.csv", ["step", "epoch", *names, "skipped"], rows)
    if linear is not None:
        result = {
            "method": method,
            "seed": seed,
            "online": None,
            "linear": linear,
            "knn": linear - 5,
            "rankme": 20.0,
            "weights": weights,
            "seconds": 1.0,
        }
        (folder / "result.json").write_text(json.dumps(result))


def write_comparison(folder):
    """Two seeds each of fixed weights and of two methods that learn, one with three terms."""
    for seed in (0, 1):
        fixed = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5)))
        write_run(folder / f"fixed-seed{seed}", fixed, seed=seed, method="fixed", linear=97.0)
        learned = dict(zip(FOUR, (0.2 + seed, 0.0, 8.0, 1.0)))
        write_run(
            folder / f"grap-seed{seed}",
            learned,
            seed=seed,
            cosine=0.2 + 0.2 * seed,
            method="grap",
            linear=96.0 + 2 * seed,
        )
        joined = dict(zip(THREE, (0.6, 0.5, 4.0)))
        write_run(folder / f"joined-seed{seed}", joined, seed=seed, cosine=-0.5)
    columns = ["method", "runs", "failed", "linear_mean", "linear_std", "knn_mean", "knn_std"]
    columns += ["cost", "cost_min", "cost_max", "p_value", "weight/nnclr", "weight/feature"]
    rows = [
        ["joined", 2, 0, 97.125, 0.25, 92, 0.5, "", "", "", 0.00004, 0.6, 4],
        ["grap", 2, 0, 97, 1.41421356, 92, 1.41421356, 1.2, 1.1, 1.3, 0.5, 0.7, ""],
        ["fixed", 2, 1, 97, 0, 92, 0, 1, 1, 1, "", 0.5, ""],
    ]
    write_csv(folder / "summary.csv", columns, rows)
    costs = {"fixed": {"median": 1.0, "min": 1.0, "max": 1.0}}
    (folder / "cost.json").write_text(json.dumps(costs))
    (folder / "crashed-seed0").mkdir()
    (folder / "crashed-seed0" / "config.yaml").write_text("name: crashed\n")


class Page(HTMLParser):
    """What of a page the tests look at: its tags, its tables' rows and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.words, self.cell = [], [], [], False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        self.words.append(data)
        if self.cell:
            self.rows[-1][-1] += data

    def attributes(self, tag, name):
        return [each[name] for found, each in self.tags if found == tag and name in each]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report on one comparison: its files and its page."""
    root = tmp_path_factory.mktemp("report")
    write_comparison(root / "comparison")
    files = report([root / "comparison"], root / "out")
    return files, Page(files[-1])


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept instead of written."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, target: drawn.append(figure))
    return drawn


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, which take most of the time."""
    for name in ("weight_panels", "alignment", "gramians", "accuracy_cost"):
        monkeypatch.setattr(
            f"grap_solo.report.sections.plot_{name}",
            lambda _, target, *more: target.write_bytes(bytes(24)),
        )


# ---- the page ---------------------------------------------------------------------------------


def test_it_writes_the_pictures_and_one_page_and_prints_their_names(tmp_path, capsys):
    write_run(tmp_path / "grap-seed3", dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5))), seed=3)
    files = report([tmp_path / "grap-seed3"], tmp_path / "deep" / "out")
    assert [file.name for file in files] == ["weights.png", "report.html"]
    assert all(str(file) in capsys.readouterr().out for file in files[:1])
    page = Page(files[-1])
    assert ["grap", "fixed", "digits", "3", ", ".join(FOUR), "1", "3"] in page.rows
    for left_out in ("Alignment", "Cosines between", "Accuracy and cost", "Skipped steps"):
        assert left_out in page.text
    assert page.text.count("Left out:") == 4
    assert "standard deviation" not in page.text  # There is one run: nothing has a deviation.


def test_a_comparison_fills_every_section(written):
    files, page = written
    assert [file.name for file in files] == [*PICTURES, "report.html"]
    assert "Left out:" not in page.text
    assert "3 methods, 6 runs" in page.text
    assert "Left out, because no step was recorded:" in page.text and "crashed-seed0" in page.text


def test_the_page_needs_nothing_but_itself(written):
    files, page = written
    sources = page.attributes("img", "src")
    assert len(sources) == len(PICTURES)
    for source, file in zip(sources, files):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == file.read_bytes()
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    assert all(each.startswith("#") for each in page.attributes("a", "href"))
    assert "http" not in page.source.replace("http-equiv", "") and "url(" not in page.source
    targets = {each["id"] for _, each in page.tags if "id" in each}
    assert {each[1:] for each in page.attributes("a", "href")} <= targets


def test_methods_are_in_the_order_of_the_summary(written):
    _, page = written
    assert [row[0] for row in page.rows[1:4]] == ["joined", "grap", "fixed"]


def test_the_summary_is_rounded_for_people(written):
    _, page = written
    columns = ["method", "runs", "failed", "linear probe", "k-NN", "cost", "p"]
    assert columns in page.rows
    dash = "\N{EN DASH}"
    assert ["joined", "2", "0", "97.12 ± 0.25", "92.00 ± 0.50", dash, "<0.001"] in page.rows
    cost = f"1.20 (1.10{dash}1.30)"
    assert ["grap", "2", "0", "97.00 ± 1.41", "92.00 ± 1.41", cost, "0.500"] in page.rows
    assert ["fixed", "2", "1", "97.00 ± 0.00", "92.00 ± 0.00", "1.00", dash] in page.rows
    assert ["joined", "0.60", "4.00"] in page.rows
    assert "No cost measured: joined." in page.text


def test_skipped_steps_are_counted_by_cause(written):
    _, page = written
    assert ["method", "steps", "skipped", "unlabelled"] in page.rows
    assert ["grap", "24", "8.3 % (2)", "8.3 % (2)"] in page.rows
    assert "No steps recorded: fixed." in page.text


def test_names_from_files_stay_text(tmp_path, undrawn):
    name = '<img src=x onerror="alert(1)">&'
    write_run(tmp_path / "a", {"<b>": 1.0, "c": 2.0}, method=name, linear=90.0)
    page = Page(report([tmp_path / "a"], tmp_path / "out")[-1])
    assert name in page.text and "<b>" in page.text
    assert page.attributes("img", "onerror") == []
    assert "b" not in {tag for tag, _ in page.tags}


def test_without_a_summary_the_results_are_put_in_a_table(tmp_path, undrawn):
    for seed, linear in enumerate((95.0, 97.0)):
        weights = dict(zip(THREE, (0.5 + seed, 0.5, 5.0)))
        write_run(tmp_path / f"a-seed{seed}", weights, seed=seed, method="own name", linear=linear)
    (tmp_path / "cost.json").write_text(json.dumps({"own name": {"median": 1.5}}))
    files = report([tmp_path], tmp_path / "out")
    page = Page(files[-1])
    assert ["own name", "2", "96.00 ± 1.41", "91.00 ± 1.41", "20.00 ± 0.00", "1.50"] in page.rows
    assert ["own name", "1.00", "0.50", "5.00"] in page.rows
    assert "accuracy_cost.png" in [file.name for file in files]


def test_a_summary_of_other_columns_is_shown_as_it_is(tmp_path, undrawn):
    write_run(tmp_path / "grap", dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5))))
    rows = [["untrained", "-", "90.00"], ["grap", "92.96", "96.85"]]
    write_csv(tmp_path / "summary.csv", ["method", "online probe", "linear probe"], rows)
    page = Page(report([tmp_path], tmp_path / "out")[-1])
    assert all(row in page.rows for row in rows)


def test_runs_of_different_folders_or_settings_are_not_thrown_together(tmp_path, undrawn):
    four, three = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5))), dict(zip(THREE, (0.5, 0.5, 5.0)))
    write_run(tmp_path / "one" / "grap-seed0", four)
    write_run(tmp_path / "one" / "fixed-seed0", four)
    write_run(tmp_path / "two" / "grap-seed0", four)
    write_run(tmp_path / "two" / "grap-seed1", three, seed=1)
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "one" / "grap-seed0"]
    page = Page(report(folders, tmp_path / "out")[-1])
    labels = [row[0] for row in page.rows[1:5]]
    assert labels == ["fixed", "grap (one, 4 terms)", "grap (two, 4 terms)", "grap (two, 3 terms)"]
    assert "4 methods, 4 runs" in page.text


def test_one_difference_is_named_if_it_tells_all_apart(tmp_path, undrawn):
    for i, folder in enumerate(("one", "two")):
        write_run(tmp_path / folder / "grap", {"a": 1.0, "bc"[i]: 1.0}, dataset=f"data{i}")
    page = Page(report([tmp_path / "one", tmp_path / "two"], tmp_path / "out")[-1])
    assert [row[0] for row in page.rows[1:3]] == ["grap (one)", "grap (two)"]
    write_run(tmp_path / "same" / "grap-seed0", {"a": 1.0, "b": 1.0})
    write_run(tmp_path / "same" / "grap-seed1", {"a": 1.0, "c": 1.0})
    page = Page(report([tmp_path / "same"], tmp_path / "out")[-1])
    assert [row[0] for row in page.rows[1:3]] == ["grap (a, b)", "grap (a, c)"]


def test_folders_of_one_name_are_told_apart(tmp_path, undrawn):
    weights = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5)))
    folders = [tmp_path / part / "runs" for part in ("a", "b")]
    for folder in folders:
        write_run(folder / "grap-seed0", weights, method="grap", linear=90.0)
        (folder / "cost.json").write_text(json.dumps({"grap": {"median": 1.1}}))
    page = Page(report(folders, tmp_path / "out")[-1])
    assert [row[0] for row in page.rows[1:3]] == [f"grap ({folder})" for folder in folders]


# ---- what is drawn ----------------------------------------------------------------------------


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


# ---- what it refuses --------------------------------------------------------------------------

WEIGHTS = "step,epoch,a,b\n1,0,1,2\n2,0,1,2\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.csv", WEIGHTS + "3,0,1\n", "row 4 has 3 values for 4 columns"),
        ("weights.csv", WEIGHTS + "3,0,1,x\n", "not numeric"),
        ("weights.csv", "a,b\n1,2\n", "expected 'step,epoch'"),
        ("weights.csv", "", "empty"),
        ("weights.csv", "step,epoch,a\n1,1,1\n2,0,1\n", "do not ascend"),
        ("diagnostics.csv", "step,epoch,alignment,skipped\n1,0\n", "row 2 has 2 values"),
        ("diagnostics.csv", "step,epoch,alignment,skipped\n1,0,high,\n", "not numeric"),
        ("diagnostics.csv", "alignment\n1\n", "expected 'step,epoch'"),
        ("config.yaml", "a: [", "expected keys and values"),
        ("result.json", "[1]", "expected keys and values"),
        ("result.json", '{"linear": "97"}', "'linear' is '97', not a number"),
        ("../summary.csv", "method,runs\ngrap\n", "row 2 has 1 values for 2 columns"),
        ("../summary.csv", "name\ngrap\n", "no column 'method'"),
        ("../cost.json", '{"grap": 3}', "'grap' holds no median, min and max"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, message):
    run = tmp_path / "cmp" / "grap-seed0"
    run.mkdir(parents=True)
    (run / "weights.csv").write_text(WEIGHTS)
    (run / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        report([tmp_path / "cmp"], tmp_path / "out")
    line = str(error.value)
    assert message in line and name.removeprefix("../") in line and str(tmp_path) in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_damage(tmp_path):
    (tmp_path / "weights.csv").write_bytes(b"\xff\xfe\x00step")
    with pytest.raises(ConfigError, match="weights.csv: damaged: not a CSV file"):
        report([tmp_path], tmp_path / "out")


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no run in it: give a folder with a weights.csv"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(ConfigError, match="at least one folder"):
        report([], tmp_path / "out")
    (tmp_path / "weights.csv").write_text("step,epoch,a\n")
    with pytest.raises(ConfigError, match="no run in it has recorded a step"):
        report([tmp_path], tmp_path / "out")


def test_an_output_that_cannot_take_the_files_is_refused(tmp_path):
    write_run(tmp_path / "grap", {"a": 1.0, "b": 2.0})
    with pytest.raises(ConfigError, match="is a run folder"):
        report([tmp_path / "grap"], tmp_path / "grap")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot be made"):
        report([tmp_path / "grap"], tmp_path / "file")

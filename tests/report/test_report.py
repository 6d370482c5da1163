"""A report on runs whose files are written by hand: no training."""

import base64
import json
from html.parser import HTMLParser

import pytest
import yaml
from run_folders import FOUR, THREE, steps, write_csv, write_run

from grap_solo.errors import ConfigError
from grap_solo.report.page import report

PICTURES = ["weights.png", "alignment.png", "gramian.png", "collapse.png", "accuracy_cost.png"]
SOUND = [(40, 0.6), (45, 0.7), (44, 0.7)]  # RankMe and spread.


def write_comparison(folder):
    """Two seeds each of fixed weights and of two methods that learn, one with three terms."""
    for seed in (0, 1):
        fixed = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5)))
        write_run(
            folder / f"fixed-seed{seed}",
            fixed,
            seed=seed,
            method="fixed",
            linear=97.0,
            validations=SOUND,
        )
        learned = dict(zip(FOUR, (0.2 + seed, 0.0, 8.0, 1.0)))
        write_run(
            folder / f"grap-seed{seed}",
            learned,
            seed=seed,
            cosine=0.2 + 0.2 * seed,
            method="grap",
            linear=96.0 + 2 * seed,
            validations=[(40, 0.6), (45, 0.7), (44, 0.7)]
            if seed
            else [(40, 0.6), (9, 0.09), (1, 0)],
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
    """The parts of a page that the tests read: its tags, its tables' rows and its text."""

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
def undrawn(monkeypatch):
    """Reports without pictures, which take most of the time."""
    for name in ("weight_panels", "alignment", "gramians", "collapse", "accuracy_cost"):
        monkeypatch.setattr(
            f"grap_solo.report.sections.plot_{name}",
            lambda _, target, *more: target.write_bytes(bytes(24)),
        )


# ---- the page ---------------------------------------------------------------------------------


def test_it_writes_the_pictures_and_one_page_and_prints_their_names(tmp_path, capsys):
    write_run(tmp_path / "grap-seed3", dict(zip(FOUR, (0.5, 0.5, 2.5, 2.5))), seed=3)
    files = report([tmp_path / "grap-seed3"], tmp_path / "deep" / "out")
    assert [file.name for file in files] == ["weights.png", "report.html"]
    printed = capsys.readouterr().out
    assert all(str(file) in printed for file in files)
    page = Page(files[-1])
    assert ["grap", "fixed", "digits", "3", ", ".join(FOUR), "1", "3"] in page.rows
    for left_out in ("Alignment", "Cosines between", "Accuracy and cost", "Skipped steps"):
        assert left_out in page.text
    assert page.text.count("Left out:") == 5
    assert "Left out: no run has val_rankme in its metrics.csv." in page.text
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
    links = page.attributes("a", "href")
    assert links and all(each.startswith("#") for each in links)
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


def test_a_collapsed_run_is_named_and_the_others_are_not(written):
    _, page = written
    said = [part.split(";")[0] for part in page.text.split("the representation")[1:]]
    assert said == [" collapsed within 3 epochs (RankMe 1.0, spread 0.00)"]
    assert "grap, seed 0: the representation" in page.text
    assert "No rank recorded: joined." in page.text


def test_a_run_of_one_validation_is_drawn(tmp_path):
    write_run(tmp_path / "run", {"a": 1.0, "b": 1.0}, validations=[(40, 0.6)])
    files = report([tmp_path / "run"], tmp_path / "out")
    assert "collapse.png" in [file.name for file in files]


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


def test_the_tables_weights_leave_the_warm_up_out(tmp_path, undrawn):
    write_run(tmp_path / "grap-seed0", {"a": 2.0, "b": 3.0}, linear=95.0, method="grap")
    rows = [[step, epoch, *((1, 1) if epoch < 2 else (2, 3))] for step, epoch in steps()]
    write_csv(tmp_path / "grap-seed0" / "weights.csv", ["step", "epoch", "a", "b"], rows)
    config = yaml.safe_load((tmp_path / "grap-seed0" / "config.yaml").read_text())
    for warmup, expected in ((None, ["1.00", "1.00"]), (2, ["2.00", "3.00"])):
        config["weighting"]["warmup_epochs"] = warmup
        (tmp_path / "grap-seed0" / "config.yaml").write_text(yaml.safe_dump(config))
        page = Page(report([tmp_path], tmp_path / "out")[-1])
        assert ["grap", *expected] in page.rows


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


# ---- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.csv", "method,runs\ngrap\n", "row 2 has 1 values for 2 columns"),
        ("summary.csv", "name\ngrap\n", "no column 'method'"),
        ("summary.csv", "", "it is empty"),
        ("cost.json", '{"grap": 3}', "'grap' holds no median, min and max"),
        ("grap-seed0/weights.csv", "step,epoch,a,b\n1,0,1\n", "row 2 has 3 values for 4 columns"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, message):
    write_run(tmp_path / "cmp" / "grap-seed0", {"a": 1.0, "b": 2.0})
    (tmp_path / "cmp" / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        report([tmp_path / "cmp"], tmp_path / "out")
    line = str(error.value)
    assert message in line and str(tmp_path / "cmp" / name) in line and "\n" not in line
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(ConfigError, match="file cannot be made"):
        report([tmp_path / "grap"], tmp_path / "file")

"""Every weighting and every variant of GraP trains on the digits and leaves the same files."""

import numpy as np
import pytest
import torch
import yaml
from helpers import QUIET, all4one_config, digits, image_batch, rows_of, take_step
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.compose import compose
from grap_solo.data.datasets import Digits, Images, split_labels
from grap_solo.experiments.retrain import finetune, newest_checkpoint
from grap_solo.methods import GrapAll4One
from grap_solo.records.weights import pooled_weights, read_weights
from grap_solo.training.run import pretrain
from grap_solo.weighting import CAUSES, WEIGHTINGS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TERMS = ["nnclr", "attn_nnclr", "byol", "barlow"]


def configuration(directory, *overrides, file="all4one"):
    return digits(directory, *QUIET, "method=grap_all4one", "name=run", *overrides, file=file)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_trains_and_leaves_the_same_files(name, tmp_path):
    run = pretrain(configuration(tmp_path, f"+weighting={{name: {name}}}"))
    files = {path.name for path in run.directory.iterdir()}
    assert files >= {
        "config.yaml", "metrics.csv", "weights.csv", "weights.png", "median_weights.yaml",
        "checkpoints",
    }  # fmt: skip
    assert ("diagnostics.csv" in files) == WEIGHTINGS[name].uses_gradients
    terms, steps, weights = read_weights(run.directory / "weights.csv")
    assert terms == TERMS and steps[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(weights).all()
    assert run.accuracy is not None and 0 < run.accuracy <= 100
    start = GrapAll4One(run.cfg).backbone.state_dict()
    assert not torch.equal(start["conv1.0.weight"], run.model.backbone.conv1[0].weight)
    # dwa for 2 epochs, scheduled without a course.
    constant = name in ("fixed", "equal", "auxiliary", "supervised", "dwa", "scheduled")
    assert (np.ptp(weights, axis=0) == 0).all() == constant


def test_dwas_weights_change_in_the_third_epoch(tmp_path):
    run = pretrain(configuration(tmp_path, "+weighting={name: dwa}", "max_epochs=3"))
    _, steps, weights = read_weights(run.directory / "weights.csv")
    assert (weights[steps[:, 1] < 2] == 1).all() and np.ptp(weights[-1]) > 1e-4
    assert weights[-1].sum() == pytest.approx(4)


def test_a_term_of_weight_0_is_neither_computed_nor_trained(tmp_path):
    weights = "{nnclr: 0.5, attn_nnclr: 0.0, byol: 2.5, barlow: 2.5}"
    run = pretrain(configuration(tmp_path, f"+weighting={{name: fixed, weights: {weights}}}"))
    model = run.model
    assert not any(p.requires_grad for p in model.transformer_encoder.parameters())
    calls = []
    model.transformer_encoder.register_forward_hook(lambda *args: calls.append(1))
    model.predictor.register_forward_hook(lambda *args: calls.append(2))
    feats = [torch.randn(8, 96) for _ in range(2)]
    outputs = {"momentum_z": [torch.randn(8, 64)] * 2, "momentum_feats": feats}
    targets = model.make_targets(outputs)
    assert set(model.compute_terms(model._project(feats), targets)) == {"nnclr", "byol", "barlow"}
    assert set(calls) == {2}
    columns = (run.directory / "metrics.csv").read_text().splitlines()[0]
    assert "train_nnclr_loss" in columns and "train_att_nnclr_loss" not in columns
    _, _, recorded = read_weights(run.directory / "weights.csv")
    assert (recorded[:, 1] == 0).all()


def test_supervised_computes_no_term_and_no_momentum_network(tmp_path):
    run = pretrain(configuration(tmp_path, "+weighting={name: supervised}"))
    trainable = {n.split(".")[0] for n, p in run.model.named_parameters() if p.requires_grad}
    assert trainable == {"backbone", "classifier"}
    calls = []
    run.model.momentum_backbone.register_forward_hook(lambda *args: calls.append(1))
    run.model.log_dict = run.model.log = lambda *args, **kwargs: None
    run.model.training_step([torch.arange(8), [torch.randn(8, 3, 24, 24)] * 2, torch.arange(8)], 0)
    assert not calls


# ---- labels ---------------------------------------------------------------------------------


def test_a_fraction_of_the_labels_is_balanced_fixed_by_seed_and_stored(tmp_path):
    images = Digits(True)
    kept = []
    for seed in (5, 5, 6):
        part, held_out, indexes = split_labels(images, 0.1, False, seed)
        assert held_out is None and len(part) == len(images)
        assert np.array_equal(np.flatnonzero(part.targets >= 0), indexes)
        assert (part.targets[indexes] == images.targets[indexes]).all()
        assert part[int(indexes[0])][1] == images.targets[indexes[0]]
        counts = np.bincount(images.targets[indexes], minlength=10)
        assert counts.max() - counts.min() <= 1 and len(indexes) == 125
        kept.append(indexes)
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])

    run = pretrain(configuration(tmp_path, "+labels.fraction=0.5", file="grap"))
    stored = (run.directory / "labels.csv").read_text().split()
    assert stored[0] == "index" and len(stored) - 1 == 125  # Half of a fifth of the images.
    assert all(row["skipped"] == "" for row in rows_of(run.directory / "diagnostics.csv"))


def test_held_out_images_are_never_pretrained_on(tmp_path, monkeypatch):
    images = Digits(True)
    part, held_out, indexes = split_labels(images, 0.25, True, 5)
    assert len(part) + len(held_out) == len(images) and (part.targets == -1).all()
    assert (held_out.targets == images.targets[indexes]).all()

    seen = {"train": [], "labelled": []}
    original = GrapAll4One.training_step

    def recorded(self, batch, batch_idx):
        for name in seen:
            seen[name].append(batch[name][0])
        before = {k: v.clone() for k, v in self.named_buffers() if "running" in k}
        assert before
        held = self._embed_held_out(batch["labelled"][1])
        held.terms(*held.embeddings)
        assert all(torch.equal(v, before[k]) for k, v in self.named_buffers() if k in before)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GrapAll4One, "training_step", recorded)
    changes = ["+labels.fraction=0.4", "+labels.split=held_out", "optimizer.batch_size=32"]
    run = pretrain(configuration(tmp_path, *changes, file="grap"))
    _, _, weights = read_weights(run.directory / "weights.csv")
    assert np.ptp(weights, axis=0).min() > 0  # They are learned from the held-out labels.
    stored = np.loadtxt(run.directory / "labels.csv", skiprows=1)
    assert len(stored) == 100 and torch.cat(seen["labelled"]).max() < 100
    assert torch.cat(seen["train"]).max() < 151  # Indexes within the other part.
    assert (run.model.queue_y == -1).all()  # No label of theirs is known.


class Unknown(Images):
    targets = np.full(10, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["+labels.fraction=1.5"], "labels.fraction: .*up to 1, got 1.5"),
        (["+labels.fraction=0"], "labels.fraction: expected a number above 0"),
        (["+labels.split=held_out"], "the part that is held out: .*up to 0.5, got 1.0"),
        (["+labels.split=heldout"], "did you mean 'held_out'"),
        (["+labels.fractions=0.5"], "labels: unknown name 'fractions'"),
        (["+labels.fraction=0.01"], "labels.fraction: 0.01 of 251 labelled images"),
        (
            ["+labels={split: held_out, fraction: 0.2}", "weighting.name=auxiliary"],
            "labels.split: 'auxiliary' trains the backbone",
        ),
        (["+diagnostics.every=5"], "diagnostics: unknown name 'every'"),
        (["+pretrained_feature_extractor=none.ckpt"], "none.ckpt: no such file"),
    ],
)
def test_bad_labels_are_refused(changes, message, tmp_path):
    base = "fixed" if any("auxiliary" in each for each in changes) else None
    file = ["+weighting.name=fixed"] if base else []
    changes = [*file, *changes]
    with pytest.raises(ConfigError, match=message) as error:
        pretrain(configuration(tmp_path, *changes, file="all4one" if base else "grap"))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_labels_of_which_there_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"labels.fraction: 0.5 of 0 labelled images"):
        split_labels(Unknown(), 0.5, False, 0)


# ---- diagnostics ----------------------------------------------------------------------------


def test_the_diagnostics_are_the_cosines_of_the_gradients(tmp_path):
    from grap_solo.balance import balance
    from grap_solo.diagnostics import diagnostic_names

    run = pretrain(
        configuration(
            tmp_path, "+diagnostics.parameter_space_every=4", "log_every_n_steps=1", file="grap"
        )
    )
    rows = rows_of(run.directory / "diagnostics.csv")
    assert list(rows[0])[:2] == ["step", "epoch"] and len(rows) == 6
    assert list(rows[0])[2:] == [*diagnostic_names(TERMS), "parameter_space", "skipped"]
    assert {row["skipped"] for row in rows} == {""} <= set(CAUSES)
    measured = [float(row["parameter_space"]) for row in rows]
    assert [np.isfinite(each) for each in measured] == [True, False, False, False, True, False]
    assert all(-1 <= each <= 1 for each in measured if np.isfinite(each))
    metrics = (run.directory / "metrics.csv").read_text().splitlines()[0]
    assert "skipped/unlabelled" in metrics and "alignment/barlow" in metrics

    model = GrapAll4One(all4one_config(weighting={"name": "grap"})).double()
    model.weighting.set_total_steps(8)
    model.log_dict = model.log = lambda *args, **kwargs: None
    steps = []

    def kept(*args):
        steps.append(balance(*args))
        return steps[-1]

    model.balance = kept
    indexes, views, labels = image_batch()
    take_step(model, [indexes, [each.double() for each in views], labels])
    (step,) = steps
    vectors = [torch.cat([each.flatten() for each in row]) for row in step.gradients]
    found = model.diagnostics
    for k, term in enumerate(TERMS):
        assert found[f"norm/{term}"].item() == pytest.approx(vectors[k].norm().item())
    cosine = torch.cosine_similarity(vectors[0], vectors[3], dim=0)
    assert found["gramian/nnclr/barlow"].item() == pytest.approx(cosine.item())
    assert found["alignment"].item() == pytest.approx(step.alignment.item())


def test_embedding_and_parameter_space_agree_where_the_backbone_is_an_isometry():
    """With orthonormal inputs and a linear backbone both Gramians are equal, so the cosine is 1;
    with inputs of very different sizes it is not."""
    from torch import nn
    from torch.nn.functional import cross_entropy, mse_loss

    from grap_solo import GraP, balance
    from grap_solo.diagnostics import parameter_space_cosine

    torch.manual_seed(0)
    backbone = nn.Linear(16, 6, bias=False).double()
    heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)).double()
    targets, probe = torch.randn(3, 8, 3).double(), nn.Linear(6, 4).double()
    inputs = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q.T
    cosines = []
    for x in (inputs, inputs * torch.logspace(-2, 2, 8).double()[:, None]):
        down = []

        def downstream(z, down=down):
            down[:] = [z, cross_entropy(probe(z), torch.arange(8) % 4)]
            return down[1]

        z = backbone(x)
        step = balance(
            z,
            lambda z: {f"{k}": mse_loss(h(z), targets[k]) for k, h in enumerate(heads)},
            downstream,
            GraP(["0", "1", "2"], recipe="alg1").double(),
        )
        target = torch.autograd.grad(down[1], down[0], retain_graph=True)
        cosines.append(parameter_space_cosine(step, target, [z], backbone).item())
        step.loss.backward()  # The graph is still whole.
    assert cosines[0] == pytest.approx(1) and cosines[1] < 0.99


# ---- runs that come from runs ---------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("seeds")
    return [
        pretrain(configuration(directory, f"name=grap-seed{seed}", f"seed={seed}", file="grap"))
        for seed in (1, 2)
    ]


def test_weights_are_pooled_over_runs_epochs_and_last_steps(seeds):
    files = [run.directory / "weights.csv" for run in seeds]
    both = [read_weights(file)[2] for file in files]
    pooled = {
        (): np.median(np.concatenate(both), axis=0),
        ((1, 1), None): np.median(np.concatenate([each[3:] for each in both]), axis=0),
        (None, 2): np.concatenate([each[-2:] for each in both]).mean(axis=0),
    }
    for choice, expected in pooled.items():
        found = pooled_weights(files, [0, 0], *choice)
        assert list(found) == TERMS
        assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="no step in the epochs 7 to 9"):
        pooled_weights(files, [0, 0], (7, 9))
    with pytest.raises(ConfigError, match="give one"):
        pooled_weights(files, [0, 0], (0, 1), 2)


def test_retrain_from_several_runs_writes_out_what_it_trains(seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(run.directory) for run in seeds]
    assert main(["retrain", *folders, "--epochs", "1", "1", f"checkpoint.dir={tmp_path}",
                 "max_epochs=1"]) == 0  # fmt: skip
    written = yaml.safe_load((tmp_path / "grap-seed1_tuned" / "config.yaml").read_text())
    expected = pooled_weights([run.directory / "weights.csv" for run in seeds], [0, 0], (1, 1))
    block = {"name": "fixed", "weights": expected}
    assert written["weighting"] == block
    assert written["tuned_from"] == {"runs": folders, "epochs": [1, 1], "last": None}
    again = pretrain(compose(tmp_path / "grap-seed1_tuned" / "config.yaml", ["name=again"]))
    assert list(again.model.weighting.weights) == pytest.approx(list(expected.values()))


def test_runs_of_other_terms_are_not_pooled(seeds, tmp_path):
    (tmp_path / "weights.csv").write_text("step,epoch,a\n1,0,1\n")
    with pytest.raises(ConfigError, match="its terms are a, the first run's nnclr"):
        pooled_weights([seeds[0].directory / "weights.csv", tmp_path / "weights.csv"], [0, 0])


def test_finetuning_starts_at_the_runs_backbone_and_trains_it_with_the_labels(seeds, monkeypatch):
    (parent, _) = seeds
    started = []
    original = GrapAll4One.on_train_start

    def recorded(self):
        started.append({k: v.clone() for k, v in self.backbone.state_dict().items()})
        original(self)

    monkeypatch.setattr(GrapAll4One, "on_train_start", recorded)
    run = finetune(parent.directory, OmegaConf.load)
    assert run.directory == parent.directory.with_name("grap-seed1_finetuned")
    for key, value in parent.model.backbone.state_dict().items():
        assert torch.equal(started[0][key], value), key
    final = run.model.backbone.conv1[0].weight
    assert not torch.equal(final, started[0]["conv1.0.weight"])
    with pytest.raises(ConfigError, match="does not fit resnet18: "):
        path = newest_checkpoint(parent.directory)
        cfg = configuration(
            parent.directory.parent,
            "name=other", "backbone.name=resnet18", f"+pretrained_feature_extractor='{path}'",
        )  # fmt: skip
        pretrain(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrain", "RUN", "--epochs", "1"], "retrain: argument --epochs: expected 2 arguments"),
        (
            ["retrain", "RUN", "--mean-last", "0"],
            "--mean-last: expected a whole number of 1 or more",
        ),
        (
            ["retrain", "RUN", "--mean-last", "x"],
            "--mean-last: expected a whole number of 1 or more, got 'x'",
        ),
        (["retrain", "RUN", "--epochs", "0", "1", "--mean-last", "2"], "give one"),
        (["finetune"], "finetune: give the folder of a run"),
        (["finetune", "nowhere"], "nowhere/config.yaml: no such file"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, seeds, capsys):
    run = str(seeds[0].directory)
    assert main([run if each == "RUN" else each for each in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1

"""The offline evaluations against their definitions, and on embeddings that cannot be measured."""

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from grap_solo.evaluation import offline
from grap_solo.evaluation.offline import (
    REGULARISERS,
    linear_probe,
    measure_embeddings,
    nearest_neighbours,
    split_by_class,
)
from grap_solo.evaluation.online import WeightedKNNClassifier


def classes(count, width=24, spread=1.0, seed=0, noise_width=0):
    """Embeddings (N, D) and labels (N,) of four classes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    centres = np.random.default_rng(99).normal(size=(4, width))
    x = centres[labels] * spread + generator.normal(size=(count, width))
    return np.hstack([x, generator.normal(size=(count, noise_width))]).astype(np.float32), labels


def test_knn_is_the_weighted_vote_of_cosines_and_the_online_metrics():
    (x, y), (x_val, y_val) = classes(200, spread=0.4), classes(80, spread=0.4, seed=1)
    found = nearest_neighbours(x, y, x_val, y_val)
    unit, unit_val = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, x_val))
    hits = 0
    for cosines, label in zip(unit_val @ unit.T, y_val):
        nearest = np.argsort(-cosines)[:20]
        votes = np.bincount(y[nearest], weights=np.exp(cosines[nearest] / 0.07), minlength=4)
        hits += votes.argmax() == label
    assert found == pytest.approx(100 * hits / 80, abs=1e-3) and 30 < found < 100
    online = WeightedKNNClassifier(k=20, distance_fx="cosine")
    online.update(train_features=torch.from_numpy(x), train_targets=torch.from_numpy(y))
    online.update(test_features=torch.from_numpy(x_val), test_targets=torch.from_numpy(y_val))
    assert online.compute()[0] == found


def top1(x, y, x_val, y_val, strength):
    """Top-1 in percent, from sklearn's parts."""
    scale = StandardScaler().fit(x)
    probe = LogisticRegression(C=strength, max_iter=10_000).fit(scale.transform(x), y)
    return 100 * (probe.predict(scale.transform(x_val)) == y_val).mean()


def test_the_regulariser_is_the_best_on_a_split_of_the_training_embeddings():
    """With many directions of noise a strong one is best."""
    train, validation = (classes(120, noise_width=200, spread=0.5, seed=seed) for seed in (0, 1))
    x, y = train
    found = linear_probe(*train, *validation)
    fitted, held = split_by_class(y)
    scores = {c: top1(x[fitted], y[fitted], x[held], y[held], c) for c in REGULARISERS}
    assert scores[found["regulariser"]] == max(scores.values()) > scores[1.0]
    assert 1.0 in REGULARISERS  # That of earlier tables.
    assert found["linear"] == pytest.approx(top1(*train, *validation, found["regulariser"]))
    assert found["note"] is None


def test_of_equal_regularisers_that_of_earlier_tables_is_taken():
    train, validation = classes(200, spread=9.0), classes(80, spread=9.0, seed=1)
    found = linear_probe(*train, *validation)
    assert (found["regulariser"], found["linear"]) == (1.0, 100)


def test_the_split_holds_a_fifth_of_each_class_out():
    labels = np.repeat(np.arange(4), [50, 25, 10, 3])
    fitted, held = split_by_class(labels)
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 5, 2, 0]
    assert sorted([*fitted, *held]) == list(range(len(labels)))
    many = np.arange(30_000) % 2
    assert sum(map(len, split_by_class(many))) == 10_000


def test_a_probe_that_does_not_converge_has_a_figure_and_a_note(monkeypatch):
    monkeypatch.setattr(offline, "MOST_ITERATIONS", 2)
    train, validation = classes(200, spread=0.5), classes(80, spread=0.5, seed=1)
    found = measure_embeddings(train, validation, ["linear"])
    assert found.notes == {"linear": "not converged after 2 iterations"}
    assert 20 < found.linear <= 100


def spoil(part, value):
    x, y = part
    x = x.copy()
    x[3, 2] = value
    return x, y


SOUND = classes(200), classes(80, seed=1)
CONSTANT = np.ones((200, 24), np.float32) * [[0.3]], SOUND[0][1]
JITTER = SOUND[0][0] * np.float32(1e-7) + 1, SOUND[0][1]
UNLABELLED = SOUND[0][0], np.full(200, -1)
DEGENERATE = {
    "constant": ((CONSTANT, SOUND[1]), "embeddings are constant", 4),
    "constant but for rounding": ((JITTER, SOUND[1]), "embeddings are constant", 4),
    "NaN": ((spoil(SOUND[0], np.nan), SOUND[1]), r"not finite \(1 of 280 images\)", 4),
    "infinite": ((SOUND[0], spoil(SOUND[1], np.inf)), r"not finite \(1 of 280 images\)", 4),
    "no labels": ((UNLABELLED, SOUND[1]), "no labelled images", 2),
    "one label": (((SOUND[0][0], np.zeros(200, int)), SOUND[1]), "have the same label", 1),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_embeddings_that_cannot_be_measured_give_a_reason_and_no_figure(case, recwarn):
    parts, reason, count = DEGENERATE[case]
    found = measure_embeddings(*parts)
    values = [getattr(found, name) for name in offline.ALL_MEASURES]
    assert values.count(None) == len(found.notes) == count
    for name, note in found.notes.items():
        assert getattr(found, name) is None
        assert re.search(reason, note)
    assert not recwarn.list
    assert not measure_embeddings(*SOUND).notes


def test_all_measures_share_one_pass_over_the_images():
    class Counted(torch.nn.Linear):
        images = 0

        def forward(self, images):
            self.images += len(images)
            return super().forward(images)

    backbone = Counted(24, 24)
    parts = [torch.utils.data.TensorDataset(*map(torch.from_numpy, each)) for each in SOUND]
    loaders = [torch.utils.data.DataLoader(each, batch_size=32) for each in parts]
    found = offline.evaluate(backbone, *loaders)
    assert not any(getattr(found, name) is None for name in offline.ALL_MEASURES)
    assert backbone.images == sum(map(len, parts))

"""The demo's sentences: each verdict, and the numbers in it."""

import math

import numpy as np
import pytest

from grap_solo.experiments.verdicts import (
    CONCLUSIONS,
    describe_accuracies,
    describe_approach,
    find_farthest,
    judge,
    noise_margin,
)

VICREG = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
EQUAL = dict.fromkeys(VICREG, 6.5)  # On any scale.


def test_the_margin_is_two_standard_deviations_of_a_difference():
    drawn = np.random.default_rng(0).binomial(540, 0.96, size=(100_000, 2)) / 5.4
    difference = drawn[:, 0] - drawn[:, 1]
    assert noise_margin([95.0, 97.0], 540) == pytest.approx(2 * difference.std(), rel=0.02)
    assert noise_margin([96.0], 2160) == pytest.approx(noise_margin([96.0], 540) / 2)
    assert noise_margin([100.0, 100.0], 540) == 0


@pytest.mark.parametrize(
    ("accuracy", "other", "verdict"),
    [(97, 96, "level with"), (96, 97, "level with"), (98.5, 96, "above"), (93, 96, "below"),
     (97.5, 96, "level with"), (97.6, 96, "above")],
)  # fmt: skip
def test_a_difference_within_the_margin_is_level(accuracy, other, verdict):
    assert judge(accuracy, other, 1.5) == verdict


# GraP, default, equal; what it is against both; what follows.
ACCURACIES = {
    "helped": (98, 90, 90, "above", "above", "Learning the weights helped here."),
    "as good as by hand": (95, 95, 80, "level with", "above", "did as well as choosing them by"),
    "between": (90, 97, 80, "below", "above", "choosing them by hand is better still"),
    "as good as equal": (95, 80, 95, "above", "level with", "nothing shows that GraP helped"),
    "alike": (96, 96.5, 97, "level with", "level with", "nothing shows that it helped"),
    "worse than by hand": (80, 95, 80, "below", "level with", "GraP did not help here."),
    "worse than equal": (90, 80, 97, "above", "below", "did not help here: equal weights are the"),
    "no better": (90, 90, 97, "level with", "below", "GraP did not help here."),
    "worst": (50, 95, 96, "below", "below", "did not help here: its weights are the worst"),
}


@pytest.mark.parametrize("case", ACCURACIES)
def test_the_sentence_says_whether_grap_helped(case):
    grap, default, equal, by_hand, alike, conclusion = ACCURACIES[case]
    text = describe_accuracies({"grap": grap, "default": default, "equal": equal}, 540)
    assert (
        f"GraP ({grap:.2f} %) is {by_hand} the default weights ({default:.2f} %) and {alike} equal "
        f"weights ({equal:.2f} %)."
    ) in text
    assert conclusion in text and "held constant" not in text
    margin = noise_margin([grap, default, equal], 540)
    assert f"Differences of up to {margin:.1f} points count as level" in text
    assert text.endswith("on 540 images.")


def test_every_pair_of_verdicts_has_a_conclusion_and_a_case():
    verdicts = ("above", "level with", "below")
    every = {(one, other) for one in verdicts for other in verdicts}
    assert set(CONCLUSIONS) == every == {case[3:5] for case in ACCURACIES.values()}


@pytest.mark.parametrize(
    ("tuned", "verdict"), [(96, "level with"), (99.8, "above"), (90, "below")]
)  # fmt: skip
def test_the_tuned_run_has_a_verdict_of_its_own(tuned, verdict):
    linear = {"grap": 97, "default": 96, "equal": 96, "grap_tuned": tuned}
    text = describe_accuracies(linear, 540)
    assert f"held constant ({tuned:.2f} %), are {verdict} the default weights." in text


@pytest.mark.parametrize("scale", [1.0, 0.01, 300.0])
def test_a_common_factor_of_the_weights_changes_nothing(scale):
    weights = {"invariance": 50 * scale, "variance": 25 * scale, "covariance": 10 * scale}
    most, least, factor = find_farthest(weights, VICREG)
    assert (most, least) == ("covariance", "variance") and factor == pytest.approx(10)


def test_weights_in_the_default_proportion_are_off_by_nothing():
    most, least, factor = find_farthest({term: 2 * w for term, w in VICREG.items()}, VICREG)
    assert factor == 1 and most != least


ENDS = {
    "nearer": ({"invariance": 25, "variance": 20, "covariance": 3}, "came nearer to",
               "covariance weighed 3.8 times as much against variance"),
    "moved away": ({"invariance": 25, "variance": 25, "covariance": 50}, "moved away from",
                   "covariance weighed 50.0 times as much against variance"),
    "no nearer": ({"invariance": 6, "variance": 6, "covariance": 6.1}, "came no nearer to",
                  "covariance weighed 25.4 times as much against variance"),
    "too far the other way": ({"invariance": 25, "variance": 25, "covariance": 0.02},
                              "moved away from",
                              "variance weighed 50.0 times as much against covariance"),
    "a weight of 0": ({"invariance": 30, "variance": 12, "covariance": 0}, "moved away from",
                      "covariance weighed nothing"),
    "every weight 0": (dict.fromkeys(VICREG, 0), "moved away from", "weighed nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_the_sentence_says_where_the_weights_went(case):
    end, verdict, farthest = ENDS[case]
    text = describe_approach(EQUAL, end, VICREG)
    assert "at the first step covariance weighed 25.0 times as much against " in text
    assert farthest in text and text.endswith(f"GraP {verdict} the default weights.")


def test_a_weight_that_stays_at_0_came_no_nearer():
    end = {"invariance": 1, "variance": 1, "covariance": 0}
    assert "came no nearer" in describe_approach(end, end, VICREG)
    assert math.isinf(find_farthest(end, VICREG)[2])


def test_runs_without_a_linear_probe_are_not_compared():
    text = describe_accuracies({"grap": None, "default": 90.0, "equal": None}, 540)
    assert text == (
        "The embeddings of grap and equal allow no linear probe, so nothing can be compared."
    )

"""Gates as a convex problem: equal to scikit-learn's, and thresholds that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from grun.method import logistic
from grun.method.logistic import EXACT, FOLDS, STRENGTHS, choose_strength, conformal, fit, fit_parts, shuffled


def two_kinds(rows: int = 60, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unlike scales, one of them constant, and which rows are to open the gate: a quarter."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(rows) % 4 == 0
    features = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    features = features * torch.logspace(-3, 3, size, dtype=torch.float64) + 5
    features[target] += features.std(dim=0) * torch.randn(size, generator=generator, dtype=torch.float64)
    features[:, 3] = 7.0
    return features, target


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_fit_is_that_of_scikit_learn(strength: float) -> None:
    pipeline = pytest.importorskip("sklearn.pipeline")
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, target = two_kinds()
    model = LogisticRegression(C=strength, class_weight="balanced", tol=1e-10, max_iter=10000)
    made = pipeline.make_pipeline(StandardScaler(), model).fit(features.numpy(), target.numpy())
    new, _ = two_kinds(seed=1)
    wanted = made.decision_function(new.numpy())
    # both stop where the slope is about 1e-8
    np.testing.assert_allclose(fit(features, target, strength).logits(new).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_parts_that_are_fitted_as_one_problem_get_the_fit_of_each_alone() -> None:
    """Each part has scales of its own, and in one of them a further feature is constant."""
    features, target = two_kinds()
    inside = torch.stack([(torch.arange(60) // 4) % 3 != left_out for left_out in range(3)])
    features[inside[1], 5] = -2.0
    fitted = fit_parts(features, target, inside, STRENGTHS, EXACT, torch.float64)
    new, _ = two_kinds(seed=1)
    for strength, lines in zip(STRENGTHS, fitted, strict=True):
        for part, line in zip(inside, lines, strict=True):
            wanted = fit(features[part], target[part], strength).logits(new)
            torch.testing.assert_close(line.logits(new), wanted, rtol=1e-4, atol=1e-4)  # both stop near a slope of 0


def test_rows_left_out_have_about_the_logits_that_an_exact_fit_gives_them() -> None:
    features, target = two_kinds(200, 12)
    strength, logits = choose_strength(features, target, range(200))
    wanted = torch.empty_like(logits)
    order = sorted(range(200), key=shuffled)
    for kind in (True, False):
        for place, row in enumerate(row for row in order if bool(target[row]) == kind):
            wanted[row] = place % FOLDS
    for number in range(FOLDS):
        out = wanted == number
        exact = fit(features[~out], target[~out], strength).logits(features[out])
        torch.testing.assert_close(logits[out], exact, rtol=0.02, atol=0.02)


def test_the_strength_is_chosen_on_units_left_out_whole() -> None:
    """Each unit has a mark of its own: a weak penalty learns the marks, which say nothing of another unit."""
    features, target = two_kinds(80, 4)
    units = [f"unit {row // 4} of kind {bool(target[row])}" for row in range(80)]
    marks = torch.nn.functional.one_hot(torch.arange(80) // 4).double() * 10
    marked = torch.cat((0.2 * features / features.std(0).clamp(min=1), marks), dim=1)
    strength, logits = choose_strength(marked, target, units)
    single, _ = choose_strength(features, target, range(80))
    assert strength < single
    assert logits.shape == (80,)


def test_values_behind_one_that_is_worse_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    solve = logistic.minimize
    monkeypatch.setattr(logistic, "minimize", lambda *a, **k: tried.append(k["args"][0]) or solve(*a, **k))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 40, generator=generator, dtype=torch.float64)  # nothing to learn: the less the better
    strength, _ = choose_strength(noise, torch.arange(60) % 4 == 0, range(60))
    assert strength == STRENGTHS[0] and 1 < len(tried) < len(STRENGTHS)


def test_rows_that_are_left_out_are_scored_by_a_fit_without_them() -> None:
    features, target = two_kinds(40)
    strength, logits = choose_strength(features, target, range(40))
    assert len({round(float(value), 9) for value in logits}) == 40
    whole = fit(features, target, strength).logits(features)
    assert ((logits - whole).abs() > 1e-6).all()
    assert FOLDS == 5


def test_one_unit_of_a_kind_is_too_few() -> None:
    features, target = two_kinds(12)
    with pytest.raises(ValueError, match="1 unit of rows"):
        choose_strength(features, target, ["one" if one else str(number) for number, one in enumerate(target)])


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("count", [5, 40, 199])
def test_a_threshold_is_passed_as_seldom_as_promised_in_200_draws(rate: float, count: int) -> None:
    """Mean over draws of the exact share of new rows above it; of uniform scores that is 1 - threshold."""
    generator = torch.Generator().manual_seed(count)
    shares = []
    for _ in range(200):
        threshold, bound = conformal(torch.rand(count, generator=generator, dtype=torch.float64), range(count), rate)
        shares.append(1 - threshold)
    mean, error = np.mean(shares), np.std(shares) / 200**0.5
    assert bound <= max(rate, 1 / (count + 1)) + 1e-9
    assert abs(mean - bound) < 3 * error  # of rows that are units the bound is exact


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_it_holds_for_rows_of_units_that_are_alike_in_200_draws(rate: float) -> None:
    """Units of 1 to 12 rows whose scores lie closely together: by rows alone the promise would be broken."""
    generator = torch.Generator().manual_seed(1)
    shares, alone = [], []
    for _ in range(200):
        sizes = torch.randint(1, 13, (30,), generator=generator)
        units = torch.arange(30).repeat_interleave(sizes)
        centers = torch.randn(1030, generator=generator, dtype=torch.float64)
        scores = centers[units] + 0.1 * torch.randn(len(units), generator=generator, dtype=torch.float64)
        new = centers[30:] + 0.1 * torch.randn(1000, generator=generator, dtype=torch.float64)
        threshold, bound = conformal(scores, units.tolist(), rate)
        shares.append(float((new > threshold).double().mean()))
        alone.append(float((new > conformal(scores, range(len(units)), rate)[0]).double().mean()))
        assert bound <= rate + 1e-9
    error = np.std(shares) / 200**0.5
    assert np.mean(shares) <= rate + 3 * error
    assert np.mean(alone) > np.mean(shares)


def test_with_few_rows_the_bound_says_what_can_be_promised() -> None:
    assert conformal(torch.tensor([3.0, 1.0, 2.0]), "abc", 0.01) == (3.0, 0.25)
    assert conformal(torch.arange(99.0), range(99), 0.01) == (98.0, 0.01)
    assert conformal(torch.arange(199.0), range(199), 0.01) == (197.0, 0.01)
    assert conformal(torch.tensor([3.0, 3.0, 2.0, 1.0]), "aabc", 0.5) == (2.0, 0.5)  # 2 of unit a's 2 rows above it

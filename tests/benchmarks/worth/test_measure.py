"""The measure of a method's worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.worth.measure import SMALLEST, Search, Worth, worth


def made_up(generator: np.random.Generator, count: int) -> Search:
    """Trials whose validation score tells most of the test score; one in ten breaks off."""
    test = np.exp(generator.normal(size=count))
    validation = test * np.exp(0.2 * generator.normal(size=count))
    failed = generator.random(count) < 0.1
    test[failed] = validation[failed] = np.inf
    return Search(validation, test)


@given(st.integers(0, 1000), st.integers(2, 40), st.sampled_from([1, 2, 3, 7]))
def test_the_expected_rank_is_that_of_searches_by_hand(seed: int, size: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    search = made_up(generator, size)
    ranks = search.ranks(search.test)
    chosen = generator.integers(0, size, (4000, count))
    # Of trials that validate alike, such as two that broke off, a search keeps any.
    levels = np.unique(search.validation, return_inverse=True)[1]
    keys = levels + generator.random((4000, size))
    keys = np.take_along_axis(keys, chosen, 1)
    best = np.take_along_axis(chosen, keys.argmin(1)[:, None], 1)[:, 0]
    error = ranks[best].std() / 4000**0.5
    assert (
        abs(ranks[best].mean() - (search.probabilities(np.array([count])) @ ranks)[0])
        < 6 * error + 1e-9
    )


@given(st.integers(0, 1000), st.integers(2, 64))
def test_one_trial_has_the_mean_rank(seed: int, size: int) -> None:
    search = made_up(np.random.default_rng(seed), size)
    assert search.probabilities(np.ones(1))[0] @ search.ranks(search.test) == pytest.approx(0.5)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_units_do_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    search, scores = made_up(generator, 30), np.exp(generator.normal(size=8))
    other = Search(np.log(search.validation), np.log(search.test))
    assert worth(other, np.log(scores)) == worth(search, scores)


def test_the_null_method_is_worth_one_trial() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(12):
        search = made_up(generator, 64)
        found += [worth(search, made_up(generator, 8).test) for _ in range(6)]
    covered = np.mean([one.low <= 1.0 <= one.high for one in found])
    assert covered > 0.85  # 0.953 of 300 was measured
    assert np.exp(np.log([one.value for one in found]).mean()) == pytest.approx(1.0, abs=0.2)


def test_a_search_is_worth_its_own_number_of_trials() -> None:
    generator = np.random.default_rng(1)
    search = made_up(generator, 64)
    pool = made_up(generator, 4096)
    chosen = generator.integers(0, 4096, (400, 8))
    best = np.take_along_axis(chosen, pool.validation[chosen].argmin(1)[:, None], 1)[:, 0]
    assert worth(search, pool.test[best]).value == pytest.approx(8.0, rel=0.4)


def test_the_scale_ends_with_the_search_and_at_the_smallest_worth() -> None:
    search = made_up(np.random.default_rng(2), 32)
    assert worth(search, [search.test.min() / 2] * 8) == Worth(*3 * [pytest.approx(32.0)])
    without_failures = Search(np.arange(32.0), np.arange(32.0))
    assert worth(without_failures, [np.inf] * 8) == Worth(*3 * [pytest.approx(SMALLEST)])


def test_one_failed_run_of_eight_bounds_the_worth_at_seven() -> None:
    search = Search(np.arange(4096.0), np.arange(4096.0))
    assert search.trials_for(1 / 8) == pytest.approx(7.0, abs=0.05)


def test_of_a_plateau_the_fewest_trials_count() -> None:
    search = Search(np.zeros(8), np.arange(8.0))  # validation tells nothing
    assert search.trials_for(0.5) == pytest.approx(SMALLEST)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5]))
def test_the_median_of_a_search_is_that_of_searches_by_hand(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    search = Search(generator.permutation(9.0 * np.arange(9)), generator.normal(size=9))
    chosen = generator.integers(0, 9, (20_001, count))
    best = np.take_along_axis(chosen, search.validation[chosen].argmin(1)[:, None], 1)[:, 0]
    lower, upper = np.quantile(search.test[best], [0.47, 0.53], method="nearest")
    assert lower <= search.median_scores(np.array([count]))[0] <= upper

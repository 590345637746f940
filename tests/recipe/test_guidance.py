"""Guidance from similarity; seeds and strengths from names."""

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgid_transforms.errors import RecipeError
from sgid_transforms.recipe.guidance import (
    SimilarityGuidance,
    guidance_scale,
    rank_similarities,
    variant_seed,
    variant_strength,
)

SCALE = st.floats(0, 100)
UNIT = st.floats(0, 1)
SEED = 6358045999591277390
STRENGTH = 0.2405218970497895

BOUNDS = st.tuples(SCALE, SCALE).map(sorted)
NAME = st.tuples(st.text(max_size=8), st.text(max_size=8), st.integers(0, 9), st.integers(0, 2**63 - 1))


class TestSimilarityGuidance:
    def test_is_linear_in_the_rank(self) -> None:
        policy = SimilarityGuidance(2, 6)
        assert [policy.scale(rank) for rank in (0.0, 0.25, 0.5, 1.0)] == [2.0, 3.0, 4.0, 6.0]
        reverse = SimilarityGuidance(2, 6, reverse=True)
        assert [reverse.scale(rank) for rank in (0.0, 0.25, 0.5, 1.0)] == [6.0, 5.0, 4.0, 2.0]

    @given(BOUNDS, UNIT, UNIT)
    def test_is_monotonic_and_stays_within_its_bounds(self, bounds: list[float], one: float, two: float) -> None:
        low, high = bounds
        one, two = sorted((one, two))
        rising, falling = SimilarityGuidance(low, high), SimilarityGuidance(low, high, reverse=True)
        assert low <= rising.scale(one) <= rising.scale(two) <= high
        assert high >= falling.scale(one) >= falling.scale(two) >= low
        assert rising.scale(0.0) == low
        assert falling.scale(0.0) == high
        assert math.isclose(rising.scale(1.0), high)
        assert math.isclose(falling.scale(1.0), low, abs_tol=1e-12)

    def test_rounding_does_not_lead_out_of_the_bounds(self) -> None:
        """0.3 + (0.9 - 0.3) is above 0.9, and 0.4 - (0.4 - 0.1) below 0.1."""
        assert SimilarityGuidance(0.3, 0.9).scale(1.0) == 0.9
        assert SimilarityGuidance(0.1, 0.4, reverse=True).scale(1.0) == 0.1

    @pytest.mark.parametrize("rank", [-0.01, 1.01, float("nan")])
    def test_refuses_what_is_not_a_rank(self, rank: float) -> None:
        with pytest.raises(RecipeError, match=r"rank .* is outside \[0, 1\]"):
            SimilarityGuidance(1, 2).scale(rank)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((5, 4), "guidance.low 5.0 is above guidance.high 4.0"),
            ((-1, 4), "guidance.low -1.0 is outside"),
            ((1, float("inf")), "guidance.high inf is outside"),
            (("1", 2), "guidance.low is '1'; it must be a number"),
            ((1, 2, "yes"), "guidance.reverse is 'yes'; it must be true or false"),
        ],
    )
    def test_refuses_wrong_bounds(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            SimilarityGuidance(*arguments)

    def test_unknown_rank_is_the_middle(self) -> None:
        assert guidance_scale(SimilarityGuidance(2, 6), None) == 4.0
        assert guidance_scale(SimilarityGuidance(2, 6), 1.0) == 6.0
        assert guidance_scale(7.5, None) == guidance_scale(7.5, 0.1) == 7.5


class TestRanks:
    def test_spread_over_the_unit_interval(self) -> None:
        assert rank_similarities([0.3, 0.1, 0.2]) == [1.0, 0.0, 0.5]

    def test_ties_share_their_mean(self) -> None:
        assert rank_similarities([0.1, 0.2, 0.2, 0.9]) == [0.0, 0.5, 0.5, 1.0]
        assert rank_similarities([0.4] * 3) == [0.5] * 3

    def test_few_and_unknown_values(self) -> None:
        assert rank_similarities([]) == []
        assert rank_similarities([0.7]) == [0.5]
        assert rank_similarities([None, 0.7, float("nan"), 0.1]) == [None, 1.0, None, 0.0]

    @given(st.lists(st.none() | st.sampled_from([0.0, 0.1, 0.1000001, 0.5, 1.0]) | st.floats(-1, 1), max_size=40))
    def test_keeps_the_order_and_treats_equals_alike(self, values: list[float | None]) -> None:
        ranks = rank_similarities(values)
        assert [rank is None for rank in ranks] == [value is None for value in values]
        known = [(v, r) for v, r in zip(values, ranks, strict=True) if v is not None and r is not None]
        for (value, rank), (other_value, other_rank) in itertools.combinations(known, 2):
            assert (value < other_value) == (rank < other_rank)
            assert (value == other_value) == (rank == other_rank)
        if known:
            assert math.isclose(sum(rank for _, rank in known) / len(known), 0.5)
            assert all(0 <= rank <= 1 for _, rank in known)

    @given(st.lists(st.floats(-1, 1), max_size=20), st.randoms())
    def test_does_not_depend_on_the_order_of_the_data_set(self, values: list[float], random: Any) -> None:
        by_value = dict(zip(values, rank_similarities(values), strict=True))
        shuffled = values.copy()
        random.shuffle(shuffled)
        assert dict(zip(shuffled, rank_similarities(shuffled), strict=True)) == by_value


class TestVariantNames:
    def test_values_are_frozen(self) -> None:
        """A change here changes every variant of every user: raise FINGERPRINT_VERSION with it."""
        assert variant_seed("01ab", "cd" * 16, 2, 3) == SEED
        assert variant_strength((0.2, 0.8), "01ab", "cd" * 16, 2, 3) == STRENGTH

    def test_are_the_same_in_another_process(self) -> None:
        code = "from sgid_transforms.recipe.guidance import variant_seed; print(variant_seed('01ab', 'cd' * 16, 2, 3))"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
        assert int(output.stdout) == SEED

    @given(NAME)
    def test_seed_is_one_that_torch_takes(self, name: tuple[str, str, int, int]) -> None:
        seed = variant_seed(*name)
        assert 0 <= seed < 2**63
        assert torch.Generator().manual_seed(seed).initial_seed() == seed

    @given(NAME, NAME)
    def test_seeds_differ_with_every_part_of_the_name(self, one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
        assert (variant_seed(*one) == variant_seed(*two)) == (one == two)

    def test_parts_do_not_run_into_each_other(self) -> None:
        names = [("ab", "c", 1, 23), ("a", "bc", 1, 23), ("ab", "c", 12, 3), ("ab\0", "c", 1, 23), ("ab", "\0c", 1, 23)]
        assert len({variant_seed(*name) for name in names}) == len(names)
        assert len({variant_strength((0.0, 1.0), *name) for name in names}) == len(names)

    @given(st.tuples(UNIT, UNIT).map(sorted), NAME)
    def test_strength_stays_in_its_range(self, bounds: list[float], name: tuple[Any, ...]) -> None:
        low, high = bounds
        assert low <= variant_strength((low, high), *name) <= high

    def test_a_single_strength_is_kept(self) -> None:
        assert variant_strength(0.4, "f", "k", 0, 0) == variant_strength(0.4, "f", "k", 9, 9) == 0.4

    def test_strength_is_uniform(self) -> None:
        """Kolmogorov-Smirnov distance of 2,000 draws, always the same ones; 0.1 % level: 1.95 / sqrt(n)."""
        count = 2000
        draws = sorted((variant_strength((0.2, 0.8), "f", str(index), 0, 0) - 0.2) / 0.6 for index in range(count))
        distance = max(max(draw - index / count, (index + 1) / count - draw) for index, draw in enumerate(draws))
        assert distance < 1.95 / math.sqrt(count)

    def test_strength_and_seed_are_independent(self) -> None:
        pairs = torch.tensor(
            [
                (variant_strength((0.0, 1.0), "f", "k", index, 0), variant_seed("f", "k", index, 0) / 2**63)
                for index in range(2000)
            ]
        )
        assert abs(torch.corrcoef(pairs.T)[0, 1].item()) < 0.07  # 3 standard errors

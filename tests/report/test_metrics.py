import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sgid_transforms.report import metrics

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@given(n=SIZES, d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_vendi_is_1_for_equal_rows_and_between_1_and_their_number_for_any(n, d, seed):
    x = rows(n, d, seed)
    assert metrics.vendi_score(x[:1].expand(n, d)) == pytest.approx(1)
    assert 1 - 1e-9 <= metrics.vendi_score(x) <= min(n, d) + 1e-9
    assert metrics.vendi_score(torch.cat([x, x])) == pytest.approx(metrics.vendi_score(x))  # copies add nothing
    assert metrics.vendi_score(7 * x.flip(0)) == pytest.approx(metrics.vendi_score(x))  # nor do order and length


@given(n=SIZES, extra=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_vendi_and_pairwise_distance_of_orthogonal_rows(n, extra):
    x = torch.eye(n, n + extra)
    assert metrics.vendi_score(x) == pytest.approx(n)
    if n > 1:
        assert metrics.mean_pairwise_distance(x) == pytest.approx(1)


@given(n=st.integers(2, 12), d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_pairwise_distance_is_the_mean_over_all_pairs(n, d, seed):
    x = F.normalize(rows(n, d, seed).double(), dim=1)
    pairs = [1 - float(x[i] @ x[j]) for i in range(n) for j in range(i)]
    assert metrics.mean_pairwise_distance(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
    assert metrics.mean_pairwise_distance(x[:1].expand(n, d)) == pytest.approx(0, abs=1e-9)


def test_pairwise_distance_of_opposite_rows_is_2():
    assert metrics.mean_pairwise_distance(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(2)


@given(n=SIZES, m=SIZES, d=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_cmmd_is_a_symmetric_distance_that_is_0_for_one_set_in_any_order(n, m, d, seed):
    x, y = rows(n, d, seed), rows(m, d, seed + 1)
    assert metrics.cmmd(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert metrics.cmmd(x, torch.cat([x, x])) == pytest.approx(0, abs=1e-6)
    assert metrics.cmmd(x, y) == pytest.approx(metrics.cmmd(y, x), abs=1e-6)
    assert metrics.cmmd(x, y) >= 0


def test_cmmd_follows_the_papers_formula_and_grows_with_the_shift():
    x, y = F.normalize(rows(30, 6, 0).double(), dim=1), F.normalize(rows(20, 6, 1).double() + 1, dim=1)
    kernel = [torch.exp(-torch.cdist(a, b).square() / (2 * 10.0**2)).mean() for a, b in ((x, x), (y, y), (x, y))]
    assert metrics.cmmd(x, y) == pytest.approx(1000 * float(kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-6)
    shifts = [metrics.cmmd(rows(200, 6, 2), rows(200, 6, 3) + shift) for shift in (0.0, 0.5, 1.0)]
    assert shifts == sorted(shifts)
    assert shifts[2] > 10 * shifts[0]


def test_large_sets_are_summed_in_blocks(monkeypatch):
    x, y = rows(50, 4, 0), rows(33, 4, 1)
    whole = metrics.cmmd(x, y)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert metrics.cmmd(x, y) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.vendi_score(torch.zeros(0, 4)), r"shape \(0, 4\)"),
        (lambda: metrics.vendi_score(torch.zeros(4)), r"shape \(4,\)"),
        (lambda: metrics.cmmd(torch.ones(2, 3), torch.ones(2, 4)), "3 and 4 numbers"),
        (lambda: metrics.mean_pairwise_distance(torch.ones(1, 4)), "at least 2 images, got 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Means, intervals and claims of the accuracy benchmark, against tables and by hand."""

import math

import pytest
from classification.intervals import mean_interval, paired_difference, t_cdf, t_quantile
from classification.summary import best_classic, by_n, markdown, plot, views_markdown

# 97.5 % quantiles of Student's t: any statistics textbook's table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(TABLE[freedom], abs=6e-4)
    assert t_cdf(TABLE[freedom], freedom) == pytest.approx(0.975, abs=2e-5)


def test_the_distribution_is_symmetric_and_centred():
    for freedom in (1, 2, 3, 7, 8):
        assert t_cdf(0.0, freedom) == 0.5
        assert t_cdf(-1.3, freedom) + t_cdf(1.3, freedom) == pytest.approx(1.0, abs=1e-12)


def test_a_mean_has_the_margin_of_its_seeds():
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.margin == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)  # deviation 1
    assert found.low == pytest.approx(2.0 - found.margin)
    assert mean_interval([5.0, 5.0]).margin == 0.0
    assert math.isinf(mean_interval([5.0]).margin)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_differences_are_paired_by_the_seeds_that_both_have():
    # Far apart between seeds, equally far within each: paired, there is no doubt about the difference.
    found = paired_difference({0: 51.0, 1: 61.0, 2: 99.0}, {0: 50.0, 1: 60.0, 7: 0.0})
    assert found is not None
    assert (found.mean, found.margin, found.n) == (1.0, 0.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def rows_of(table, n="50"):
    return [
        {"n": n, "method": method, "seed": str(seed), "accuracy": str(value)}
        for method, values in table.items()
        for seed, value in enumerate(values)
    ]


def test_the_best_classic_method_is_chosen_on_the_seeds_that_all_have():
    rows = rows_of({"none": [50, 50], "mixup": [52, 52], "cutmix": [40, 40, 99], "sgid": [90, 90]})
    assert best_classic(by_n(rows)["50"]) == "mixup"
    assert best_classic(by_n(rows_of({"sgid": [1.0]}))["50"]) is None


def test_the_summary_says_what_holds_and_what_does_not():
    table = {"none": [50, 51, 52], "mixup": [54, 55, 56], "sgid": [56.0, 57.1, 58.2], "sgid+mixup": [56.0, 57.0, 58.2]}
    text = markdown(rows_of(table) + rows_of({"none": [60.0]}, n="100"))
    assert "## 50 images per class" in text
    assert "## 100 images per class" in text
    assert "| **mixup** (best classic) | 3 | 55.00 ± 2.48 |  |" in text
    assert "| sgid | 3 | 57.10 ± 2.73 | +2.10 ± 0.25 |" in text
    assert "| none | 1 | 60.00 |" in text.replace("**none** (best classic)", "none")
    assert "`sgid` minus `mixup`: +2.10 ± 0.25 points over 3 seeds; at least 1.72 with the interval above 0: yes" in text
    assert "`sgid+mixup` minus `sgid`: -0.03 ± 0.14 points over 3 seeds; at least 0 with the interval above 0: no" in text


def test_ablations_are_compared_with_what_they_change():
    text = markdown(rows_of({"sgid:p=1": [50, 51, 52], "sgid": [51.5, 52.5, 53.5]}))
    assert "| method | seeds | accuracy, % | minus sgid, points |" in text
    assert "| sgid:p=1 | 3 | 51.00 ± 2.48 | -1.50 ± 0.00 |" in text
    assert "| sgid | 3 | 52.50 ± 2.48 |  |" in text


def test_a_gain_below_the_papers_is_no_success():
    text = markdown(rows_of({"none": [50, 51, 52], "sgid": [51.5, 52.5, 53.5]}))
    assert "`sgid` minus `none`: +1.50 ± 0.00 points over 3 seeds; at least 1.72 with the interval above 0: no" in text


def test_views_are_summed_up_over_seeds_relative_to_their_originals():
    row = {"n": "50", "method": "sgid", "distance_randaugment": "0.1", "agreement_originals": "0.8"}
    seeds = [("0.72", "0.2"), ("0.76", "0.2"), ("0.80", "0.2")]
    rows = [row | {"agreement_variants": kept, "distance_variants": distance} for kept, distance in seeds]
    blind = row | {"n": "100", "agreement_originals": "0.0", "agreement_variants": "0.5", "distance_variants": "0.3"}
    text = views_markdown([*rows, blind])
    assert "| 50 | sgid | 3 | 95.00 ± 12.42 % | 0.200 ± 0.000 | 0.100 ± 0.000 |" in text
    assert "| 100 | sgid | 1 | nan % | 0.300 | 0.100 |" in text  # the judge knows none of the originals: there is no ratio


def test_the_plot_shows_every_method_of_every_n(tmp_path):
    from PIL import Image

    plot(rows_of({"none": [50, 51], "sgid": [60, 61]}) + rows_of({"none": [70]}, n="100"), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 900  # two panels
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20

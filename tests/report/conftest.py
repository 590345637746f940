"""One report over small stores, for all tests that look at it."""

import pytest


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """Path of a report over small stores, and its figures."""
    from report_fakes import ColourScorer, make_stores
    from sgid_transforms.report import write_report

    root = tmp_path_factory.mktemp("report")
    captions, variants, recipe = make_stores(root, caption="<script>alert(1)</script> a {} 'field' & \"sky\"")
    facts = write_report(
        root / "report.html", captions, variants, recipe, originals=root / "data", scorer=ColourScorer(), title="<b>Test</b>"
    )
    return root / "report.html", facts

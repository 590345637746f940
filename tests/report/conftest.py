"""Puts this folder on the path, so that its tests find the shared fakes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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

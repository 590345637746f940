"""Processes that tests start find the shared fakes in ``helpers`` as well."""

import os
from pathlib import Path

import pytest

_HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HELPERS, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless browser with an empty profile; modules that use it need ``browser.needs_chromium``."""
    from browser import open_chromium

    with open_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver

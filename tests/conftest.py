"""Processes that tests start find the shared fakes in ``helpers`` as well."""

import os
from pathlib import Path

_HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HELPERS, os.environ.get("PYTHONPATH")]))

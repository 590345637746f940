import re

import pytest
from example_run import run

from image_folders import plain_folder
from sgid_transforms.variants.store import VariantStore

pytest.importorskip("lightning", reason="lightning is not installed")


def test_the_trainer_gets_variants_and_the_schedule_switches_them_off_at_the_end(tmp_path):
    plain_folder(tmp_path / "data", 6)
    done = run("lightning_module.py", tmp_path, "--data", "data", "-p", 1, "--epochs", 2, "--batch-size", 4, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    epochs = re.findall(r"epoch \d: SGID: (\d+) seen, (\d+) gated", done.stdout)
    assert [(int(seen) > 0, int(gated) > 0) for seen, gated in epochs] == [(True, True), (True, False)], done.stdout
    assert re.search(r"validation accuracy \d+\.\d%", done.stdout)
    assert VariantStore(tmp_path / "variants", readonly=True).count() > 0

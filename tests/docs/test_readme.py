"""The README's example, run as it stands there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import sgid_transforms

README = Path(__file__).parents[2] / "README.md"


def test_the_usage_example_runs_as_printed(tmp_path):
    samples = Path(sgid_transforms.__file__).parent / "assets" / "samples"
    for name in ("frog", "ship"):
        shutil.copytree(samples / name, tmp_path / "train" / name, ignore=lambda _, names: sorted(names)[4:])
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    # Without a seed, one run in 256 replaces none of the eight images.
    body = "\n".join("    " + line for line in ["import torch", "torch.manual_seed(0)", *code.splitlines()])
    script = tmp_path / "example.py"
    # The guard is what a script with worker processes needs on platforms that spawn them.
    script.write_text(f"def main():\n{body}\n    return sgid\n\nif __name__ == '__main__':\n    print(main().stats())\n")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "variants").rglob("*.*"))) > 0
    assert "seen=8" in done.stdout

"""The code of docs/dataloader.md, run from top to bottom as one script, as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import sgid_transforms

PAGE = Path(__file__).parents[2] / "docs" / "dataloader.md"


def test_the_examples_run_as_printed(tmp_path: Path) -> None:
    samples = Path(sgid_transforms.__file__).parent / "assets" / "samples"
    for name in ("frog", "ship"):
        shutil.copytree(samples / name, tmp_path / "train" / name, ignore=lambda _, names: sorted(names)[8:])
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    body = "\n".join("    " + line for block in blocks for line in block.splitlines())
    script = tmp_path / "page.py"
    # The guard is what a script with worker processes needs on platforms that spawn them.
    script.write_text(f"def main():\n{body}\n    return sgid, reader\n\nif __name__ == '__main__':\n    print(*main())\n")
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    summaries = [line for line in done.stdout.splitlines() if line.startswith("SGID: 16 seen")]
    assert len(summaries) == 4  # one of the first loop, three of the epochs with a schedule
    assert " 0 gated" in summaries[1]
    assert " 0 gated" not in summaries[3]
    assert " 0 generated" in summaries[3]

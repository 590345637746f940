"""Scripts in `benchmarks/` import one another by bare names, here and in the processes that they start."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def write_split(path: Path, labels: list[int], seed: int) -> None:
    """A parquet split as `tools/train_tiny/data.py` reads it, of smooth random pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(seed)
    rows = []
    for number in range(len(labels)):
        file = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    pq.write_table(pa.table({"image": rows, "label": labels, "subname": ["thing"] * len(labels)}), path)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images to learn from and three to measure on, of each of three of CIFAR-10's classes."""
    folder = tmp_path_factory.mktemp("task")
    write_split(folder / "fewshot.parquet", [0, 1, 2] * 4, 1)
    write_split(folder / "test.parquet", [0, 1, 2] * 3, 2)
    return folder

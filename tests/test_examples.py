"""The example of every public name runs as printed."""

import doctest
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import sgid_transforms

NAMES = [name for name in sgid_transforms.__all__ if name != "__version__"]
SAMPLES = Path(sgid_transforms.__file__).parent / "assets" / "samples"


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_as_printed(name, tmp_path, monkeypatch):
    """What examples leave out, docs/api.md says: the imports, and a folder ``train`` with one folder of images per class."""
    monkeypatch.chdir(tmp_path)
    for folder in sorted(SAMPLES.iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "train" / folder.name, ignore=lambda place, names: sorted(names)[3:])
    here = {"torch": torch, "v2": v2, "ImageFolder": ImageFolder, "DataLoader": DataLoader}
    here |= {name: getattr(sgid_transforms, name) for name in NAMES}
    [example] = doctest.DocTestFinder(recurse=False).find(here[name], name, globs=here)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=said.append).failed == 0, "".join(said)

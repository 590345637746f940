"""The script of the README's picture, with the bundled model."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "train_tiny" / "contact_sheet.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("contact_sheet_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_columns_of_originals_with_their_variants(tool, tmp_path, monkeypatch, capsys):
    out = tmp_path / "images" / "sheet.png"
    command = ["contact_sheet.py", "--out", out, "--rows", 3, "--strengths", 0.3, 0.5, "--cell", 32]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    tool.main()
    with Image.open(out) as sheet:
        assert sheet.size == (2 * (3 * 38 + 6) + 24, 20 + 2 * (32 + 6 + 20) + 6)
        assert sheet.getpixel((6 + 16, 20 + 6 + 20 + 16)) != (255, 255, 255)
    assert "pixels" in capsys.readouterr().out


def test_classes_come_in_turn(tool):
    folder = TOOL.parents[2] / "src" / "sgid_transforms" / "assets" / "samples"
    labels = [label for label, _ in tool.originals(folder, 16, 0)]
    assert labels == sorted(labels)
    assert len(set(labels)) == 10
    first, second = (tool.originals(folder, 10, skip) for skip in (0, 1))
    assert not any(a.equal(b) for (_, a), (_, b) in zip(first, second, strict=True))

"""What every user meets first: the import, the wheel and the public names."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_import_stays_light():
    heavy = "{'diffusers', 'transformers', 'accelerate'}"
    code = f"import sys, sgid_transforms; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_is_documented():
    import sgid_transforms

    assert len(sgid_transforms.__all__) == len(set(sgid_transforms.__all__))
    for name in sgid_transforms.__all__:
        value = getattr(sgid_transforms, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
    assert set(sgid_transforms.__all__) <= set(dir(sgid_transforms))


def test_the_wheel_carries_code_weights_samples_and_the_type_marker(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for wanted in (
        "py.typed",
        "transforms/augment.py",
        "assets/tiny/README.md",
        "assets/tiny/pipeline/unet/diffusion_pytorch_model.safetensors",
        "assets/tiny/clip/model.safetensors",
        "assets/tiny/captioner/model.safetensors",
    ):
        assert f"sgid_transforms/{wanted}" in names
    assert sum(name.startswith("sgid_transforms/assets/samples/") for name in names) == 200
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]

"""What every user meets first: the import, the wheel and the public names."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

OTHER_SYSTEM = """
import importlib, os, pkgutil, signal, socket, sys
from diffusers import StableDiffusionImg2ImgPipeline  # the libraries know on which system they are
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForConditionalGeneration, BlipProcessor, CLIPModel
sys.modules["fcntl"] = None  # what Windows does not have is gone
for name in ("getuid", "register_at_fork", "fork", "O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW"):
    delattr(os, name)
del socket.AF_UNIX, signal.SIGKILL
import sgid_transforms
for found in pkgutil.walk_packages(sgid_transforms.__path__, "sgid_transforms."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from torchvision.datasets import ImageFolder
from sgid_transforms import ServiceError, SGIDAugment
sgid = SGIDAugment(captions="c.sqlite", variants="v", p=1.0, variants_per_image=1)
data = ImageFolder(os.path.join(os.path.dirname(sgid_transforms.__file__), "assets", "samples"))
data.samples = data.samples[:2]
sgid.prepare(data, progress=False)
sgid(data[0][0])
print(sgid.stats().generated)
try:
    sgid.serve(device="cpu")
except ServiceError as error:
    print(error)
"""


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


def test_on_a_system_without_unix_sockets_everything_but_the_service_works(tmp_path):
    done = subprocess.run([sys.executable, "-c", OTHER_SYSTEM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    generated, sentence = done.stdout.splitlines()[-2:]
    assert generated == "1"
    assert sentence.startswith("this system's Python has no Unix sockets, which a service needs; make the variants before")


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

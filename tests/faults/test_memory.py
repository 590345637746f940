"""Photos of 24 megapixels, and pictures of extreme shapes: the peak of a process of its own, above what its models take."""

import os
import subprocess
import sys

import pytest

HEAD = """
import resource, sys, torch
from pathlib import Path
from PIL import Image
from sgid_transforms import CaptionRecord, CaptionStore, Recipe, SGIDAugment, VariantStore, image_key
from sgid_transforms.building.builder import BuilderSpec
from sgid_transforms.building.wanted import Status, Wanted
from sgid_transforms.models.clip import CLIPScorer
from sgid_transforms.recipe import Filters

def photo(number=0, width=6000, height=4000):
    return torch.arange(width, dtype=torch.uint8).add(number).expand(3, height, width).contiguous()

def thin(number):
    return photo(number, 16383, 4)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def builder(folder, filters=Filters(), **options):
    recipe = Recipe(caption_from="own", filters=filters)
    captions = CaptionStore(f"{folder}/captions.sqlite")
    for number in range(20):
        captions.put(CaptionRecord(f"{number:032x}", "a caption", label="frog", rank=0.5, scorer="tiny"))
    spec = BuilderSpec(recipe, VariantStore(f"{folder}/variants"), captions, labels=["frog", "cat"], scorer="tiny", **options)
    made = spec.build()
    make = lambda *numbers, image=photo, first=0: [
        one.status for one in made([Wanted(f"{n + first:032x}", 0, image(n), "frog") for n in numbers])
    ]
    make(19, image=lambda n: photo(n, 64, 64))  # loads what is loaded at first use
    return make

folder = sys.argv[1]
"""

CASES = {
    "one photo": ("make = builder(folder)", "assert make(0) == [Status.STORED]", 500),
    "a batch of photos": ("make = builder(folder)", "assert make(*range(6)) == [Status.STORED] * 6", 1200),
    "a label check and a similarity": (
        "make = builder(folder, Filters('argmax', min_image_similarity=-1.0))",
        "assert make(0) != [Status.FAILED]",
        600,
    ),
    "captions on demand": ("make = builder(folder, captioner='tiny')", "assert make(0, first=100) == [Status.STORED]", 500),
    "16,383 x 4 pixels": (
        "make = builder(folder)",
        "assert make(0, image=lambda n: photo(n, 16383, 4)) == [Status.STORED]",
        200,
    ),
    "CLIP and 4 x 16,383 pixels": (
        "scorer = CLIPScorer('tiny'); scorer.image_features([photo(0, 32, 32)])",
        "assert scorer.image_features([photo(0, 4, 16383)] * 8).isfinite().all()",
        200,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_picture_takes_is_bounded(case, tmp_path):
    """A photo took 930 MB in the service and 11 times its pixels in captioners; CLIP resized long pictures before its crop."""
    before, work, most = CASES[case]
    script = f"{HEAD}\n{before}\nbefore = peak()\n{work}\nprint(peak() - before)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < most


def test_a_folder_of_photos_is_generated_below_1500_mb(tmp_path):
    script = """
import sys
from pathlib import Path
from PIL import Image
for number in range(6):
    path = Path(sys.argv[1], "data", "cat", f"{number}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((6000, 4000)).rotate(number).convert("RGB").save(path)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    run = """
import resource, subprocess, sys
arguments = [sys.executable, "-m", "sgid_transforms.cli", "generate", "data", "-k", "1"]
code = subprocess.run(arguments, cwd=sys.argv[1], stdout=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", run, str(tmp_path)], capture_output=True, text=True, timeout=280)
    code, megabytes = map(int, done.stdout.split())
    assert code == 0, done.stderr[-2000:]
    assert megabytes < 1500


def test_whatever_clients_send_a_service_stays_below_one_and_a_half_times_its_idle_size(tmp_path):
    """Eight photos of 24 megapixels took 1.52 times as much, one of 64 megapixels 2.3 times."""
    script = (
        HEAD
        + """
import re, time
from concurrent.futures import ThreadPoolExecutor
from sgid_transforms.service.client import ServiceClient

captions = CaptionStore(f"{folder}/captions.sqlite")
for number in range(21):
    captions.put(CaptionRecord(f"{number:032x}", "a caption", label="cat"))
def wish(number, **size):
    return Wanted(f"{number:032x}", 0, photo(number, **size), "cat")
sgid = SGIDAugment(recipe=Recipe(caption_from="own"), captions=captions, variants=f"{folder}/variants")
with sgid.serve(device="cpu") as service, ThreadPoolExecutor(8) as pool:
    def megabytes(what):
        return int(re.search(what + r":\\s+(\\d+)", Path(f"/proc/{service.pid}/status").read_text())[1]) / 1024
    def ask(number):
        return service.client.generate([wish(number)])[0].status
    def queue(numbers):
        client = ServiceClient(service.client.address)
        for number in numbers:
            one = wish(number)
            while client.enqueue([one]):  # dropped while the last one is under way, or the queue is full
                time.sleep(0.05)
    service.client.generate([wish(20, width=64, height=64)])
    idle = megabytes("VmRSS")
    queue([0])
    queued = [pool.submit(queue, range(5 * lane + 1, 5 * lane + 5)) for lane in range(2)]
    assert set(pool.map(ask, range(10, 14))) == {Status.STORED}
    for one in queued:
        one.result()
    assert service.client.stats()["images"] > 5  # some that nobody waited for were among them
    print(megabytes("VmHWM") / idle)
"""
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1.5

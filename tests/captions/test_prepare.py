"""Captioning a data set: what is looked past, what is refused, what is kept."""

import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment_fakes import CLASSES, FakeCaptioner, FakeScorer, image_folder, picture, pil_picture
from sgid_transforms.building.address import Address
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ModelLoadError, StoreError
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe import Recipe
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.transforms.dataset import SGIDDataset
from sgid_transforms.variants import Provenance, VariantStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data")


@pytest.fixture
def sgid(tmp_path: Path) -> SGIDAugment:
    return SGIDAugment(
        captions=tmp_path / "captions.sqlite",
        variants=tmp_path / "variants",
        captioner=FakeCaptioner(),
        scorer=FakeScorer(),
    )


class Pictures(Dataset):
    """Pairs of a picture and a class number."""

    def __init__(self, *numbers: int, label: Any = 1) -> None:
        self.numbers, self.label = numbers, label

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return pil_picture(self.numbers[index]), self.label


def test_records_hold_all_that_is_known(sgid: SGIDAugment, folder: Path) -> None:
    report = sgid.prepare(ImageFolder(folder), progress=False)
    assert (report.images, report.captioned, report.scored, report.known, report.failed) == (12, 12, 12, 0, ())
    record = sgid.captions.get(image_key(picture(5)))
    assert record.caption == f"brightness {int(picture(5).float().mean())}"
    assert (record.label, record.captioner, record.source) == ("dog", "fake", "model")
    assert record.path == str(folder / "dog" / "005.png")
    assert record.similarity == pytest.approx(len(f"a photo of a dog, {record.caption}") / 100)
    assert all(0 <= one.rank <= 1 for one in sgid.captions)


def test_second_call_does_nothing_and_new_images_only_are_captioned(sgid: SGIDAugment, folder: Path) -> None:
    captioner = sgid.captioner
    sgid.prepare(Subset(ImageFolder(folder), range(7)), progress=False, batch_size=2)
    assert captioner.seen == 7
    assert sgid.prepare(ImageFolder(folder), progress=False).captioned == 5
    report = sgid.prepare(ImageFolder(folder), progress=False)
    assert (report.known, captioner.seen) == (12, 12)


def test_interrupted_run_keeps_what_it_did(sgid: SGIDAugment, folder: Path) -> None:
    class Interrupting(FakeCaptioner):
        def caption(self, images: Any) -> list[str]:
            if self.seen >= 6:
                raise KeyboardInterrupt
            return super().caption(images)

    captioner, sgid.captioner = sgid.captioner, Interrupting()
    with pytest.raises(KeyboardInterrupt):
        sgid.prepare(ImageFolder(folder), batch_size=3, progress=False)
    assert len(sgid.captions) == 6
    sgid.captioner = captioner
    assert sgid.prepare(ImageFolder(folder), batch_size=3, progress=False).captioned == 6


def test_human_captions_and_missing_scores(sgid: SGIDAugment, folder: Path) -> None:
    key = image_key(picture(0))
    sgid.captions.put(CaptionRecord(key, "written by hand", captioner="me", source="human"))
    report = sgid.prepare(ImageFolder(folder), progress=False)
    assert (report.captioned, report.scored) == (11, 12)
    record = sgid.captions.get(key)
    assert (record.caption, record.source, record.captioner, record.label) == ("written by hand", "human", "me", "cat")
    assert record.similarity == pytest.approx(len("a photo of a cat, written by hand") / 100)


def test_equal_images_are_captioned_once(sgid: SGIDAugment) -> None:
    report = sgid.prepare(Pictures(1, 2, 1, 1, label="cat"), progress=False)
    assert (report.images, report.captioned) == (4, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data, sgid: data,
        lambda data, sgid: Subset(data, range(12)),
        lambda data, sgid: random_split(data, [12, 0])[0],
        lambda data, sgid: ConcatDataset([Subset(data, range(4)), ConcatDataset([Subset(data, range(4, 12))])]),
        lambda data, sgid: SGIDDataset(data, sgid) if data.transform is None else data,
    ],
)
@pytest.mark.parametrize("chain", ["none", "after", "around", "joint"])
def test_transforms_that_are_set_are_looked_past(sgid: SGIDAugment, folder: Path, wrap: Any, chain: str) -> None:
    data = ImageFolder(folder)
    after = [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize([9.0], [0.1])]
    if chain == "after":
        data = ImageFolder(folder, transform=v2.Compose([sgid, *after]), target_transform=str)
    elif chain == "around":
        data = ImageFolder(folder, transform=v2.Compose([v2.Compose([v2.RandomRotation(9)]), *after]))
    elif chain == "joint":
        data.transforms = v2.Compose([v2.Identity(), v2.Compose([sgid]), *after])
    before = dict(vars(data))
    sgid.prepare(wrap(data, sgid), progress=False)
    assert vars(data) == before
    labels = {image_key(picture(n)): CLASSES[n // 4] for n in range(12)}
    assert {record.key: record.label for record in sgid.captions} == labels


def test_what_stands_before_the_transform_is_applied(sgid: SGIDAugment, folder: Path) -> None:
    resize = v2.Resize(8)
    data = ImageFolder(folder, transform=v2.Compose([v2.Compose([resize, sgid]), v2.ToImage()]))
    sgid.prepare(data, progress=False)
    keys = {record.key for record in sgid.captions}
    assert keys == {image_key(resize(pil_picture(n))) for n in range(12)}
    sgid.on_miss = "original"
    sgid.p = 1.0
    data[0]
    assert sgid.captions.missing([image_key(resize(pil_picture(0)))]) == []


def test_misspelled_class_of_p_is_told(sgid: SGIDAugment, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    sgid.p = {"cat": 0.9, "forg": 0.5, "whale": 0.1, "*": 0.0}
    sgid.prepare(ImageFolder(folder), progress=False)
    assert [record.getMessage() for record in caplog.records] == [
        "p names the class 'forg', of which no image was prepared; did you mean 'frog'?",
        "p names the class 'whale', of which no image was prepared",
    ]


def test_random_images_are_refused(sgid: SGIDAugment, folder: Path) -> None:
    data = ImageFolder(folder, transform=v2.Compose([v2.ColorJitter(0.9), sgid]))
    with pytest.raises(ValueError, match="another image each time item 0 is read"):
        sgid.prepare(data, progress=False)


def test_a_wait_for_another_process_is_told_and_has_a_deadline(
    sgid: SGIDAugment, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sgid_transforms.files.QUIET_SECONDS", 0.1)
    code = "import sys; from sgid_transforms.files import try_lock; try_lock(sys.argv[1]); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, f"{sgid.captions.path}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(StoreError, match=r"waited for another process that writes captions into .* for timeout=0.5 s"):
            sgid.prepare(ImageFolder(folder), progress=False, timeout=0.5)
        assert "nothing has happened for" in caplog.text
        other.kill()
        assert sgid.prepare(ImageFolder(folder), progress=False, timeout=60).captioned == 12


def test_unreadable_images_are_listed(sgid: SGIDAugment, folder: Path) -> None:
    (folder / "dog" / "005.png").write_bytes(b"no image")
    (folder / "frog" / "011.png").write_bytes((folder / "frog" / "010.png").read_bytes()[:500])
    report = sgid.prepare(ImageFolder(folder), progress=False)
    assert [index for index, _ in report.failed] == [5, 11]
    assert "UnidentifiedImageError" in report.failed[0][1]
    assert report.captioned == 10


def test_tensors_and_dicts(sgid: SGIDAugment) -> None:
    items = [{"img": picture(n), "label": "truck"} for n in range(3)] + [(picture(3).float() / 255, "ship", "more")]
    sgid.prepare(items, progress=False)
    assert [sgid.captions.get(image_key(picture(n))).label for n in range(4)] == ["truck"] * 3 + ["ship"]


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        ({"n02123045": "tabby cat"}, "n02123045", "tabby cat"),
        ({"n02123045": "tabby cat"}, "Egyptian_cat", "Egyptian cat"),
        ({"1": "one"}, 1, "one"),
        (["zero", "one"], 1, "one"),
    ],
)
def test_class_names(tmp_path: Path, sgid: SGIDAugment, names: Any, label: Any, expected: str) -> None:
    sgid.class_names = names
    sgid.prepare(Pictures(0, label=label), progress=False)
    assert next(iter(sgid.captions)).label == expected


def test_names_come_from_the_data_set_and_are_mapped(sgid: SGIDAugment) -> None:
    data = Pictures(0, label=1)
    data.classes = ["n01", "n02"]  # type: ignore[attr-defined]
    sgid.class_names = {"n02": "lorikeet"}
    sgid.prepare(data, progress=False)
    assert next(iter(sgid.captions)).label == "lorikeet"


def test_class_without_a_name_is_refused(sgid: SGIDAugment) -> None:
    with pytest.raises(ValueError, match="class 1 has no name; pass class_names="):
        sgid.prepare(Pictures(0), progress=False)


@pytest.mark.parametrize("data", [[3, 4], [("a", "b")], [{"x": 1}]])
def test_data_sets_without_images_are_refused(sgid: SGIDAugment, data: Any) -> None:
    with pytest.raises(TypeError, match="must be, or hold, a PIL image or an image tensor"):
        sgid.prepare(data, progress=False)


def test_iterable_data_sets_are_refused(sgid: SGIDAugment) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from ()

    with pytest.raises(TypeError, match="Stream is not a map-style data set"):
        sgid.prepare(Stream(), progress=False)


def test_empty_data_set(sgid: SGIDAugment) -> None:
    assert sgid.prepare([], progress=False).images == 0


def test_ranks_of_one_job_prepare_each_data_set_once(
    sgid: SGIDAugment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    reports = []
    data = ImageFolder(folder)
    threads = [threading.Thread(target=lambda: reports.append(sgid.prepare(data, progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.captioned for report in reports) == [0, 12]
    assert sgid.captioner.seen == 12
    other = image_folder(tmp_path / "other", size=24)  # as many images, but other ones
    assert sgid.prepare(ImageFolder(other), progress=False).captioned == 12


@pytest.mark.parametrize("parts", [[range(6), range(6, 12)], [range(0, 12, 2), range(1, 12, 2)], [range(8), range(4, 12)]])
def test_shards_and_folds_of_one_length_are_told_apart_in_a_job(
    sgid: SGIDAugment, folder: Path, monkeypatch: pytest.MonkeyPatch, parts: list[range]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = ImageFolder(folder)
    for part in parts:
        sgid.prepare(Subset(data, list(part)), progress=False)
    assert len(sgid.captions) == 12
    assert sgid.captioner.seen == 12


def test_other_settings_are_other_work_in_a_job(
    sgid: SGIDAugment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pictures under other class names, or another template, were once taken for done."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = ImageFolder(folder)
    sgid.prepare(data, progress=False)
    words = {name: f"{name} of some kind" for name in data.classes}
    renamed = SGIDAugment(captions=sgid.captions, captioner=FakeCaptioner(), scorer=FakeScorer(), class_names=words)
    renamed.prepare(data, progress=False)
    assert {record.label for record in sgid.captions} == set(words.values())
    recipe = Recipe(prompt="{label}: {caption}")
    other = SGIDAugment(
        recipe=recipe, captions=sgid.captions, captioner=FakeCaptioner(), scorer=FakeScorer(), class_names=words
    )
    assert other.prepare(data, progress=False).scored == 12


@pytest.mark.parametrize("size", [(17_000, 16), (16, 17_000), (8_200, 8_200)])
def test_one_limit_counts_however_the_data_set_reads_its_pictures(sgid: SGIDAugment, size: Any) -> None:
    report = sgid.prepare([(Image.new("RGB", size), "cat"), (pil_picture(0), "cat")], progress=False)
    assert (report.captioned, [index for index, _ in report.failed]) == (1, [0])
    assert "a side of more than 16,383" in report.failed[0][1]


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_what_the_transform_refuses_is_not_captioned(sgid: SGIDAugment, mode: str) -> None:
    report = sgid.prepare([(Image.new(mode, (8, 8)), "cat"), (pil_picture(0), "cat")], progress=False)
    assert (report.captioned, report.failed[0][0]) == (1, 0)
    assert "has no 8-bit colours" in report.failed[0][1]


class Raising(Pictures):
    def __init__(self, error: Exception) -> None:
        super().__init__(0, 1, 2, label="cat")
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("decode_jpeg failed"),
        AttributeError("'NoneType' object has no attribute 'shape'"),  # of what OpenCV returns for a broken file
        zlib.error("invalid block type"),
        AssertionError(),
        NotImplementedError(),
        StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_of_one_item_ends_the_job(sgid: SGIDAugment, error: Exception) -> None:
    report = sgid.prepare(Raising(error), progress=False)
    assert (report.captioned, [index for index, _ in report.failed]) == (2, [1])
    assert report.failed[0][1].startswith(type(error).__name__)


@pytest.mark.parametrize("answer", [["one"], ["a", "b", "c"], None, "ab", [1, 2]], ids=repr)
def test_a_captioner_with_a_wrong_answer_is_told_in_a_sentence(tmp_path: Path, answer: Any) -> None:
    class Wrong:
        id = "wrong"

        def caption(self, images: Any) -> Any:
            return answer

    sgid = SGIDAugment(captions=tmp_path / "c.sqlite", captioner=Wrong(), scorer=FakeScorer())
    with pytest.raises(TypeError, match=r"captioner wrong returned .* for 2 images, not a list of strings"):
        sgid.prepare(Pictures(0, 1, label="cat"), progress=False)
    assert len(sgid.captions) == 0


@pytest.mark.parametrize("answer", [[0.5], None, torch.zeros(2, 2), ["a", "b"], 0.5], ids=repr)
def test_a_scorer_with_a_wrong_answer_is_told_in_a_sentence(tmp_path: Path, answer: Any) -> None:
    class Wrong:
        id = "wrong"

        def image_text(self, images: Any, texts: Any) -> Any:
            return answer

    sgid = SGIDAugment(captions=tmp_path / "c.sqlite", captioner=FakeCaptioner(), scorer=Wrong())
    with pytest.raises(TypeError, match=r"(?s)scorer wrong returned .* for 2 images, not a number each"):
        sgid.prepare(Pictures(0, 1, label="cat"), progress=False)


@pytest.mark.parametrize("label", [0.0, True, b"cat", torch.zeros(3).float(), None], ids=repr)
def test_labels_that_cannot_be_read_are_told(sgid: SGIDAugment, label: Any, caplog: pytest.LogCaptureFixture) -> None:
    sgid.prepare(Pictures(0, 1, label=label), progress=False)
    assert "2 of 2 items have no label that can be read" in caplog.text


@pytest.mark.parametrize("size", ["8", None, True, 2.5, 0])
def test_a_batch_size_that_is_none_is_refused(sgid: SGIDAugment, size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        sgid.prepare(Pictures(0, label="cat"), batch_size=size, progress=False)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "meta", "mps"])
def test_a_device_that_is_not_there_is_refused_before_any_work(sgid: SGIDAugment, device: str) -> None:
    with pytest.raises(ModelLoadError, match=r"CUDA|is not a device|cannot run|MPS|not among"):
        sgid.prepare(Pictures(0, label="cat"), device=device, progress=False)


@pytest.mark.parametrize("size", ["", " ", "two", "1.0", "-1"])
def test_a_world_size_that_is_no_number_means_no_job(sgid: SGIDAugment, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert sgid.prepare(Pictures(0, label="cat"), progress=False).captioned == 1


def test_a_stream_with_a_length_is_refused_as_well(sgid: SGIDAugment) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from ()

        def __len__(self) -> int:
            return 3

    with pytest.raises(TypeError, match="Stream is not a map-style data set"):
        sgid.prepare(Stream(), progress=False)


def test_what_stands_before_the_transform_in_a_sequential_is_applied(sgid: SGIDAugment, folder: Path) -> None:
    sgid.p, sgid.on_miss = 1.0, "original"
    data = ImageFolder(folder, torch.nn.Sequential(v2.CenterCrop(16), sgid))
    sgid.prepare(data, progress=False)
    assert data[0][0].size == (16, 16)
    assert sgid.captions.get(image_key(v2.CenterCrop(16)(load_image(data.samples[0][0])))) is not None


def test_a_chain_that_holds_itself_ends(sgid: SGIDAugment, folder: Path) -> None:
    chain = v2.Compose([v2.Identity()])
    chain.transforms.append(chain)
    assert sgid.prepare(ImageFolder(folder, chain), progress=False).captioned == 12


@pytest.mark.parametrize("size", [(14_000, 13_000), (9_000, 8_000)])
def test_a_picture_that_is_too_large_is_listed_and_the_rest_done(sgid: SGIDAugment, tmp_path: Path, size: Any) -> None:
    (tmp_path / "d" / "cat").mkdir(parents=True)
    pil_picture(0).save(tmp_path / "d" / "cat" / "b.png")
    Image.new("1", size).save(tmp_path / "d" / "cat" / "a.png")  # the very first one
    report = sgid.prepare(ImageFolder(tmp_path / "d", loader=load_image), progress=False)
    assert (report.captioned, [index for index, _ in report.failed]) == (1, [0])


def test_variants_inside_the_data_get_no_variants(sgid: SGIDAugment, folder: Path) -> None:
    VariantStore(folder / "variants").put("01aa", "ab" * 16, 0, picture(77), Provenance("x"))
    report = sgid.prepare(ImageFolder(folder), progress=False)
    assert (report.captioned, len(report.failed)) == (12, 1)
    assert "it is a variant or an export, not an original" in report.failed[0][1]


@pytest.mark.parametrize("place", ["moved", "deep/er/moved", "data/../other", "m\u00fcved"])
def test_a_moved_folder_is_noticed(sgid: SGIDAugment, folder: Path, place: str) -> None:
    sgid.prepare(ImageFolder(folder), progress=False)
    (folder.parent / place).parent.mkdir(parents=True, exist_ok=True)
    folder.rename(folder.parent / place)
    folder.mkdir()  # what is named there is gone all the same
    assert sgid.prepare(ImageFolder(folder.parent / place), progress=False).known == 12
    assert all(Path(str(record.path)).is_file() for record in sgid.captions)


@pytest.mark.parametrize(
    ("first", "then", "changed"),
    [
        (None, {"n02123045": "tabby cat"}, 1),
        ({"n02123045": "kat"}, {"n02123045": "cat"}, 1),
        (["tabby"], ["cat"], 1),
        ({0: "tabby"}, {"0": "cat"}, 1),
        (["cat"], {"n02123045": "cat"}, 0),
    ],
)
def test_names_that_change_replace_the_old_ones(tmp_path: Path, sgid: SGIDAugment, first: Any, then: Any, changed: int) -> None:
    (tmp_path / "d" / "n02123045").mkdir(parents=True)
    pil_picture(0).save(tmp_path / "d" / "n02123045" / "a.png")
    sgid.class_names = first
    sgid.prepare(ImageFolder(tmp_path / "d"), progress=False)
    sgid.class_names = then
    assert sgid.prepare(ImageFolder(tmp_path / "d"), progress=False).changed.get("label", 0) == changed
    assert sgid.prepare(ImageFolder(tmp_path / "d"), progress=False).known == 1


def test_names_that_come_later_replace_codes(tmp_path: Path, sgid: SGIDAugment) -> None:
    (tmp_path / "d" / "n02123045").mkdir(parents=True)
    pil_picture(0).save(tmp_path / "d" / "n02123045" / "a.png")
    sgid.prepare(ImageFolder(tmp_path / "d"), progress=False)
    assert {record.label for record in sgid.captions} == {"n02123045"}
    sgid.class_names = {"n02123045": "tabby cat"}
    assert sgid.prepare(ImageFolder(tmp_path / "d"), progress=False).changed == {"label": 1}
    assert {record.label for record in sgid.captions} == {"tabby cat"}


@pytest.mark.parametrize("lock", ["read-only folder", "somebody else's", "a folder", "a link"])
def test_what_is_known_needs_no_lock_and_no_writing(tmp_path: Path, folder: Path, sgid: SGIDAugment, lock: str) -> None:
    sgid.prepare(ImageFolder(folder), progress=False)
    sgid.captions.close()
    place = Path(f"{sgid.captions.path}.lock")
    place.unlink(missing_ok=True)
    if lock == "a folder":
        place.mkdir()
    elif lock == "a link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.touch()
        place.chmod(0)
    reader = SGIDAugment(
        captions=CaptionStore(sgid.captions.path, readonly=True), captioner=FakeCaptioner(), scorer=FakeScorer()
    )
    assert reader.prepare(ImageFolder(folder), progress=False).known == 12
    assert not (tmp_path / "elsewhere").exists()


def test_a_data_set_without_labels_can_be_prepared_for_a_prompt_with_one(sgid: SGIDAugment) -> None:
    sgid.prepare(Pictures(0, 1, label=-1), progress=False)
    assert {record.label for record in sgid.captions} == {None}


def test_a_batch_of_photos_fits_into_memory(tmp_path: Path) -> None:
    """Batches were bounded by number: 32 photos of 24 megapixels took 25 GB."""
    script = """
import resource, sys
from PIL import Image
from sgid_transforms import SGIDAugment
class Photos:
    classes = ["cat"]
    def __len__(self): return 6
    def __getitem__(self, index): return Image.linear_gradient("L").resize((6000, 4000)).rotate(index).convert("RGB"), 0
sgid = SGIDAugment(captions=sys.argv[1])
sgid.prepare(type("One", (Photos,), {"__len__": lambda self: 1})(), progress=False)  # loads the models
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sgid.prepare(Photos(), progress=False).known == 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "captions.sqlite")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 600, f"{done.stdout} MiB more than for one photo"


class LabelCaptioner(FakeCaptioner):
    """Goes on from labels."""

    def caption(self, images: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> list[str]:
        dark = ["dark" if image.float().mean() < 128 else "bright" for image in images]
        return (
            super().caption(images) if labels is None else [f"{d}, not {label}" for d, label in zip(dark, labels, strict=True)]
        )


class TestModesAndContexts:
    """``caption_mode``: what the captioner is told; the contexts that others may borrow; and contradictions."""

    def prepared(self, tmp_path: Path, folder: Path, mode: str, captioner: Any = None, **settings: Any) -> SGIDAugment:
        recipe = Recipe(caption_mode=mode, caption_from="dataset")
        stores = {"captions": tmp_path / "c.sqlite", "variants": tmp_path / "v"}
        sgid = SGIDAugment(recipe=recipe, captioner=captioner or LabelCaptioner(), scorer=FakeScorer(), **stores, **settings)
        sgid.prepare(ImageFolder(folder), progress=False)
        return sgid

    def test_labels_reach_the_captioner_and_new_ones_are_described_anew(self, tmp_path: Path, folder: Path) -> None:
        first = self.prepared(tmp_path, folder, "context")
        assert {record.caption.split()[-1] for record in first.captions} == {"cat", "dog", "frog"}
        assert {record.captioner for record in first.captions} == {"fake (context)"}
        renamed = self.prepared(tmp_path, folder, "context", class_names={"cat": "tabby"})
        assert {record.caption.split()[-1] for record in renamed.captions} == {"tabby", "dog", "frog"}

    def test_another_mode_describes_all_anew_and_its_contexts_travel(self, tmp_path: Path, folder: Path) -> None:
        free = self.prepared(tmp_path, folder, "free")
        assert {context for _, _, context in free.captions.contexts()} == {""}, "'brightness 90' is all subject"
        context = self.prepared(tmp_path, folder, "context")
        assert {key: text for key, _, text in context.captions.contexts()} == {r.key: r.caption for r in context.captions}

    def test_contexts_stay_when_images_come(self, tmp_path: Path, folder: Path) -> None:
        before = self.prepared(tmp_path, folder, "context").captions.contexts()
        pil_picture(77).save(folder / "cat" / "new.png")
        after = self.prepared(tmp_path, folder, "context")
        assert after.captions.contexts() == before
        assert len(after.captions) == len(before) + 1

    def test_a_captioner_without_labels_is_refused(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(
            TypeError, match=r"^captioner fake has no caption\(images, labels\), so caption_mode='label' cannot work"
        ):
            self.prepared(tmp_path, folder, "label", FakeCaptioner())

    def test_an_image_without_a_label_is_left_out(self, tmp_path: Path) -> None:
        sgid = SGIDAugment(
            recipe=Recipe(caption_mode="context"),
            captions=tmp_path / "c.sqlite",
            captioner=LabelCaptioner(),
            scorer=FakeScorer(),
        )
        report = sgid.prepare([(pil_picture(0), "cat"), (pil_picture(1), None)], progress=False)
        assert report.failed == ((1, "it has no label, and caption_mode='context' needs one"),)
        assert report.captioned == 1

    def test_captions_that_contradict_are_counted_and_only_their_context_is_used(self, tmp_path: Path, folder: Path) -> None:
        class Wrong(FakeCaptioner):
            def caption(self, images: Sequence[torch.Tensor]) -> list[str]:
                return ["a cat on a mat"] * len(images)

        recipe = Recipe(caption_from="own")
        sgid = SGIDAugment(recipe=recipe, captions=tmp_path / "c.sqlite", captioner=Wrong(), scorer=None)
        report = sgid.prepare(ImageFolder(folder), progress=False)
        others = [record for record in sgid.captions if record.label != "cat"]
        assert report.contradictions == len(others) == 8
        assert {record.contradiction for record in others} == {"words"}
        address = Address(sgid.recipe, sgid.captions)
        assert {address.caption(record, 0)[0] for record in sgid.captions} == {"a cat on a mat", "on a mat"}

    def test_the_scorer_doubts_a_caption_that_makes_the_image_less_likely(self, tmp_path: Path, folder: Path) -> None:
        class Doubts:
            def image_text(self, images: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
                return torch.tensor([0.2 if "brightness" in text else 0.3 for text in texts])

        sgid = SGIDAugment(captions=tmp_path / "c.sqlite", captioner=FakeCaptioner(), scorer=Doubts())
        sgid.prepare(ImageFolder(folder), progress=False)
        assert {record.contradiction for record in sgid.captions} == {"scorer"}

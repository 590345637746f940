"""VariantStore: damaged files, links, full disks, read-only media and hostile names. Nothing may raise into a reader."""

import contextlib
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from types import SimpleNamespace

import pytest
import torch

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import Provenance, VariantRef, VariantStore, layout

KEY = "0123456789abcdef0123456789abcdef"
PROVENANCE = Provenance("a photo of a cat", label="cat", versions={"torch": "2.14.1"})
RECIPE = SimpleNamespace(fingerprint="01aa", image_format="png")


def _image(seed=0, size=(16, 24)):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path):
    return VariantStore(tmp_path / "variants", fsync=False)


def _path(store, number=0, suffix=".png"):
    path = store.root / "01aa" / "01" / f"{KEY}-{number}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "webp-lossless"])
@pytest.mark.parametrize("damage", ["bit", "truncation"])
def test_every_bit_flip_and_truncation_is_detected(store, image_format, damage):
    """63 cases for each of the eight pairs, 504 in all: a miss each time, and never other pixels."""
    recipe = SimpleNamespace(fingerprint="01aa", image_format=image_format)
    store.put(recipe, KEY, 0, _image(), PROVENANCE)
    path = store.get(recipe, KEY, 0).path
    whole = path.read_bytes()
    rng = random.Random(f"{image_format} {damage}")
    # The footer is a small part of the file, so half of the cases aim at it.
    for case in range(63):
        at = rng.randrange(len(whole)) if case % 2 else rng.randrange(len(whole) - 44, len(whole))
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        path.write_bytes(whole[:at] + (flipped if damage == "bit" else b""))
        read = (store.get, store.get_image, store.get_pil)[case % 3]
        assert read(recipe, KEY, 0) is None
        assert store.quarantined == case + 1
        assert not path.exists()
    assert store.stats().quarantined == 63
    assert store.put(recipe, KEY, 0, _image(), PROVENANCE)
    assert store.get(recipe, KEY, 0) is not None


def test_a_file_under_another_name_is_not_that_variant(store):
    store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
    for target in (_path(store, 1), store.root / "01bb" / "01" / f"{KEY}-0.png"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_path(store, 0), target)
    assert store.get(RECIPE, KEY, 1) is None
    assert store.get("01bb", KEY, 0) is None
    assert store.get(RECIPE, KEY, 0) is not None


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ["BOMB"], "exploded"),)


def _bomb_png():
    def chunk(kind, payload):
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(5_000_000)))


@pytest.mark.parametrize("suffix", [".webp", ".png", ".jpg", ".failed.json"])
def test_a_pickle_is_never_loaded(store, tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("BOMB", str(tmp_path))
    for number, data in enumerate((pickle.dumps(_Bomb()), layout.pack(pickle.dumps(_Bomb()), b"{}", f"01aa/01/{KEY}-1"))):
        _path(store, number, suffix).write_bytes(data)
        assert store.get(RECIPE, KEY, number) is None
        assert store.failure(RECIPE, KEY, number) is None
    assert store.quarantined == 2
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("image", "provenance"),
    [
        (_bomb_png(), PROVENANCE.to_json().encode()),
        (b"GIF89a" + bytes(50), PROVENANCE.to_json().encode()),
        (None, b"{"),
        (None, b'{"prompt": 5}'),
        (None, b"[" * 100_000),
        (None, b"\xff\xfe"),
    ],
    ids=["bomb", "gif", "half-json", "wrong-json", "deep-json", "no-text"],
)
def test_a_valid_digest_around_hostile_content_is_no_excuse(store, image, provenance):
    from sgid_transforms.variants import codec

    image = codec.encode(_image(), "png")[0] if image is None else image
    _path(store).write_bytes(layout.pack(image, provenance, f"01aa/01/{KEY}-0"))
    assert not store.verify().ok
    assert store.get(RECIPE, KEY, 0) is None
    assert store.quarantined == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling", "device", "huge"])
def test_what_is_no_plain_file_is_a_miss(store, kind):
    path = _path(store)
    if kind == "folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it for reading would wait forever
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(2**40)  # sparse
    assert store.get(RECIPE, KEY, 0) is None
    if kind != "dangling":
        assert store.quarantined == 1
        assert store.put(RECIPE, KEY, 0, _image(), PROVENANCE)


def test_a_file_that_took_over_the_name_is_not_moved_away(store, monkeypatch):
    """A reader judges a damaged file; before it is moved, another process has moved it and a writer has put a good one."""
    store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
    good = _path(store).read_bytes()
    _path(store).write_bytes(good[:100])
    unpack = layout.unpack

    def replaced_meanwhile(data, name):
        monkeypatch.setattr(layout, "unpack", unpack)
        _path(store).rename(store.root / "moved-by-another")
        _path(store).write_bytes(good)
        return unpack(data, name)

    monkeypatch.setattr(layout, "unpack", replaced_meanwhile)
    assert torch.equal(store.get_image(RECIPE, KEY, 0), _image())
    assert store.quarantined == 0
    assert store.stats().quarantined == 0


def test_an_unreadable_file_is_a_miss_and_stays(store, monkeypatch, caplog):
    store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
    real = os.read

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", fails)
    assert store.get(RECIPE, KEY, 0) is None
    assert "Input/output error" in caplog.text
    monkeypatch.setattr(os, "read", real)
    assert store.get(RECIPE, KEY, 0) is not None


@pytest.mark.parametrize("fault", ["no-permission", "quarantine-is-a-file", "quarantine-is-a-link", "other-file-system"])
def test_a_damaged_file_that_cannot_be_moved_is_a_miss_and_no_repair(store, monkeypatch, caplog, fault):
    """It was said to be moved, and counted as repaired, although it stayed."""
    store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
    _path(store).write_bytes(b"damaged")
    quarantine = store.root / "quarantine"
    if fault == "quarantine-is-a-file":
        quarantine.touch()
    elif fault == "quarantine-is-a-link":
        quarantine.symlink_to(store.root.parent)
    else:

        def refuse(*args):
            raise OSError(*{"no-permission": (13, "Permission denied"), "other-file-system": (18, "Cross-device link")}[fault])

        monkeypatch.setattr(os, "replace", refuse)
    report = store.verify(repair=True)
    assert (report.damaged, report.repaired) == ((_path(store),), 0)
    assert [read(RECIPE, KEY, 0) for read in (store.get, store.get_image, store.get_pil)] == [None] * 3
    assert store.quarantined == 4
    assert "it could not be moved" in caplog.text
    assert "stays where it is" in caplog.text
    assert "goes to quarantine" not in caplog.text
    assert _path(store).read_bytes() == b"damaged"
    monkeypatch.undo()
    if not quarantine.is_dir() or quarantine.is_symlink():
        quarantine.unlink()
    assert store.verify(repair=True).repaired == 1
    assert store.verify().ok


class TestLinks:
    """Nothing is listed, written, moved or removed through a symbolic link below the root."""

    PLACES = ("recipe", "shard", "tmp", "quarantine")

    @pytest.fixture
    def outside(self, tmp_path):
        """A folder beside the store that looks like a part of one, with a good, a damaged, a foreign and an old file."""
        outside = tmp_path / "outside"
        (outside / "01").mkdir(parents=True)
        other = VariantStore(tmp_path / "other", fsync=False)
        other.put(RECIPE, KEY, 0, _image(), PROVENANCE)
        for folder in (outside, outside / "01"):
            shutil.copy(_path(other), folder)
            (folder / f"{KEY}-1.png").write_bytes(b"damaged")
            (folder / f"{KEY}-2.failed.json").write_bytes(b"damaged")
            (folder / "notes.txt").write_text("mine")
            (folder / "elsewhere_2_1_0.tmp").write_text("mine")
            os.utime(folder / "elsewhere_2_1_0.tmp", (1, 1))
        (outside / "02").mkdir()
        return outside

    @staticmethod
    def _state(folder):
        return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    @pytest.fixture(params=PLACES)
    def linked(self, request, store, outside):
        """A store in which one folder is a link to ``outside``, opened afresh."""
        store.put("01bb", KEY, 0, _image(), PROVENANCE)
        link = store.root / {"recipe": "01aa", "shard": "01aa/01"}.get(request.param, request.param)
        link.parent.mkdir(exist_ok=True)
        if link.is_dir():
            link.rmdir()
        link.symlink_to(outside)
        return VariantStore(store.root, fsync=False)

    def test_nothing_changes_behind_one(self, linked, outside):
        (linked.root / "01bb" / "01" / f"{KEY}-1.png").write_bytes(b"damaged")
        before = self._state(outside)
        for number in range(3):
            linked.get("01bb", KEY, number)
            linked.get(RECIPE, KEY, number)
            linked.failure(RECIPE, KEY, number)
        for write in (
            lambda: linked.put(RECIPE, KEY, 5, _image(), PROVENANCE),
            lambda: linked.put_failure(RECIPE, KEY, 6, ["nsfw"]),
            lambda: linked.remove([VariantRef("01aa", KEY, 0, outside / f"{KEY}-0.png")]),
            lambda: linked.forget_failures("01aa"),
            lambda: linked.verify(repair=True),
            lambda: linked.merge(outside.parent / "other"),
            lambda: linked.sweep(0),
            lambda: linked.prune("01bb"),
            lambda: linked.prune("01cc"),
        ):
            with contextlib.suppress(StoreError):
                write()
        assert self._state(outside) == before

    @pytest.mark.parametrize("linked", ["recipe", "shard", "tmp"], indirect=True)
    def test_a_write_through_one_is_an_error_that_names_it(self, linked):
        for write in (
            lambda: linked.put(RECIPE, KEY, 5, _image(), PROVENANCE),
            lambda: linked.put_failure(RECIPE, KEY, 6, ["nsfw"]),
        ):
            with pytest.raises(StoreError, match="is a symbolic link; put a folder in its place"):
                write()

    @pytest.mark.parametrize("linked", ["recipe", "shard"], indirect=True)
    def test_a_removal_through_one_is_an_error_that_names_it(self, linked, outside):
        with pytest.raises(StoreError, match="is a symbolic link; put a folder in its place"):
            linked.remove([VariantRef("01aa", KEY, 0, outside / f"{KEY}-0.png")])

    @pytest.mark.parametrize("linked", ["recipe"], indirect=True)
    def test_a_recipe_behind_one_is_absent(self, linked):
        for number in range(3):
            assert linked.get(RECIPE, KEY, number) is None
            assert linked.get_image(RECIPE, KEY, number) is None
            assert linked.get_pil(RECIPE, KEY, number) is None
            assert linked.failure(RECIPE, KEY, number) is None
            assert not linked.contains(RECIPE, KEY, number)
        assert list(linked.iter("01aa")) == list(linked.iter_failures("01aa")) == []
        assert linked.stats().variants == {"01bb": 1}
        assert linked.quarantined == 0
        assert linked.count() == 1

    @pytest.mark.parametrize("linked", ["shard"], indirect=True)
    def test_a_link_in_place_of_a_shard_is_foreign_and_itself_moved_aside(self, linked, outside):
        before = self._state(outside)
        assert linked.get(RECIPE, KEY, 1) is None
        assert (linked.root / "01aa" / "01").is_symlink()
        report = linked.verify(repair=True)
        assert (report.foreign, report.repaired) == ((linked.root / "01aa" / "01",), 1)
        assert linked.put(RECIPE, KEY, 1, _image(), PROVENANCE)
        assert linked.verify().ok
        assert self._state(outside) == before

    def test_the_link_of_one_variant_is_moved_or_removed_and_not_its_target(self, store, outside):
        for number in range(3):
            _path(store, number).symlink_to(outside / f"{KEY}-1.png")
        before = self._state(outside)
        assert store.get(RECIPE, KEY, 0) is None
        assert store.remove([VariantRef("01aa", KEY, 1, _path(store, 1))]) == 1
        assert store.prune("01bb") == 1
        assert store.stats().quarantined == 1
        assert self._state(outside) == before

    def test_the_root_may_be_one(self, store, tmp_path):
        store.root.mkdir()
        (tmp_path / "link").symlink_to(store.root)
        linked = VariantStore(tmp_path / "link", fsync=False)
        for number in range(3):
            assert linked.put(RECIPE, KEY, number, _image(), PROVENANCE)
        _path(linked, 0).write_bytes(b"damaged")
        assert linked.get(RECIPE, KEY, 0) is None
        assert linked.remove([VariantRef("01aa", KEY, 1, _path(linked, 1))]) == 1
        assert [ref.variant for ref in linked.iter()] == [ref.variant for ref in store.iter()] == [2]
        assert linked.stats().quarantined == 1
        assert linked.prune("01bb") == 1


class TestNames:
    @pytest.mark.parametrize(
        "key",
        [
            *("", "../../../etc/passwd", "a/b", "/etc/passwd", "0123\x00456789", "0123456789ABCDEF", "0123456789abcdef\n"),
            *("x" * 100_000, "0" * 65, "\udcff" * 16, "٠" * 16, "..", "0123456", None, 5, b"0123456789abcdef"),
        ],
        ids=range(16),
    )
    def test_a_key_that_is_no_hash_is_refused(self, store, key):
        self._refused(store, RECIPE, key, 0, "lowercase hex digits")

    @pytest.mark.parametrize("variant", [-1, 1.0, "0", True, None, 10**9])
    def test_a_variant_is_a_small_whole_number(self, store, variant):
        self._refused(store, RECIPE, KEY, variant, "is not a whole number from 0 to 999999999")

    @pytest.mark.parametrize(
        "name", ["", "..", "../aa", "a/b", "a\0bb", "quarantine", "tmp", "AAAA", "x" * 65, "\udcff" * 8, "aaa\n"]
    )
    def test_a_fingerprint_is_a_plain_name(self, store, name):
        self._refused(store, name, KEY, 0, "fingerprint")
        self._refused(store, SimpleNamespace(fingerprint=name, image_format="png"), KEY, 0, "fingerprint")

    @staticmethod
    def _refused(store, recipe, key, variant, message):
        for call in (
            lambda: store.get(recipe, key, variant),
            lambda: store.get_image(recipe, key, variant),
            lambda: store.get_pil(recipe, key, variant),
            lambda: store.contains(recipe, key, variant),
            lambda: store.failure(recipe, key, variant),
            lambda: store.put(recipe, key, variant, _image(), PROVENANCE),
            lambda: store.put_failure(recipe, key, variant, ["x"]),
        ):
            with pytest.raises(StoreError, match=message) as caught:
                call()
            assert len(str(caught.value)) < 300
        assert not store.root.exists()

    def test_hostile_text_in_a_provenance_is_only_text(self, store):
        text = "../../x\0'); DROP TABLE captions; --\udcff\u202e\n"
        provenance = Provenance(text, label=text, caption="y" * 500_000, extra={text: text})
        assert store.put(RECIPE, KEY, 0, _image(), provenance)
        assert store.get(RECIPE, KEY, 0).provenance == provenance

    def test_a_provenance_without_end_is_refused(self, store):
        with pytest.raises(StoreError, match="1048576 is the limit"):
            store.put(RECIPE, KEY, 0, _image(), Provenance("x" * 2**20))
        assert store.count() == 0
        assert store.stats().temporary == 0


class TestFullDisk:
    def test_a_file_size_limit_leaves_nothing_behind(self, store):
        """RLIMIT_FSIZE makes the kernel refuse the write half way, as a full disk does."""
        store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            with pytest.raises(StoreError, match=r"could not write .*; the file size limit is too low") as caught:
                store.put(RECIPE, KEY, 1, _image(), PROVENANCE)
            assert store.put_failure(RECIPE, KEY, 2, ["small enough"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        assert caught.value.errno == 27
        self._is_intact(store)
        assert store.put(RECIPE, KEY, 1, _image(), PROVENANCE)

    def test_no_space_left_at_any_step_leaves_nothing_behind(self, store, monkeypatch):
        store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
        real_write = os.write
        for step in ("open", "write", "write-some", "fsync", "link", "mkdir"):
            with monkeypatch.context() as patch:
                written = []

                def full(*args, _written=written, _step=step, **kwargs):
                    if _step == "write-some" and not _written:
                        _written.append(real_write(args[0], args[1][:100]))
                        return 100
                    raise OSError(28, "No space left on device")

                patch.setattr(os, {"write-some": "write", "mkdir": "makedirs"}.get(step, step), full)
                syncing = VariantStore(store.root, fsync=True)
                fingerprint = "01ff" if step == "mkdir" else "01aa"
                with pytest.raises(StoreError, match="No space left on device; free some space") as caught:
                    syncing.put(fingerprint, KEY, 1, _image(), PROVENANCE)
                assert caught.value.errno == 28
            self._is_intact(store)

    def test_a_full_tmpfs_leaves_nothing_behind(self, tmp_path):
        done = _in_a_mount(
            tmp_path,
            "mount -t tmpfs -o size=256k none {mount}",
            """
            number = 0
            try:
                while True:
                    store.put("01aa", KEY, number, image, Provenance("x"))
                    number += 1
            except StoreError as error:
                assert error.errno == 28, error
                print(error)
            assert number > 5
            assert store.stats().temporary == 0
            assert store.count() == number
            assert all(torch.equal(store.get_image("01aa", KEY, i), image) for i in range(number))
            assert store.verify().ok
            """,
        )
        assert "No space left on device; free some space" in done

    def _is_intact(self, store):
        assert torch.equal(store.get_image(RECIPE, KEY, 0), _image())
        assert store.get(RECIPE, KEY, 1) is None
        assert store.count() == 1
        assert store.stats().temporary == 0
        assert store.verify().ok


class TestReadOnlyMedia:
    def test_a_root_below_a_file_is_an_error_for_writers_and_a_miss_for_readers(self, tmp_path):
        (tmp_path / "file").touch()
        for root in (tmp_path / "file", tmp_path / "file" / "variants"):
            store = VariantStore(root)
            with pytest.raises(StoreError, match="could not write"):
                store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
            assert store.get(RECIPE, KEY, 0) is None
            assert store.count() == 0

    @pytest.mark.parametrize(("number", "text"), [(30, "Read-only file system"), (13, "Permission denied")])
    def test_a_refused_write_is_a_clear_error_and_reads_go_on(self, store, monkeypatch, number, text):
        store.put(RECIPE, KEY, 0, _image(), PROVENANCE)
        damaged = _path(store, 5)
        damaged.write_bytes(b"damaged")
        real_open = os.open

        def refuse(*args, **kwargs):
            raise OSError(number, text)

        def refuse_writing(path, flags, *args, **kwargs):
            return refuse() if flags & os.O_CREAT else real_open(path, flags, *args, **kwargs)

        for name in ("link", "replace", "makedirs", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "open", refuse_writing)
        fresh = VariantStore(store.root)
        with pytest.raises(StoreError, match=f"could not write .*{text}; "):
            fresh.put(RECIPE, KEY, 1, _image(), PROVENANCE)
        assert torch.equal(fresh.get_image(RECIPE, KEY, 0), _image())
        assert fresh.get(RECIPE, KEY, 5) is None
        assert fresh.quarantined == 1
        assert damaged.exists()

    def test_a_read_only_mount_can_be_read(self, tmp_path):
        done = _in_a_mount(
            tmp_path,
            "mount -t tmpfs none {mount}",
            """
            import subprocess
            for number in range(2):
                store.put("01aa", KEY, number, image, Provenance("x"))
            path = store.get("01aa", KEY, 1).path
            path.write_bytes(path.read_bytes()[:-1])
            subprocess.run(["mount", "-o", "remount,ro", str(store.root.parent)], check=True)
            store = VariantStore(store.root)
            assert torch.equal(store.get_image("01aa", KEY, 0), image)
            assert store.get("01aa", KEY, 1) is None
            assert store.quarantined == 1
            try:
                store.put("01aa", KEY, 2, image, Provenance("x"))
            except StoreError as error:
                print(error)
            """,
        )
        assert "the folder is on read-only media" in done


def _in_a_mount(tmp_path, mount, script):
    """Run a script in a mount name space of its own; its mounts end with it."""
    folder = tmp_path / "mount"
    folder.mkdir()
    mount = mount.format(mount=folder)
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the same faults are tested with RLIMIT_FSIZE and injected errors")
    code = f"""
import torch
from sgid_transforms.errors import StoreError
from sgid_transforms.variants import Provenance, VariantStore
KEY = {KEY!r}
image = torch.arange(3 * 64 * 64, dtype=torch.int32).to(torch.uint8).view(3, 64, 64)
store = VariantStore({str(folder / "variants")!r})
{textwrap.dedent(script)}
"""
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout

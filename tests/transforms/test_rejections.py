"""A variant that a person rejected is never drawn again."""

import pickle

import pytest
import torch

from augment_fakes import OWN_CAPTIONS, captioned, fake_generator, picture
from sgid_transforms.building.address import Address
from sgid_transforms.images.keys import image_key
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.variants.verdicts import Verdict

K = 4


@pytest.fixture
def sgid(tmp_path, monkeypatch):
    monkeypatch.setattr("sgid_transforms.transforms.augment._REJECTIONS_EVERY", 0.0)
    sgid = SGIDAugment(
        recipe=OWN_CAPTIONS,
        p=1.0,
        variants_per_image=K,
        generator=fake_generator(tmp_path / "log"),
        captions=tmp_path / "captions.sqlite",
        variants=tmp_path / "variants",
    )
    sgid.captions.put_many(captioned(picture(0), picture(1)))
    torch.manual_seed(0)
    while sgid.variants.count() < 2 * K:
        sgid.augment([picture(0), picture(1)])
    return sgid


def place(sgid, number, image=0):
    record = sgid.captions.get(image_key(picture(image)))
    return Address(sgid.recipe, sgid.captions).key(record, number)


def judge(sgid, decision, *numbers):
    sgid.variants.judge(
        Verdict(sgid.recipe.fingerprint, place(sgid, number), number, decision, "anna", 1.0) for number in numbers
    )


def drawn(sgid, image=0, times=200):
    """Numbers of the variants that come, with how often; -1 stands for the original."""
    known = {
        sgid.variants.get_image(sgid.recipe, place(sgid, n, image), n).numpy().tobytes(): n
        for n in range(2 * K)
        if sgid.variants.contains(sgid.recipe, place(sgid, n, image), n)
    }
    found = [known.get(sgid(picture(image)).numpy().tobytes(), -1) for _ in range(times)]
    return {number: found.count(number) for number in sorted(set(found))}


def test_the_others_are_drawn_in_its_place_with_equal_probability(sgid):
    judge(sgid, "reject", 1)
    found = drawn(sgid, times=600)
    assert set(found) == {0, 2, 3}
    assert min(found.values()) > 150  # 200 +- 12 each
    assert set(drawn(sgid, image=1)) == {0, 1, 2, 3}
    judge(sgid, "none", 1)
    assert set(drawn(sgid)) == {0, 1, 2, 3}


def test_the_original_stays_when_none_is_left(sgid):
    judge(sgid, "reject", *range(K))
    before = sgid.stats()
    assert drawn(sgid, times=20) == {-1: 20}
    now = sgid.stats() - before
    assert (now.gated, now.hits, now.misses, now.unavailable, now.generated) == (20, 0, 0, 20, 0)


def test_a_replacement_is_drawn_only_once_it_was_made(sgid):
    judge(sgid, "reject", 0)
    assert set(drawn(sgid)) == {1, 2, 3}
    sgid.variants.put(sgid.recipe, place(sgid, K), K, picture(7), sgid.variants.get(sgid.recipe, place(sgid, 1), 1).provenance)
    assert set(drawn(sgid)) == {1, 2, 3, 4}
    judge(sgid, "none", 0)
    assert set(drawn(sgid)) == {0, 1, 2, 3}


def test_images_without_rejections_see_the_same_random_numbers(sgid):
    def run():
        torch.manual_seed(5)
        return [sgid(picture(1)) for _ in range(20)]

    before = run()
    judge(sgid, "reject", 0, 1)
    assert all(map(torch.equal, before, run()))


def test_a_copy_in_another_process_knows_it(sgid):
    judge(sgid, "reject", 0, 1, 2)
    assert set(drawn(pickle.loads(pickle.dumps(sgid)), times=30)) == {3}  # noqa: S301

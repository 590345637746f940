"""A small data set with variants, and the review of it on a real port."""

from types import SimpleNamespace

import pytest

from image_folders import plain_folder
from job_fakes import fake_models
from sgid_transforms.bulk import generate_folder, scan_folder
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.answers import Answers
from sgid_transforms.variants.store import VariantStore

K = 4


@pytest.fixture
def stores(tmp_path):
    """Ten originals of two classes with four variants each, made by fake models."""
    recipe = Recipe(caption_from="own")
    data = plain_folder(tmp_path / "data", 5)
    captions, variants = CaptionStore(tmp_path / "captions.sqlite"), VariantStore(tmp_path / "variants", fsync=False)
    scan = scan_folder(data)
    generate_folder(scan, recipe, captions, variants, count=K, models=fake_models())
    yield SimpleNamespace(data=data, captions=captions, variants=variants, recipe=recipe, scan=scan, folder=tmp_path)
    captions.close()


@pytest.fixture
def gallery(stores):
    from sgid_transforms.review.gallery import Gallery

    return Gallery(stores.captions, stores.variants, stores.recipe, stores.data)


@pytest.fixture
def server(stores, gallery):
    pytest.importorskip("fastapi", reason="the review extra is not installed")
    from sgid_transforms.review.app import Server
    from sgid_transforms.review.making import Maker
    from sgid_transforms.review.study import Study

    study = Study([gallery], ["mine"], Answers(stores.folder / "answers.sqlite"), images=4)
    with Server(gallery, Maker(gallery, fake_models(), K), study, who="anna", count=K) as running:
        running.gallery, running.study = gallery, study
        yield running

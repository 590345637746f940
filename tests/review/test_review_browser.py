"""The review in headless Chromium, from a user's keys to a training. Skipped where there is none."""

import statistics

import pytest

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("fastapi", reason="the review extra is not installed")

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from browser import needs_chromium, size
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.variants.store import VariantStore

pytestmark = needs_chromium


@pytest.fixture
def page(chromium, server):
    """The review, freshly opened on a desktop; whatever a test does must leave the console empty."""
    size(chromium, 1280, 900)
    chromium.get("about:blank")
    chromium.get_log("browser")  # of the test before
    chromium.get(server.url)
    until(chromium, "return document.querySelectorAll('.row img').length > 0")
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if "favicon" not in entry["message"]] == []


def until(driver, script, *given):
    return WebDriverWait(driver, 20, poll_frequency=0.02).until(lambda _: driver.execute_script(script, *given))


def press(driver, *keys):
    for key in keys:
        driver.execute_script("document.activeElement.blur()")
        driver.find_element("css selector", "body").send_keys(key)


def text(driver, selector):
    return driver.find_element("css selector", selector).text


def fill(driver, selector, value):
    field = driver.find_element("css selector", selector)
    field.clear()
    field.send_keys(value)


def test_curating_by_keyboard_reaches_the_training(page, stores):
    """Twenty variants, one undone; a caption edited and its variants made; then no rejected one is seen in 20 epochs."""
    for row in range(5):
        press(page, "r", "k", "r", "r")  # after the last variant of a row comes the next row
        until(page, "return document.querySelectorAll('figure.reject, figure.keep').length === arguments[0]", 4 * row + 4)
    press(page, "u")
    until(page, "return document.querySelectorAll('figure.reject, figure.keep').length === 19")
    assert len(stores.variants.all_verdicts()) == 21
    rejected = {name for names in stores.variants.rejections(stores.recipe).values() for name in names}
    assert len(rejected) == 14

    page.find_element("id", "tab-captions").click()
    until(page, "return document.querySelectorAll('#edit-prompts li').length > 0")
    fill(page, "#edit-caption", "on a red sofa")
    until(page, "return document.querySelector('#edit-prompts').textContent.includes('on a red sofa')")
    assert "tokens" in text(page, "#edit-prompts")
    page.find_element("css selector", "#edit-caption").send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, "return document.querySelector('#edit-status').textContent.startsWith('Saved. 4 variants')")
    page.find_element("id", "edit-make").click()
    until(page, "return document.querySelector('#edit-status').textContent.startsWith('done')")
    until(page, "return document.querySelector('#edit-pictures').textContent.split('on a red sofa').length === 5")
    (edited,) = (record for record in stores.captions if record.source == "human")

    sgid = SGIDAugment(
        recipe=stores.recipe,
        captions=stores.captions,
        variants=stores.variants,
        p=1.0,
        variants_per_image=4,
        on_miss="original",
    )
    bad = {stores.variants.get_image(stores.recipe, *name).numpy().tobytes() for name in rejected}
    of_edited = {
        stores.variants.get_image(stores.recipe, ref.key, ref.variant).numpy().tobytes()
        for ref in stores.variants.find(stores.recipe, edited.key)
        if stores.variants.provenance(stores.recipe, ref.key, ref.variant).prompt.endswith("on a red sofa")
    }
    data = ImageFolder(str(stores.data), transforms.Compose([sgid, transforms.PILToTensor()]), loader=load_image)
    place = [image_key(load_image(path)) for path, _ in data.samples].index(edited.key)
    seen = set()
    for _ in range(20):
        for number, (picture, _) in enumerate(DataLoader(data, batch_size=None)):
            shown = picture.numpy().tobytes()
            assert shown not in bad
            if number == place:
                assert shown in of_edited
            seen.add(shown)
    assert len(seen) > 20


def test_a_study_by_three_people(page, server):
    for who in ("anna", "ben", "carl"):
        page.find_element("id", "tab-study").click()
        fill(page, "#who", who + Keys.TAB)
        for number in range(24):
            until(
                page,
                "return document.querySelector('#study-progress').textContent === arguments[0]",
                f"{number} of 24 answered",
            )
            until(page, "return [...document.querySelectorAll('#study-pictures img')].every(i => i.complete && i.naturalWidth)")
            press(page, "1")
        until(page, "return document.querySelector('#study-title').textContent.startsWith('Thank you')")
    page.find_element("id", "study-show").click()
    until(page, "return document.querySelectorAll('#study-results tbody tr').length === 3")
    assert "anna, ben, carl" in text(page, "#study-results")
    # Everybody said "cat", the first class: half of the labels are.
    assert text(page, "#study-results tbody tr:first-child").startswith("originals 12 50 % (25 % to 75 %)")
    assert len(server.study.answers.all()) == 72


def test_what_data_says_is_shown_as_text(page, stores):
    key = stores.scan.images[0].key
    stores.captions.put(
        CaptionRecord(key, "<script>window.bad = 1</script><img src=x onerror='window.bad = 1'>", source="human")
    )
    page.refresh()
    until(page, "return document.querySelector('.row p')?.textContent.includes('<script>window.bad')")
    page.find_element("id", "tab-captions").click()
    until(page, "return document.querySelector('#edit-prompts').textContent.includes('<script>')")
    assert page.execute_script("return window.bad === undefined")


def test_a_lost_server_is_said(chromium, server, stores):
    chromium.get(server.url)
    until(chromium, "return document.querySelectorAll('.row img').length > 0")
    server.__exit__()
    press(chromium, "r")
    until(chromium, "return !document.querySelector('#problem').hidden")
    assert "not saved" in text(chromium, "#problem")
    assert chromium.execute_script("return document.querySelectorAll('figure.reject').length") == 0
    assert stores.variants.all_verdicts() == ()
    chromium.get_log("browser")


@pytest.mark.parametrize("mode", ["curate", "captions", "study"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone(page, mode, scheme):
    size(page, 400, 800, scheme)
    page.find_element("id", f"tab-{mode}").click()
    until(page, "return !document.getElementById(arguments[0]).hidden", mode)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400


@pytest.mark.timing
def test_a_hundred_thousand_originals_are_quick(chromium, tmp_path):
    """First row within 1 s, the next image within 100 ms: medians, as the browser measures them."""
    from job_fakes import fake_models
    from sgid_transforms.report.answers import Answers
    from sgid_transforms.review.app import Server
    from sgid_transforms.review.gallery import Gallery
    from sgid_transforms.review.making import Maker
    from sgid_transforms.review.study import Study

    captions, recipe = CaptionStore(tmp_path / "captions.sqlite"), Recipe(caption_from="own")
    captions.put_many(CaptionRecord(f"{n:032x}", f"a cat number {n}", "cat", path=f"cat/{n:06}.png") for n in range(100_000))
    gallery = Gallery(captions, VariantStore(tmp_path / "variants"), recipe, tmp_path)
    study = Study([gallery], ["mine"], Answers(tmp_path / "answers.sqlite"))
    with Server(gallery, Maker(gallery, fake_models(), 4), study) as server:
        first, following = [], []
        for _ in range(5):
            chromium.get("about:blank")
            chromium.get(server.url)
            until(chromium, "return document.querySelectorAll('.row').length === 24")
            first.append(
                chromium.execute_script("return performance.getEntriesByType('mark').find(m => m.name === 'rows').startTime")
            )
            following += chromium.execute_async_script(
                """const done = arguments[0], times = [];
                (async () => {
                  for (let i = 0; i < 60; i++) {
                    const start = performance.now();
                    await move(1);
                    await new Promise(resolve => requestAnimationFrame(resolve));
                    times.push(performance.now() - start);
                  }
                  done(times);
                })();"""
            )
    captions.close()
    assert statistics.median(first) < 1000
    assert statistics.median(following) < 100

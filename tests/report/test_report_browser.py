"""The report in headless Chromium. Skipped where there is none: ``apt-get install chromium chromium-driver``."""

import pytest

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from browser import needs_chromium, size

WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

pytestmark = needs_chromium


@pytest.fixture
def page(chromium, report):
    """The report, freshly opened on a desktop; whatever a test does must leave the console empty."""
    size(chromium, 1280, 900)
    chromium.get("about:blank")  # or the same address with another fragment would not be loaded anew
    chromium.get(report[0].as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def texts(driver, selector):
    """What the elements say that are not hidden."""
    return driver.execute_script(
        "return Array.from(document.querySelectorAll(arguments[0])).filter(e => e.checkVisibility())"
        ".map(e => e.textContent.trim().replace(/\\s+/g, ' '))",
        selector,
    )


def click(driver, selector, text):
    """Click the first of the elements whose text starts like this."""
    found = driver.execute_script(
        "const [selector, text] = arguments;"
        "const found = Array.from(document.querySelectorAll(selector)).find(e => e.textContent.trim().startsWith(text));"
        "found?.click(); return Boolean(found)",
        selector,
        text,
    )
    assert found, f"no {selector} starts with {text}"


def choose(driver, field, value):
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true}))",
        field,
        value,
    )


def test_it_opens_complete_and_loads_nothing(page):
    assert texts(page, "h1") == ["<b>Test</b>"]
    assert len(texts(page, "#classes tbody tr")) == 3
    assert len(texts(page, "article")) == 9
    assert texts(page, "#count") == ["9 of 9"]
    assert page.execute_script(
        "return Array.from(document.images).every(i => { i.loading = 'eager'; return i.src.startsWith('data:') })"
    )
    decoded = "return Promise.all(Array.from(document.images, i => i.decode().then(() => true, () => false)))"
    assert all(page.execute_script(decoded))
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_text_that_looks_like_a_script_is_shown_and_not_run(page):
    assert page.execute_script("return document.scripts.length") == 1
    assert any("<script>alert(1)</script> a red 'field' & \"sky\"" in text for text in texts(page, "article p"))


def test_the_policy_stops_scripts_that_are_not_the_reports_own(page):
    page.execute_script("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    page.execute_script(
        "const i = new Image(); i.setAttribute('onerror', 'window.ran = 1'); document.body.append(i); i.src = 'data:,'"
    )
    assert page.execute_script("return window.ran ?? null") is None
    messages = [entry["message"] for entry in page.get_log("browser")]  # read away: these two are what is tested
    assert any("Content Security Policy" in message for message in messages)


def test_a_click_on_a_heading_sorts_the_classes_and_another_one_turns_them_round(page):
    names = "#classes tbody th"
    click(page, "#classes thead button", "Class")
    assert texts(page, names) == ["blue", "green", "red"]
    click(page, "#classes thead button", "Class")
    assert texts(page, names) == ["red", "green", "blue"]
    assert page.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
    assert texts(page, "[aria-sort=descending]") == ["Class"]


def test_numbers_sort_as_numbers_and_what_is_unknown_comes_last(page):
    values = ["2", "10", "", "9"]
    page.execute_script(
        "const rows = document.querySelector('#classes tbody'); const first = rows.rows[0];"
        "rows.replaceChildren(...arguments[0].map(v => { const r = first.cloneNode(true); r.cells[1].dataset.value = v;"
        "r.cells[1].textContent = v; return r }))",
        values,
    )
    click(page, "#classes thead button", "Originals")
    assert texts(page, "#classes tbody td:nth-child(2)") == ["10", "9", "2", ""]  # the highest first
    click(page, "#classes thead button", "Originals")
    assert texts(page, "#classes tbody td:nth-child(2)") == ["2", "9", "10", ""]


def test_the_gallery_is_sorted_by_what_is_chosen(page):
    worst = "return Array.from(document.querySelectorAll('article'), a => Number(a.dataset.worst))"
    assert page.execute_script(worst) == sorted(page.execute_script(worst))
    choose(page, "order", "worst down number")
    assert page.execute_script(worst) == sorted(page.execute_script(worst), reverse=True)
    choose(page, "order", "name up text")
    names = page.execute_script("return Array.from(document.querySelectorAll('article'), a => a.dataset.name)")
    assert names == sorted(names)


def test_filters_work_alone_together_and_without_a_hit(page):
    choose(page, "label", "green")
    assert texts(page, "article h3") == ["green"] * 3
    choose(page, "state", "rejected")
    assert texts(page, "#count") == ["1 of 9"]
    choose(page, "label", "")
    assert texts(page, "#count") == ["3 of 9"]
    choose(page, "state", "kept")
    assert texts(page, "article") == []
    assert "No image matches" in texts(page, "#none")[0]
    choose(page, "state", "")
    choose(page, "search", "ALERT  Blue/2.png")  # every word, in any case
    assert texts(page, "article h3") == ["blue"]
    choose(page, "search", "")
    assert texts(page, "#count") == ["9 of 9"]


def test_a_class_in_the_table_shows_its_images(page):
    click(page, "#classes tbody button", "blue")
    assert texts(page, "article h3") == ["blue"] * 3
    assert page.execute_script("return document.getElementById('label').value") == "blue"


def test_a_case_leads_to_its_image_even_if_a_filter_hides_it(page):
    choose(page, "search", "no such text")
    assert texts(page, "article") == []
    target = page.execute_script("const a = document.querySelector('.pair a'); a.click(); return a.hash.slice(1)")
    WebDriverWait(page, 10).until(
        lambda driver: driver.execute_script("return document.getElementById(arguments[0]).checkVisibility()", target)
    )


def test_a_click_on_a_variant_shows_it_large_beside_its_original_until_escape(page):
    page.execute_script("document.querySelectorAll('article figure button')[2].click()")
    assert texts(page, "dialog[open] figcaption b")[0] == "original"
    assert len(texts(page, "dialog figure")) == 2
    assert page.execute_script("return document.querySelector('dialog img').getBoundingClientRect().width") > 250
    page.switch_to.active_element.send_keys("\ue00c")  # escape
    assert texts(page, "dialog[open]") == []
    page.execute_script("document.querySelector('article figure button').click()")
    assert len(texts(page, "dialog figure")) == 1  # the original alone
    click(page, "dialog form button", "")
    assert texts(page, "dialog[open]") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_overflows_at_any_width_and_text_stands_out_in_both_schemes(page, width, scheme):
    size(page, width, 844, scheme)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    luminance = (
        "const rgb = getComputedStyle(document.body)[arguments[0]].match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)"
        ".map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);"
        "return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]"
    )
    ink, paper = (page.execute_script(luminance, name) for name in ("color", "backgroundColor"))
    assert (ink < paper) == (scheme == "light")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # WCAG AAA

"""The gallery and the report in a real browser; skipped where there is no Chromium."""

import json

import numpy as np
import pytest

from tests import browser
from tests.visu.test_gallery import ODD_NAMES, Noise, make_folder
from tests.visu.test_report import config, record, write_run
from visu import compare, report, run_groups, thumbnails
from visu.gallery import write_gallery

# Cluster -> distances of its images. Classes: a third of them "cat", the rest "dog".
SIZES = {0: 4, 1: 40, 2: 1, 5: 12}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get("about:blank")
        yield driver


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A page of 57 images in clusters of the sizes above, and eight of odd names in cluster 7."""
    folder = tmp_path_factory.mktemp("gallery")
    labels = np.repeat([*SIZES, 7], [*SIZES.values(), len(ODD_NAMES)])
    names = [f"{'cat' if i % 3 == 0 else 'dog'}/IMG_{i:03d}.png" for i in range(sum(SIZES.values()))]
    images = make_folder(folder / "images", names + [f"odd/{name}" for name in ODD_NAMES], side=(64, 48))
    distances = np.where(labels == 5, 0.1, 0.5) + np.arange(len(labels)) / 1000
    write_gallery(images, labels, distances, folder / "clusters.html", num_clusters=9, name="test")
    return folder / "clusters.html"


@pytest.fixture
def page(driver, gallery):
    """The gallery freshly opened on a desktop; afterwards the console must be empty."""
    browser.resize(driver, 1280, 900)
    browser.prefer(driver, "light")
    driver.get(gallery.as_uri())
    browser.complaints(driver)
    yield driver
    assert browser.complaints(driver) == []


def run(driver, script, *arguments):
    return driver.execute_script(script, *arguments)


def order(driver):
    return run(driver, "return [...document.querySelectorAll('h2[id^=title]')].map(e => e.textContent)")


def press(driver, *keys):
    from selenium.webdriver import ActionChains

    chain = ActionChains(driver)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def keys():
    from selenium.webdriver import Keys

    return Keys


def search(driver, text):
    """Type a query as a user does and wait for its result."""
    run(driver, "document.getElementById('status').textContent = ''")
    press(driver, "/", keys().BACKSPACE, text)
    return browser.until(lambda: run(driver, "return document.getElementById('status').textContent"))


def names_shown(driver, cluster):
    script = "return [...document.querySelectorAll(`#cluster-${arguments[0]} .tile`)].map(e => e.title)"
    return run(driver, script, cluster)


def focused(driver, what="title"):
    return run(driver, f"return document.activeElement.{what}")


def scrolls_sideways(driver):
    return run(driver, "return document.documentElement.scrollWidth > innerWidth")


# ---------------------------------------------------------------------------------------- the gallery


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("largest", [1, 5, 7, 0, 2]),
        ("smallest", [2, 0, 7, 5, 1]),
        ("compact", [5, 0, 1, 2, 7]),
        ("loose", [7, 2, 1, 0, 5]),
        ("pure", [7, 2, 1, 5, 0]),  # 1, 1, 27 of 40, 8 of 12, 2 of 4
        ("id", [0, 1, 2, 5, 7]),
    ],
)
def test_clusters_are_sorted(page, key, expected):
    script = "const s = document.getElementById('sort'); s.value = arguments[0]; "
    run(page, script + "s.dispatchEvent(new Event('change'))", key)
    assert order(page) == [f"Cluster {i}" for i in expected]


def test_cluster_tells_its_numbers_and_shows_the_nearest_first(page):
    text = run(page, "return document.querySelector('#cluster-1 header').innerText")
    assert "40 images" in text and "68 %" in text and "dog" in text and "0.523" in text
    tiles = names_shown(page, 1)
    assert [name[-7:-4] for name in tiles] == [f"{i:03d}" for i in range(4, 4 + len(tiles))]
    run(page, "document.querySelector('#cluster-1 .more').click()")
    assert len(names_shown(page, 1)) == 40
    assert focused(page)[-7:-4] == f"{4 + len(tiles):03d}"  # where reading goes on
    notes = run(page, "return document.getElementById('notes').textContent")
    assert "65 images in 5 clusters" in notes and "4 more clusters are empty" in notes


def test_thumbnails_are_drawn(page):
    widths = "return [...document.querySelectorAll('#cluster-5 .tile img')].map(e => e.naturalWidth)"
    browser.until(lambda: run(page, widths) == [64] * 12)


def test_random_images_on_demand(page):
    nearest, other = names_shown(page, 5), names_shown(page, 0)
    run(page, "document.querySelector('#cluster-5 .toggle').click()")
    drawn = names_shown(page, 5)
    assert sorted(drawn) == sorted(nearest) and drawn != nearest
    assert names_shown(page, 0) == other  # only this cluster
    run(page, "document.querySelector('#cluster-5 .toggle').click()")
    assert names_shown(page, 5) == nearest
    run(page, "document.getElementById('random').click()")
    assert names_shown(page, 5) == drawn
    assert run(page, "return document.getElementById('random').getAttribute('aria-pressed')") == "true"


def test_search_finds_highlights_and_clears(page):
    assert search(page, "img_01") == "10 images in 1 cluster"
    assert order(page) == ["Cluster 1"]
    assert all("IMG_01" in name for name in names_shown(page, 1))
    marks = run(page, "return [...document.querySelectorAll('mark')].map(e => e.textContent)")
    assert len(marks) == 10 and set(marks) == {"IMG_01"}
    press(page, keys().ESCAPE)
    browser.until(lambda: len(order(page)) == 5)
    assert focused(page, "id") == "search" and focused(page, "value") == ""
    assert search(page, "no such file") == "Nothing found" and order(page) == []


def test_search_finds_a_cluster_by_its_number(page):
    search(page, "#5")
    assert order(page) == ["Cluster 5"] and len(names_shown(page, 5)) == 12


def test_odd_names_are_shown_as_text(page):
    shown = names_shown(page, 7)
    assert "odd/</script><script>alert(1)/x.png" in shown
    assert "odd/line\\x0abreak.png" in shown and "odd/caf\\xe9.png" in shown and "odd/写真.png" in shown
    assert search(page, "größe") == "1 image in 1 cluster"


def test_every_original_is_reached_from_its_picture(page):
    run(page, "document.querySelector('#cluster-7 .tile').click()")
    seen = "return document.getElementById('seen').textContent"
    for i in range(len(ODD_NAMES)):
        assert browser.until(lambda: run(page, seen)) == "64 × 48 pixels"
        assert run(page, "return document.getElementById('place').textContent") == f"{i + 1} of 8"
        press(page, keys().ARROW_RIGHT)


def test_lightbox_by_keyboard_alone(page):
    press(page, "/", keys().TAB, keys().TAB, keys().TAB)  # sort, random, the first cluster's button
    assert focused(page, "ariaLabel") == "Random images of cluster 1"
    press(page, keys().TAB)
    first = names_shown(page, 1)
    assert focused(page) == first[0]
    press(page, keys().ARROW_RIGHT, keys().ARROW_RIGHT, keys().ENTER)
    name = "return document.getElementById('name').textContent"
    assert run(page, "return document.getElementById('lightbox').open") and run(page, name) == first[2]
    facts = run(page, "return document.getElementById('facts').innerText.replace(/\\s+/g, ' ')")
    assert facts == f"Class {first[2][:3]} Cluster 1 (40 images) Squared distance 0.506"
    press(page, keys().ARROW_RIGHT)
    assert run(page, name) == first[3]
    press(page, keys().HOME)
    assert run(page, name) == first[0]
    press(page, keys().ARROW_LEFT)  # there is none before
    assert run(page, name) == first[0]
    press(page, keys().ARROW_RIGHT, keys().ESCAPE)
    assert not run(page, "return document.getElementById('lightbox').open")
    browser.until(lambda: focused(page) == first[1])  # back at the picture that was looked at last


def test_focus_is_visible(page):
    press(page, "/", keys().TAB)
    outline = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
    assert run(page, outline) == ["solid", "3px"]


def test_arrows_walk_down_the_columns(page):
    columns = run(
        page,
        """
        const tiles = [...document.querySelectorAll('#cluster-1 .tile')];
        tiles[0].focus();
        return tiles.filter(t => t.offsetTop === tiles[0].offsetTop).length""",
    )
    press(page, keys().ARROW_DOWN)
    assert columns > 3 and focused(page) == names_shown(page, 1)[columns]


def test_long_names_do_not_widen_a_phone(driver, tmp_path):
    images = make_folder(tmp_path / "images", [f"{'class' * 40}/{'name' * 50}.png", "other/x.png"])
    name = "run" * 60
    out = write_gallery(images, np.array([0, 0]), np.arange(2.0), tmp_path / "g.html", name=name)
    browser.resize(driver, 360, 740)
    driver.get(out.as_uri())
    assert not scrolls_sideways(driver)
    run(driver, "document.querySelector('.tile').click()")
    script = "const box = document.getElementById('lightbox'); return box.scrollWidth > box.clientWidth"
    assert not scrolls_sideways(driver) and not run(driver, script)
    run(driver, "document.getElementById('close').click()")
    search(driver, "name")
    assert not scrolls_sideways(driver)


@pytest.mark.parametrize("width", [320, 360, 800])
def test_nothing_scrolls_sideways(page, width):
    browser.resize(page, width, 740)
    page.refresh()
    assert len(order(page)) == 5 and not scrolls_sideways(page)
    run(page, "document.querySelector('#cluster-7 .tile').click()")
    assert not scrolls_sideways(page)
    box = run(
        page,
        "const r = document.getElementById('lightbox').getBoundingClientRect(); return [r.left, r.right]",
    )
    assert 0 <= box[0] and box[1] <= width
    press(page, keys().ESCAPE)
    search(page, "o")
    assert not scrolls_sideways(page)


CONTRAST = """
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour; } return 'white'; };
  return [...document.querySelectorAll(arguments[0])].map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); });"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader_with_good_contrast(page, scheme):
    browser.prefer(page, scheme)
    search(page, "img")
    paper = run(page, "return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    run(page, "document.getElementById('random').click()")  # its pressed colours as well
    ratios = run(page, CONTRAST, "h1, h2, p, .fact, .name, mark, button, input, select, #status, dd, dt, a")
    assert len(ratios) > 40 and min(ratios) >= 4.5


def test_nothing_is_fetched_but_the_page(driver, gallery):
    browser.requested(driver)
    driver.get(gallery.as_uri())
    browser.until(lambda: len(order(driver)) == 5)
    assert set(browser.requested(driver)) == {gallery.as_uri()}
    script = (
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => /^https?:/.test(n))"
    )
    assert run(driver, script) == []


def test_page_works_where_the_originals_are_gone(driver, gallery, tmp_path):
    moved = tmp_path / "moved.html"
    moved.write_bytes(gallery.read_bytes())
    driver.get(moved.as_uri())
    run(driver, "document.querySelector('#cluster-0 .tile').click()")
    seen = "return document.getElementById('seen').textContent"
    assert "could not be shown" in browser.until(lambda: run(driver, seen))
    assert run(driver, "return document.getElementById('picture').src").startswith("data:image/webp")
    browser.complaints(driver)  # the missing file


def test_thousands_of_clusters_are_drawn_as_one_reads(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "THUMBNAILS_PER_MB", 15)
    images = Noise([f"{i:05d}.jpg" for i in range(6000)], side=8)
    out = write_gallery(images, np.arange(6000) % 3000, np.zeros(6000), tmp_path / "g.html")
    browser.resize(driver, 1280, 900)
    driver.get(out.as_uri())
    sections = "return document.querySelectorAll('.cluster').length"
    start = browser.until(lambda: run(driver, sections))
    assert start <= 100
    run(driver, "scrollTo(0, document.body.scrollHeight)")
    browser.until(lambda: run(driver, sections) > start)
    assert run(driver, sections) < 500
    assert search(driver, "02999") == "1 image in 1 cluster"  # far down, and its thumbnail was left out
    assert order(driver) == ["Cluster 2999"]
    run(driver, "document.querySelector('.tile').click()")
    assert run(driver, "return !document.getElementById('absent').hidden")


# ---------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_on_a_phone_and_in_the_dark(driver, tmp_path, scheme):
    exp = write_run(tmp_path / "exp", [record(e, largest=3000) for e in range(3)], config())
    _, page = report.write_report(exp)
    browser.requested(driver), browser.complaints(driver)
    browser.resize(driver, 360, 740)
    browser.prefer(driver, scheme)
    driver.get(page.as_uri())
    assert not scrolls_sideways(driver)
    ratios = run(driver, CONTRAST, "h1, h2, p, td, th, summary")
    assert min(ratios) >= 4.5
    ink = run(driver, "return getComputedStyle(document.querySelector('svg text')).fill")
    assert ink in run(
        driver, "return [...document.querySelectorAll('p, th')].map(e => getComputedStyle(e).color)"
    )
    wide = run(
        driver, "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(wide) == 6 and all(300 < w <= 360 for w in wide)
    assert browser.requested(driver) == [page.as_uri()] and browser.complaints(driver) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_comparison_on_a_phone_and_in_the_dark(driver, tmp_path, scheme):
    names = ["short", f"a_name_{'as_long_as_this_one_' * 6}", "x" * 120]
    for i, name in enumerate(names):
        write_run(tmp_path / name, [record(e, largest=3000 + i) for e in range(2)], config(lr=i))
        found = {"linear": {"protocol": {"batch": i}, "results": [{"layer": name, "prec@1": 40.0 + i}]}}
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    entries = run_groups.group(run_groups.read_runs([tmp_path / name for name in names]))
    _, page = compare.write_comparison(entries, tmp_path / "out")
    browser.requested(driver), browser.complaints(driver)
    browser.resize(driver, 360, 740)
    browser.prefer(driver, scheme)
    driver.get(page.as_uri())
    run(driver, "document.querySelectorAll('details').forEach(e => e.open = true)")
    assert not scrolls_sideways(driver)
    assert run(
        driver, "return [...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
    )
    assert min(run(driver, CONTRAST, "h1, h2, h3, h4, p, small, td, th, li, summary")) >= 4.5
    lines = "return [...document.querySelectorAll('.key .sample')].map(e => getComputedStyle(e).stroke)"
    assert len(set(run(driver, lines))) == 3
    assert browser.requested(driver) == [page.as_uri()] and browser.complaints(driver) == []

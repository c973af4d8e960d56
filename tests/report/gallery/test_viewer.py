"""The gallery page in a browser, opened from the disk: search, sort, filter and marks by mouse and keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.dataset.select.keys import read_keys
from flux_batch.output.metadata import parquet_bytes
from flux_batch.report.gallery.write import PAGE, write_gallery, write_single_file
from flux_batch.storage.store import Store
from helpers.browser import browser, opened, violations
from helpers.finished_runs import finish
from helpers.job_files import make_job

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>document.title = 'broken'</script>",
    "<img src=x onerror=\"document.title = 'broken'\"> Red FOX",
    "</title></script></style>' \" &lt;b&gt; \u202e around",
]
NUM_ROWS = 60


def make_run(folder: Path, steps: int) -> Store:
    rows = [
        {
            "prompt": f"[raise] {n}" if n % 20 == 7 else f"a {'red fox' if n % 6 == 0 else 'dog'} number {n}",
            "id": f"row {n}",
        }
        for n in range(NUM_ROWS)
    ]
    for number, text in enumerate(HOSTILE):
        rows[number]["prompt"] = text
    for number, row in enumerate(rows):
        row |= {"kind": "abc"[number % 3], "price": float(number * 7 % NUM_ROWS)}
    prompts = {"passthrough": ["kind", "price"], "columns": {"id": "id"}}
    output = {"format": "files", "shard_size": 20}
    sampling = {"num_inference_steps": steps}
    finish(make_job(folder, rows, prompts=prompts, output=output, sampling=sampling, failures={"max_ratio": 1.0}))
    store = Store(str(folder / "out"))
    score = pa.table({"key": [f"00001{n:04d}" for n in range(20)], "score": [n / 20 for n in range(20)]})
    store.write("annotations/judge/00001.parquet", parquet_bytes(score))
    return store


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_gallery(make_run(folder, 2), 1000)
    return folder / "out"


@pytest.fixture
def page(chromium: Any, output: Path) -> Iterator[Any]:
    with opened(chromium, output / PAGE) as page:
        yield page


def prompts(page: Any) -> list[str]:
    """Return the prompts of the cards in order."""
    cards = page.locator("#cards > li").evaluate_all(
        "cards => cards.map(card => [Number(card.ariaPosInSet), card.querySelector('.prompt').textContent])"
    )
    return [prompt for _, prompt in sorted(cards)]


def numbers(page: Any) -> list[int]:
    return [int(prompt.rpartition(" ")[2]) for prompt in prompts(page) if "number" in prompt]


def count(page: Any) -> str:
    return str(page.locator("#count").text_content())


def focused(page: Any) -> int:
    return int(page.evaluate("document.activeElement.closest('li').ariaPosInSet"))


def test_it_opens_with_images_and_hostile_prompts_stay_text(page: Any) -> None:
    assert prompts(page)[: len(HOSTILE)] == HOSTILE
    assert page.title() == "flux-batch"
    assert page.locator("#cards script, #cards p img").count() == 0
    assert count(page) == "60 of 60"
    page.locator("#cards img").nth(4).wait_for()
    assert page.locator("#cards img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    assert page.locator("#cards li").count() < NUM_ROWS  # cards far below do not exist yet


def test_search_sort_and_filter(page: Any) -> None:
    page.fill("#search", "fox RED")
    assert count(page) == "10 of 60"
    page.fill("#search", "")
    page.select_option("#sort", "price")
    page.click("#direction")
    assert [number * 7 % NUM_ROWS for number in numbers(page)[:3]] == [59, 58, 57]

    page.select_option("#filter", "kind")
    page.get_by_label("b (20)").check()
    assert {number % 3 for number in numbers(page)} == {1}
    page.select_option("#filter", "price")
    page.get_by_label("from", exact=True).fill("50")
    page.get_by_label("to", exact=True).fill("56.5")
    assert sorted(number * 7 % NUM_ROWS for number in numbers(page)) == [52, 55]
    page.click("text=Remove >> nth=0")
    assert count(page) == "7 of 60"
    page.click("text=Remove")

    page.select_option("#sort", "judge.score")
    assert numbers(page)[0] == 39
    assert "judge.score 0.95" in str(page.locator("#cards li").first.text_content())


def test_failures_stand_with_their_reasons(page: Any) -> None:
    page.click("#reasons summary")
    assert page.locator("#reasons summary").text_content() == "3 failed"
    page.click("text=RuntimeError (3)")
    assert count(page) == "3 of 60"
    assert "RuntimeError: asked to fail" in str(page.locator("#cards .none").first.text_content())
    page.locator("#cards .open").first.focus()
    page.keyboard.press("k")
    assert count(page) == "3 of 60"  # nothing is marked


def test_marks_by_keys_are_kept_and_downloaded(page: Any, tmp_path: Path) -> None:
    page.locator("#cards .open").first.focus()
    page.keyboard.press("k")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    assert (focused(page), count(page)) == (2, "60 of 60; 1 kept, 1 dropped")
    page.keyboard.press("End")
    page.keyboard.press("k")
    assert focused(page) == NUM_ROWS
    page.keyboard.press("Home")
    assert focused(page) == 1
    page.reload()
    assert count(page) == "60 of 60; 2 kept, 1 dropped"
    with page.expect_download() as kept:
        page.click("#keep-file")
    kept.value.save_as(tmp_path / kept.value.suggested_filename)
    assert read_keys(str(tmp_path / "flux-batch-kept.csv")) == ["000000000", "000020019"]
    with page.expect_download() as rest:
        page.click("#rest-file")
    keys = Path(rest.value.path()).read_text().splitlines()
    assert len(keys) == 1 + NUM_ROWS - 3 - 1
    assert "000000001" not in keys
    page.click("#clear")
    assert count(page) == "60 of 60"


def test_the_large_view_by_keys(page: Any, output: Path) -> None:
    page.keyboard.press("/")
    page.keyboard.type("fox")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    dialog = page.locator("#large")
    assert dialog.locator("#large-prompt").text_content() == "a red fox number 6"
    source = dialog.locator("img").evaluate("image => image.decode().then(() => image.currentSrc)")
    assert source == (output / "train/00000/000000006.png").as_uri()
    assert dialog.get_by_role("row", name="price 42").count() == 1
    page.keyboard.press("ArrowRight")
    assert dialog.locator("#large-prompt").text_content() == "a red fox number 12"
    page.keyboard.press("k")
    assert dialog.get_by_role("button", name="Keep").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.locator("#cards .open:focus").wait_for()
    assert (dialog.is_visible(), focused(page)) == (False, 3)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_two_runs_stand_side_by_side(chromium: Any, tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", 2)
    write_gallery(one, 1000, beside=make_run(tmp_path / "b", 3))
    with opened(chromium, tmp_path / "a/out" / PAGE) as page:
        page.locator("#cards li:first-child img").nth(1).wait_for()
        left, right = page.locator("#cards li:first-child img").evaluate_all("all => all.map(one => one.src)")
        assert left != right
        page.locator("#cards .open").first.click()
        differing = page.locator("#large tr.differs").all_text_contents()
        assert "num_inference_steps23" in differing
        assert not [line for line in differing if line.startswith("prompt")]


def test_everybody_can_use_the_single_file(chromium: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a long prompt " * 60}, {"prompt": "short"}, {"prompt": "[raise]"}]
    finish(make_job(tmp_path, rows, failures={"max_ratio": 1.0}))
    write_single_file(Store(str(tmp_path / "out")), 10)
    for width in (375, 1200):
        with opened(
            chromium, tmp_path / "out" / PAGE, viewport={"width": width, "height": 700}, bypass_csp=True
        ) as page:
            assert violations(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("look", [{}, {"color_scheme": "dark", "viewport": {"width": 375, "height": 700}}])
def test_everybody_can_use_it(chromium: Any, output: Path, look: dict[str, Any]) -> None:
    with opened(chromium, output / PAGE, **look, bypass_csp=True) as page:  # the page's policy would block axe
        page.select_option("#filter", "kind")
        page.locator("#cards img").nth(1).wait_for()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator("#cards .open").first.click()
        assert violations(page) == []

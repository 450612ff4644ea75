"""The page in headless Chromium: it loads without errors or requests, filters, sorts, and keeps texts texts.

Needs `pip install playwright` and a Chromium, e.g. Debian's `chromium` or `playwright install chromium`.
"""

import json
from pathlib import Path

import pytest

from eval.comparison import Comparison
from eval.records import read_record
from eval.report.page import render_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")

RESULTS = Path(__file__).parents[2] / "records" / "balanced"
HOSTILE = "<script>window.pwned=1</script> </script><img src=x onerror=window.pwned=1> {{7*7}}"
LONG_WORD = "Donaudampfschifffahrt" * 40


@pytest.fixture(scope="module")
def records(make_record):
    """Prompts and responses of a real comparison, some twice; prompt 1 and its proxy's response are hostile."""
    real = [read_record(RESULTS / f"{name}-seed0.json") for name in ("sft", "proxy-prefix")]
    prompts = [HOSTILE, *(real[0]["prompts"] * 2)[1:44]]
    rewards = [(record["rewards"] * 2)[:44] for record in real]
    responses = [(record["responses"] * 2)[:44] for record in real]
    responses[1][:2] = [HOSTILE, LONG_WORD]
    sft = make_record("sft", rewards[0], responses=responses[0], prompts=prompts, model=HOSTILE)
    trace = [[[HOSTILE, ["<b>no</b>", "\n"]], [" end", []]]] * 44
    texts = {"responses": responses[1], "prompts": prompts, "trace": trace}
    proxy = make_record("proxy", rewards[1], sft, variant="prefix", model=HOSTILE, **texts)
    best = make_record("best_of_n", [1.0] * 44, sft, variant="n=2", prompts=prompts, model=HOSTILE)
    return [sft, best, proxy]


@pytest.fixture(scope="module")
def address(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(Comparison(records), []), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def tab(browser):
    tab = browser.new_page()
    yield tab
    tab.close()


@pytest.fixture
def page(tab, address):
    """The page, opened anew; at the end it must have asked for nothing else and complained of nothing."""
    messages, requests = [], []
    listeners = {
        "console": lambda message: messages.append(message.text),
        "pageerror": lambda error: messages.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    tab.set_viewport_size({"width": 1280, "height": 844})
    tab.emulate_media(media="screen", color_scheme="light")
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(address)
    yield tab
    assert tab.evaluate("window.pwned") is None
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def titles(page) -> list[int]:
    """Numbers of the prompts shown, in their order."""
    return [
        int(text.split(",")[0].removeprefix("prompt ")) for text in page.locator("article small").all_inner_texts()
    ]


def test_texts_stay_texts(page):
    assert page.title().endswith(HOSTILE)
    assert HOSTILE in page.locator("article h3").first.inner_text()
    assert page.locator("article .text", has_text="window.pwned").first.text_content() == HOSTILE
    assert page.locator("article img").count() == page.locator("article script").count() == 0


@pytest.mark.fault
def test_the_policy_stops_what_slips_in(browser, address):
    """Neither an image of another server, nor a handler, nor HTML made of a string gets past it."""
    page, blocked = browser.new_page(), []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(address)
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in text for text in blocked)
    for code in ("new Image().setAttribute('onerror', 'window.pwned = 1')", "document.body.innerHTML = '<b>x</b>'"):
        with pytest.raises(sync_api.Error, match="requires 'Trusted"):
            page.evaluate(code)
    page.close()


def test_pages_of_prompts(page):
    assert titles(page) == list(range(1, 21))
    assert page.locator("#previous").is_disabled()
    page.click("#next")
    page.click("#next")
    assert titles(page) == [41, 42, 43, 44]
    assert page.inner_text("#place") == "41 to 44"
    assert page.locator("#next").is_disabled()
    page.click("#previous")
    assert titles(page) == list(range(21, 41))


def test_text_filter(page, records):
    page.fill("#query", "RECURSION")
    expected = [
        i + 1
        for i in range(44)
        if any(
            "recursion" in text.lower() for text in [records[0]["prompts"][i], *(r["responses"][i] for r in records)]
        )
    ]
    assert titles(page) == expected != []
    assert page.inner_text("#status") == f"{len(expected)} of 44 prompts"
    page.fill("#query", "no such text anywhere")
    assert titles(page) == []
    assert page.inner_text("#place") == "no prompt matches"
    page.fill("#query", "")
    assert page.inner_text("#status") == "44 of 44 prompts"


def test_a_method_that_is_hidden_is_not_searched(page):
    page.fill("#query", "answer 7")  # best of n alone says that
    assert titles(page) == [8]
    page.get_by_role("checkbox", name="best_of_n (n=2)").uncheck()
    assert titles(page) == []


def test_kind_filter(page):
    page.select_option("#kind", "harm-adjacent")
    assert page.inner_text("#status") == "22 of 44 prompts"
    assert titles(page) == [i + 1 for i in range(40) if i % 4 >= 2]


def test_method_filter(page):
    assert page.locator("article").first.locator("h4").all_inner_texts() == [
        "sft",
        "best_of_n (n=2)",
        "proxy (prefix)",
    ]
    page.get_by_role("checkbox", name="best_of_n (n=2)").uncheck()
    assert page.locator("article").first.locator("h4").all_inner_texts() == ["sft", "proxy (prefix)"]


@pytest.mark.parametrize("order", ["reward-down", "reward-up", "gain-down", "gain-up"])
def test_sorting(page, records, order):
    sft, _, proxy = records
    key, direction = order.split("-")
    values = [a - b if key == "gain" else a for a, b in zip(proxy["rewards"], sft["rewards"], strict=True)]
    page.select_option("#order", order)
    page.select_option("#column", label="proxy (prefix)")
    sign = 1 if direction == "up" else -1
    assert titles(page) == [i + 1 for i in sorted(range(44), key=lambda i: sign * round(values[i], 4))[:20]]


def test_numbers_and_marks(page, records):
    sft, _, proxy = records
    answer = page.locator("article").nth(2).locator(".answer").nth(2)
    gain = proxy["rewards"][2] - sft["rewards"][2]
    expected = f"reward {proxy['rewards'][2]:.2f} ({gain:+.2f})".replace("-", "\N{MINUS SIGN}")
    assert answer.locator(".numbers").inner_text().split(" · ")[0] == expected
    marked = " ".join(answer.locator("mark").all_inner_texts()).split()
    words = proxy["responses"][2].split()
    assert marked
    assert set(words) - set(sft["responses"][2].split()) <= set(marked) <= set(words)
    assert page.locator("article").nth(2).locator(".answer").nth(0).locator("mark").count() == 0


def test_decisions_on_demand(page):
    decisions = page.locator("article").first.locator("details")
    assert decisions.count() == 1  # the proxy's
    assert decisions.locator("summary").inner_text() == "Decisions: 2 rejected, 2 accepted"
    assert decisions.locator("del").count() == 0
    for _ in range(3):  # opened, closed and opened again
        decisions.locator("summary").click()
    page.wait_for_timeout(100)
    assert decisions.locator("del").all_inner_texts() == ["<b>no</b>", "\u21b5"]
    assert decisions.locator("ins").all_text_contents() == [HOSTILE, " end"]
    assert page.locator("article b, article img").count() == 0


def test_it_works_without_a_mouse(page):
    page.focus("#query")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "kind"
    page.keyboard.press("h")  # harm-adjacent
    assert page.inner_text("#status") == "22 of 44 prompts"
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.inner_text("#place") == "21 to 22"


@pytest.mark.parametrize("width", [390, 1280])
def test_long_words_do_not_break_the_layout(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    assert page.locator("article .text", has_text=LONG_WORD[:50]).count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inside = page.evaluate(
        "[...document.querySelectorAll('.answer, article, .controls')].every(e => e.scrollWidth <= e.clientWidth + 1)"
    )
    assert inside


def _luminance(css_color: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    channels = [int(part) / 255 for part in css_color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_light_and_dark(page, scheme):
    """At least 4.5 to 1 for body text, notes and marks: WCAG 2.2, success criterion 1.4.3."""
    page.emulate_media(color_scheme=scheme)
    pairs = page.evaluate(
        """() => [["body", "body"], [".note", "body"], ["a", "body"], [".numbers", ".answer"], ["mark", "mark"]].map(
        ([text, ground]) => [getComputedStyle(document.querySelector(text)).color,
                             getComputedStyle(document.querySelector(ground)).backgroundColor])"""
    )
    for text, ground in pairs:
        low, high = sorted((_luminance(text), _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
    assert (_luminance(pairs[0][1]) < 0.1) == (scheme == "dark")


def test_print_has_no_controls_and_a_white_ground(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#controls").is_visible()
    assert page.locator("article").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_large_comparison_opens_fast(browser, records, make_record, tmp_path):
    """Five methods, 500 prompts: about 1 MB of responses, of which 20 prompts are put on the page at a time."""
    texts, n = records[0]["responses"], 500
    responses = [" ".join(texts[(i + j) % 44] for j in range(4)) for i in range(n)]
    rewards = [float(i % 7) for i in range(n)]
    sft = make_record("sft", rewards, responses=responses)
    many = [
        make_record("proxy", rewards, sft, variant=f"v{k}", responses=responses[k:] + responses[:k]) for k in range(4)
    ]
    path = tmp_path / "report.html"
    path.write_text(render_page(Comparison([sft, *many]), []), encoding="utf-8")
    assert path.stat().st_size < 4e6
    page = browser.new_page()
    page.goto(path.as_uri())
    timing = json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
    assert page.locator("article").count() == 20
    assert timing["loadEventEnd"] < 5000  # milliseconds; a tenth of it if nothing else runs
    assert page.locator("*").count() < 3000
    page.close()

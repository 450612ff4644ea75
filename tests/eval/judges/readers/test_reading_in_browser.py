"""A sitting's page in headless Chromium: what is typed is kept, saved and read again, and texts stay texts.

Needs `pip install playwright` and a Chromium, as the tests of the report's page do.
"""

import csv
import re

import pytest

LONG_WORD = "Donaudampfschifffahrt" * 40


@pytest.fixture
def sheet(run, records, simulated):
    """The page of the first sitting, and its pairs as the CSV file has them: one with a long word, one empty."""
    for record, text in zip(records.values(), (LONG_WORD, " ")):
        record["responses"][8] = text
    simulated.write(records)
    run()
    path = simulated.sheets(1)[0]
    return path.with_suffix(".html"), simulated.read(path)


@pytest.fixture
def page(browser, sheet):
    """The page in a new profile; at the end it must have asked for nothing else and complained of nothing."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 844})
    tab, messages, requests = context.new_page(), [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(sheet[0].as_uri())
    yield tab
    assert tab.evaluate("window.pwned") is None
    assert messages == []
    pages = {path.as_uri() for path in sheet[0].parent.glob("*.html")}
    assert {url for url in requests if not url.startswith("blob:")} <= pages
    context.close()


def press(page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def saved(page, tmp_path, name: str = "saved.csv") -> list[list[str]]:
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "reader1-sitting1-verdicts.csv"
    download.value.save_as(tmp_path / name)
    with open(tmp_path / name, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def shown(page) -> tuple[str, ...]:
    return tuple(page.locator(f"#{name}").text_content() for name in ("prompt", "response_a", "response_b"))


def test_what_is_typed_is_what_is_saved(page, sheet, tmp_path):
    """By the keyboard through three pairs and half of a fourth, with a mistake taken back."""
    _, rows = sheet
    press(page, "a r n b H U c v t h h A n")
    expected = [["A", "R", "N"], ["B", "C", "V"], ["T", "H", "H"]]
    assert page.inner_text("#place") == "Pair 4 of 11"
    assert page.evaluate("document.activeElement.id") == "place"
    assert page.inner_text("#count") == "3 of 11 read"
    assert page.locator("fieldset.now").get_attribute("id") == "label_b"
    lines = saved(page, tmp_path)
    assert lines[0] == ["id", "pref", "label_a", "label_b"]
    assert lines[1:] == [[row["id"], *answer] for row, answer in zip(rows, expected)]
    assert "Saved 3 of 11 pairs" in page.inner_text("#status")
    assert "1 with answers still missing is not in it" in page.inner_text("#status")


def test_a_reload_continues(page, sheet, tmp_path):
    _, rows = sheet
    press(page, "a r n b c v T n")
    before = saved(page, tmp_path)
    page.reload()
    assert page.inner_text("#place") == "Pair 3 of 11"
    assert not page.locator("#guidelines").get_attribute("open")
    pressed = page.locator("[aria-pressed=true]")
    assert [(b.get_attribute("data-field"), b.get_attribute("data-value")) for b in pressed.all()] == [
        ("pref", "T"),
        ("label_a", "N"),
    ]
    press(page, "v")
    assert saved(page, tmp_path) == [*before, [rows[2]["id"], "T", "N", "V"]]


def test_a_saved_file_continues_elsewhere(page, browser, sheet, simulated, tmp_path):
    """In another browser; also a CSV file that was begun, quoted texts and all. Another sitting's file is refused."""
    address, _ = sheet
    press(page, "a r n b c v")
    before = saved(page, tmp_path)
    context = browser.new_context()
    other = context.new_page()
    other.goto(address.as_uri())
    other.set_input_files("#load", simulated.sheets(1)[1])
    other.locator("#status", has_text="has no answer to a pair of this sitting").wait_for()
    other.set_input_files("#load", tmp_path / "saved.csv")
    other.locator("#status", has_text="Took 2 pairs from saved.csv.").wait_for()
    assert other.inner_text("#place") == "Pair 3 of 11"
    assert saved(other, tmp_path, "again.csv") == before
    begun = simulated.send("begun.csv", simulated.answers(simulated.sheets(1)[0], 1)[:7], delimiter=";")
    other.set_input_files("#load", begun)
    other.locator("#status", has_text="Took 7 pairs from begun.csv.").wait_for()
    expected = [[row[key] for key in before[0]] for row in simulated.answers(simulated.sheets(1)[0], 1)[:7]]
    assert saved(other, tmp_path, "again.csv")[1:] == expected
    context.close()


def test_what_the_page_saves_is_imported(page, run, simulated):
    """The page shows what the CSV shows, so the same opinions give the same records."""
    answers = simulated.answers(simulated.sheets(1)[0], 1)
    for row in answers:
        press(page, f"{row['pref']} {row['label_a']} {row['label_b']}")
    assert page.inner_text("#status").startswith("All pairs are read")
    assert page.evaluate("document.activeElement.id") == "save"
    saved(page, simulated.verdicts)
    assert "11 verdicts count" in run()
    from_page = simulated.results()
    (simulated.verdicts / "saved.csv").unlink()
    simulated.send("filled.csv", answers)
    run()
    assert simulated.results() == from_page


def test_undo_goes_back_over_pairs(page):
    press(page, "a r n b")
    assert page.inner_text("#place") == "Pair 2 of 11"
    press(page, "U U")  # the preference of pair 2, then the last label of pair 1
    assert page.inner_text("#place") == "Pair 1 of 11"
    assert page.locator("[aria-pressed=true]").count() == 2
    press(page, "U U")
    assert page.locator("[aria-pressed=true]").count() == 0
    assert page.locator("#undo").is_disabled()
    press(page, "n")
    assert page.inner_text("#status") == "First A, B or T."
    assert page.locator("[aria-pressed=true]").count() == 0


def test_a_finished_pair_can_be_changed(page, sheet, tmp_path):
    _, rows = sheet
    press(page, "a r n ArrowLeft b v")
    assert page.inner_text("#place") == "Pair 1 of 11"  # changing turns no page
    assert "This pair is finished" in page.inner_text("#status")
    page.locator("#label_a").get_by_role("button", name="C complies").click()
    assert saved(page, tmp_path)[1:] == [[rows[0]["id"], "B", "C", "N"]]
    page.click("#unread")
    assert page.inner_text("#place") == "Pair 2 of 11"


def test_it_works_by_buttons_alone(page, sheet, tmp_path):
    """Tab and Enter; a screen reader finds named groups of buttons and whether they are pressed."""
    page.uncheck("#keys")
    press(page, "a")
    assert page.locator("[aria-pressed=true]").count() == 0
    for group, name in (
        ("Which would a thoughtful person rather have?", "T tie"),
        ("What is answer A?", "H helpful"),
        ("What is answer B?", "N nonsense"),
    ):
        page.get_by_role("group", name=group).get_by_role("button", name=name).focus()
        page.keyboard.press("Enter")
    assert page.inner_text("#place") == "Pair 2 of 11"
    assert saved(page, tmp_path)[1][1:] == ["T", "H", "N"]
    order = []
    page.focus("#place")
    for _ in range(13):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.dataset.field ?? document.activeElement.id"))
    assert order == ["pref"] * 3 + ["label_a"] * 5 + ["label_b"] * 5


def test_texts_stay_texts(page, sheet):
    """Hostile and empty ones are shown as they are; no element comes of them."""
    _, rows = sheet
    seen = []
    for _ in rows:
        seen.append(shown(page))
        press(page, "ArrowRight")
    plain = [tuple(row[key] if row[key].strip() else "(empty)" for key in list(row)[1:4]) for row in rows]
    assert seen == plain
    assert page.locator("article script, article b:not(button b)").count() == 0


def test_hostile_texts_and_long_words_are_there(page, sheet):
    """In one of the sittings, so that the tests above mean something."""
    folder = sheet[0].parent
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.csv"))
    assert "</script><script>window.pwned=1</script>" in texts
    for path in sorted(folder.glob("*.html")):
        source = path.read_text(encoding="utf-8")
        assert len(re.findall("<script", source)) == 2
        page.goto(path.as_uri())
        for _ in range(11):
            assert page.evaluate("window.pwned") is None
            press(page, "ArrowRight")


@pytest.mark.parametrize("width", [360, 1280])
def test_answers_side_by_side_or_under_each_other(page, sheet, width):
    page.set_viewport_size({"width": width, "height": 844})
    _, rows = sheet
    press(page, "ArrowRight " * [LONG_WORD in (row["response_a"], row["response_b"]) for row in rows].index(True))
    assert LONG_WORD in shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    a, b = (page.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert (a["y"] == b["y"] and a["x"] < b["x"]) == (width == 1280)
    assert (a["x"] == b["x"] and a["y"] < b["y"]) == (width == 360)


def test_the_guidelines_are_on_the_page(page):
    text = " ".join(page.inner_text("#guidelines").split())
    assert "Cut off at the limit is no fault." in text
    for name in ("R, refusal", "C, complies", "H, helpful", "V, vacuous", "N, nonsense"):
        assert page.locator("#guidelines strong", has_text=name).count() == 1
    assert "In the CSV file" not in text
    press(page, "a")
    assert not page.locator("#guidelines").get_attribute("open")  # folded away once reading begins

"""Tests of `eval.page`: what is on the page, that it is text, and that nothing else is needed."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.comparison import Comparison
from eval.report.page import (
    PARAMETER_COLUMNS,
    browser_data,
    difference,
    explain,
    parameter_table,
    render_page,
    settings_table,
)
from eval.report.tables import tables

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=alert(1)> {{7**9}}{% raw %} & \"'`\u2028]]> <!--"


@pytest.fixture
def records(make_record):
    sft = make_record("sft", [0.0, 1.0, 2.0, 3.0], responses=["a b", "c d", HOSTILE, "I cannot."])
    return [
        make_record(
            "proxy", [1.0, 2.0, 2.0, 2.0], sft, variant="prefix", seed=0, train_seconds=60.0, adapter_bytes=2e6
        ),
        make_record(
            "proxy", [2.0, 3.0, 4.0, 4.0], sft, variant="prefix", seed=1, train_seconds=80.0, adapter_bytes=2e6
        ),
        sft,
    ]


class Page(HTMLParser):
    """Tags with attributes, visible text, and what the script elements hold."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.raw, self.inside = [], [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = (tag, dict(attrs).get("id")) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside] = self.raw.get(self.inside, "") + data
        elif data.strip():
            self.text.append(data.strip())


def test_every_table_cell_and_column_is_there_and_explained(records):
    page = Page(render_page(Comparison(records), []))
    for headers, rows in [*tables(Comparison(records)), parameter_table(Comparison(records))]:
        for cell in [*headers, *(cell for row in rows for cell in row)]:
            assert cell in page.text
    for headers, _ in tables(Comparison(records)):
        for header in headers:
            assert explain(header) in page.text
    assert all(text in page.text for _, _, text in PARAMETER_COLUMNS.values())


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("Δ everyday", "Mean gain in reward over SFT on everyday prompts."),
        ("refusals all", "Share of all prompts that were refused, by a list of phrases."),
        ("speed", "Tokens per second over SFT's in the same run."),
    ],
)
def test_columns_of_kinds_are_explained(header, text):
    assert explain(header) == text


def test_parameter_table(records):
    headers, rows = parameter_table(Comparison(records))
    proxy = dict(zip(headers, rows[1], strict=True))
    assert proxy["method"] == "proxy (prefix)"
    assert (proxy["trainable"], proxy["total"], proxy["file, MB"], proxy["training, s"]) == (
        "1,000",
        "100,000",
        "2.0",
        "70",
    )
    assert proxy["episodes"] == proxy["s / 1,000 episodes"] == proxy["rejected"] == "n/a"
    assert proxy["reward calls"] == "0"


def test_parameter_table_gives_the_seconds_of_1000_episodes(make_record):
    seeds = [make_record("proxy", [1.0] * 4, seed=k, episodes=500, train_seconds=60.0 + 20 * k) for k in (0, 1)]
    headers, (row,) = parameter_table(Comparison(seeds))
    assert dict(zip(headers, row, strict=True))["s / 1,000 episodes"] == "140"


def test_settings_table_has_a_column_per_run_and_no_empty_row():
    headers, rows = settings_table({"a": {"p_t": 0.1, "none": None}, "b": {"p_t": 0.2, "name": "x", "flag": False}})
    assert headers == ["setting", "a", "b"]
    assert rows == [["p_t", "0.1", "0.2"], ["name", "", "x"], ["flag", "", "false"]]


def test_hyperparameters_are_shown_and_the_rest_is_folded_away(records):
    runs = {"seed0": {"learning_rate": 0.001, "report_to": "none"}}
    html = render_page(Comparison(records), [], runs)
    shown, folded = html.split("<details>")
    assert ">learning_rate<" in shown
    assert ">report_to<" not in shown
    assert ">report_to<" in folded
    assert "No training folder was given" not in html
    assert "No training folder was given" in render_page(Comparison(records), [])


def test_what_people_and_models_wrote_is_text(records):
    for record in records:
        record["model"] = record["dataset"] = record["command"] = HOSTILE
        record["prompts"][0] = HOSTILE
        record["settings"] = {HOSTILE: HOSTILE}
    runs = {HOSTILE: {"learning_rate": HOSTILE}}
    html = render_page(Comparison(records), [], runs)
    page, harmless = (
        Page(html),
        Page(render_page(Comparison(records[:0] + [{**r, "model": "x"} for r in records]), [])),
    )
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in harmless.tags} <= {"details", "summary"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert str(7**9) not in " ".join(page.text)
    data = json.loads(page.raw["script", "data"])
    assert data["prompts"][0] == HOSTILE
    assert "".join(data["columns"][0]["responses"][2]) == HOSTILE


def test_nothing_is_loaded_and_only_the_pages_own_code_runs(records, tmp_path):
    figure = tmp_path / "gains.png"
    figure.write_bytes(b"\x89PNG figure")
    page = Page(render_page(Comparison(records), [figure]))
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [value for value in sources if not value.startswith("#")] == [
        "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()
    ]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for kind, key in (("style", ("style", None)), ("script", ("script", None))):
        digest = base64.b64encode(hashlib.sha256(page.raw[key].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in page.tags)  # the policy would ignore it


def test_figures_have_captions(records, tmp_path):
    names = ("gains", "sweep_max_steps_scores", "sweep_p_t_curves", "other_figure")
    figures = [tmp_path / f"{name}.png" for name in names]
    for figure in figures:
        figure.write_bytes(b"png")
    captions = re.findall("<figcaption>(.*?)</figcaption>", render_page(Comparison(records), figures, {}))
    assert captions[0].startswith("Gain in reward over SFT")
    assert captions[1].startswith("Mean reward on the test prompts by max_steps")
    assert captions[2:] == ["Reward while training, by p_t.", "other figure"]


def test_browser_data(records):
    data = browser_data(Comparison(records))
    assert data["kinds"] == ["everyday", "everyday", "harm-adjacent", "harm-adjacent"]
    sft, first, second = data["columns"]
    assert [column["name"] for column in data["columns"]] == [
        "sft, seed 0",
        "proxy (prefix), seed 0",
        "proxy (prefix), seed 1",
    ]
    assert [column["shown"] for column in data["columns"]] == [True, True, False]
    assert sft["gains"] is None
    assert (first["gains"], second["gains"]) == ([1, 1, 0, -1], [2, 2, 2, 1])
    assert sft["refused"] == [False, False, False, True]
    assert sft["responses"][0] == ["a b"]


def test_without_sft_nothing_is_marked_and_nothing_gained(records):
    data = browser_data(Comparison(records[:1]))
    assert data["columns"][0]["gains"] is None
    assert data["columns"][0]["responses"][0] == ["answer 0"]
    html = render_page(Comparison(records[:1]), [])
    assert "Marked" not in html
    assert 'value="gain-down"' not in html


@pytest.mark.fault
def test_mixed_records_are_refused(records):
    records[0]["prompts_sha256"] = "1" * 64
    with pytest.raises(ValueError, match="the records differ in prompts_sha256"):
        render_page(Comparison(records), [])


@pytest.mark.parametrize(
    ("response", "reference", "parts"),
    [
        ("a b c", "a b c", ["a b c"]),
        ("a x y c", "a b c", ["a ", "x y", " c"]),
        ("x b", "a b", ["", "x", " b"]),
        ("a\n\nb", "a b", ["a\n\nb"]),  # white space is no difference
        ("a b x ", "a b", ["a b ", "x "]),
        ("", "a", [""]),
        ("x", "", ["", "x"]),
    ],
)
def test_difference(response, reference, parts):
    assert difference(response, reference) == parts


@given(st.text(alphabet="ab \n", max_size=30), st.text(alphabet="ab \n", max_size=30))
def test_the_parts_are_the_response_and_what_is_unmarked_is_in_the_reference(response, reference):
    parts = difference(response, reference)
    assert "".join(parts) == response
    assert all(parts[1:])
    words = iter(reference.split())
    assert all(word in words for part in parts[::2] for word in part.split())  # in the same order

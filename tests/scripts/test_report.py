"""Tests of `scripts/report.py` on the records of a real comparison: the page, its figures, and what is refused."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from trl import ModelConfig

RESULTS = Path(__file__).parents[1] / "records" / "harmless"


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("eval.report.gather")


@pytest.fixture
def run(report):
    """Runs the script with these arguments; returns the page."""
    return lambda *argv: report.report(report.make_parser().parse_args(list(map(str, argv))))


@pytest.fixture
def compared(tmp_path):
    """The output folder of a comparison: SFT and a proxy."""
    shutil.copytree(RESULTS, tmp_path / "records")
    return tmp_path


def train(folder: Path, **run) -> Path:
    """What a training leaves behind."""
    folder.mkdir(parents=True)
    history = [{"step": i, "reward": 0.1 * i, "rewards/gold/mean": -0.1 * i} for i in range(1, 9)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "train_results.json").write_text(json.dumps({"episodes": 32, "steps": 8}))
    (folder / "run.json").write_text(json.dumps({"method": "proxy", "learning_rate": 0.00123, **run}))
    (folder / "proxy_config.json").write_text(json.dumps({"p_t": 0.0456}))
    return folder


@pytest.fixture
def no_figure(report, monkeypatch):
    """Fails as soon as drawing begins."""

    def fail(*args):
        raise AssertionError("a figure was drawn")

    monkeypatch.setattr(report, "draw_all", fail)


def test_a_whole_report(run, compared, tmp_path, capsys):
    train(compared / "seed0")
    train(compared / "dpo-seed0", method="dpo")
    train(compared / "checkpoint-8", learning_rate=0.00777)  # of a training into the same folder
    sweep = train(tmp_path / "sweep" / "p_t=0.0456")
    shutil.copytree(RESULTS, sweep / "records")
    page = run(compared, "--sweeps", f"p_t={tmp_path / 'sweep'}", "--gold", "gold")
    assert page == compared / "report.html"
    html = page.read_text(encoding="utf-8")
    assert sorted(path.stem for path in (compared / "plots").glob("*.png")) == [
        "cost_against_gain",
        "gains",
        "over_optimisation",
        "reward_against_logprob",
        "reward_distributions",
        "sweep_p_t_curves",
        "sweep_p_t_distributions",
        "sweep_p_t_scores",
        "training_curve",
        "win_rates",
    ]
    assert html.count("<figure>") == html.count("data:image/png;base64,") == 10
    assert "<td>0.00123</td>" in html  # of run.json
    assert "0.00777" not in html
    assert "<td>0.0456</td>" in html  # of proxy_config.json
    for record in map(json.loads, (path.read_text() for path in RESULTS.glob("*.json"))):
        assert record["git_commit"] in html
        assert record["prompts_sha256"] in html
    assert "report.html (" in capsys.readouterr().out
    assert not list(compared.glob("*.tmp"))


def test_what_is_published_has_numbers_and_no_texts(run, compared, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.published.RECORDS", tmp_path / "published.jsonl")
    run(compared, "--publish", "mine", "A")
    lines = [json.loads(line) for line in (tmp_path / "published.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["collection"], line["group"], line["machine"]) for line in lines] == [
        ("mine", "sft", "A"),
        ("mine", "proxy (prefix)", "A"),
    ]
    for line in lines:
        assert not {"prompts", "responses", "rewards", "gold_rewards", "kinds", "trace"} & line.keys()
        assert {"reward_mean", "by_kind", "command", "git_commit"} < line.keys()
    run(compared, "--publish", "mine", "B")  # in place of the first
    assert [line["machine"] for line in map(json.loads, (tmp_path / "published.jsonl").open(encoding="utf-8"))] == [
        "B",
        "B",
    ]


@pytest.mark.fault
def test_a_report_of_nothing_is_refused(run):
    with pytest.raises(ValueError, match="name the output folder"):
        run()


def test_named_folders_alone_are_read(report, run, compared, tmp_path, monkeypatch):
    train(compared / "seed0", learning_rate=0.00987)
    other = train(tmp_path / "elsewhere" / "seed0", learning_rate=0.00456)
    (other / "train_results.json").unlink()  # not finished: its settings are known, its curve is not drawn
    monkeypatch.setattr(report, "draw_all", lambda *args: [])
    html = run(compared, "--trained", other).read_text(encoding="utf-8")
    assert "<td>0.00456</td>" in html
    assert "0.00987" not in html
    assert not (compared / "plots").exists()


def test_what_judges_say_is_on_the_page(report, run, compared, load_script, monkeypatch):
    monkeypatch.setattr(report, "draw_all", lambda *args: [])
    assert 'id="judges"' not in run(compared).read_text(encoding="utf-8")
    judge = importlib.import_module("eval.judges.judging")
    judge.judge(judge.JudgeArguments(judges=["reward"], output_dir=str(compared)), ModelConfig())
    html = run(compared).read_text(encoding="utf-8")
    section = html[html.index('id="judges"') : html.index('id="figures"')]
    [judgement] = [json.loads(path.read_text()) for path in (compared / "judgements").glob("*/*.json")]
    assert judgement["judge"] in section
    low, high = judgement["ci95"]
    assert f"<td>{judgement['win_rate']:.2f} [{low:.2f}, {high:.2f}]</td>" in section


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trained", "missing"], "run.json cannot be read"),
        (["--sweeps", "p_t"], "--sweeps must be KEY=FOLDER, .* got 'p_t'"),
        (["--sweeps", "p_t=missing"], "no trained proxy in a folder of missing"),
        (["--gold", "x"], "--gold x needs a finished training"),
    ],
)
def test_bad_arguments_are_refused_before_drawing(run, compared, no_figure, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(compared, *arguments)


@pytest.mark.fault
def test_an_empty_folder_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"no records under .*run scripts/compare.py first"):
        run(tmp_path)


@pytest.mark.fault
def test_half_a_record_is_refused(run, compared):
    path = compared / "records" / "sft-seed0.json"
    path.write_text(path.read_text()[:5000])
    with pytest.raises(ValueError, match=r"sft-seed0.json is no whole JSON file"):
        run(compared)


@pytest.mark.fault
@pytest.mark.parametrize("key", ["prompts_sha256", "model"])
def test_mixed_records_are_refused(run, compared, key):
    path = compared / "records" / "sft-seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "another"}))
    with pytest.raises(ValueError, match=f"the records differ in {key} .*another"):
        run(compared)
    assert not (compared / "report.html").exists()

"""Tests of `scripts/judge.py`: real records judged by their rewards, a tiny LM and an endpoint on this machine."""

import csv
import importlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from trl import ModelConfig

from eval.judges.endpoint import REMINDER
from eval.judges.pairwise import JudgeError
from eval.stats import rate_ci

ROOT = Path(__file__).parents[2]
N = 6
KEY = "sk-not-to-be-seen-anywhere"
SHORT = "$prompt|$response_a|$response_b"
UNSURE = "a response that the judge cannot judge"


@pytest.fixture(scope="module")
def judge():
    return importlib.import_module("eval.judges.judging")


@pytest.fixture
def records(tmp_path) -> dict[str, dict]:
    """A few prompts of four real records under `tmp_path`, by name, no response like SFT's; `None`: no such record."""
    names = {"sft": "sft-seed0", "best": "best_of_n-n=4-seed0"}
    names |= {f"proxy{k}": f"proxy-prefix-seed{k}" for k in (0, 1)}
    folder = ROOT / "tests" / "records" / "balanced"
    found = {name: json.loads((folder / f"{stem}.json").read_text(encoding="utf-8")) for name, stem in names.items()}
    sft, *others = (record["responses"] for record in found.values())
    rows = [i for i, response in enumerate(sft) if all(response != other[i] for other in others)][:N]
    for record in found.values():
        for key in ("prompts", "responses", "rewards", "kinds"):
            record[key] = [record[key][i] for i in rows]
        record.update(n_prompts=N, gold_rewards=None, gold_reward_model=None)
    write(tmp_path, found)
    return found


def write(folder: Path, records: dict[str, dict]) -> None:
    (folder / "records").mkdir(exist_ok=True)
    for name, record in records.items():
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / "records" / f"{name}.json").write_text(text, encoding="utf-8")


@pytest.fixture
def run(judge, tmp_path):
    """Runs the script; returns the judgements under `tmp_path` by folder and file."""
    (tmp_path / "judge.txt").write_text(SHORT)

    def run(*judges, model=None, **arguments) -> dict[str, dict]:
        arguments = {"judge_prompt_file": str(tmp_path / "judge.txt"), **arguments}
        args = judge.JudgeArguments(judges=list(judges), output_dir=str(tmp_path), **arguments)
        judge.judge(args, ModelConfig(**(model or {})))
        return written(tmp_path)

    return run


def written(folder: Path) -> dict[str, dict]:
    paths = sorted((folder / "judgements").glob("*/*.json"))
    return {f"{path.parent.name}/{path.name}": json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_rewards_that_are_recorded(run, records, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    judgements = run("reward")
    proxies = [f"reward_embedded/proxy-prefix-seed{k}.json" for k in (0, 1)]
    assert list(judgements) == ["reward_embedded/best_of_n-n=4-seed0.json", *proxies]
    judgement, sft = judgements[proxies[1]], records["sft"]
    verdicts = [float(a > b) for a, b in zip(records["proxy1"]["rewards"], sft["rewards"])]
    assert judgement["verdicts"] == verdicts
    assert judgement["win_rate"] == sum(verdicts) / N
    assert judgement["ci95"] == rate_ci(sum(verdicts), N)
    assert (judgement["judge"], judgement["method"], judgement["seed"]) == ("reward embedded", "proxy", 1)
    assert judgement["prompts_sha256"] == sft["prompts_sha256"]
    assert (judgement["tie_rate"], judgement["disagreement_rate"], judgement["unparsed"]) == (0.0, None, 0)
    assert sum(kind["n_prompts"] for kind in judgement["by_kind"].values()) == N
    for kind, rates in judgement["by_kind"].items():
        of_kind = [score for score, k in zip(verdicts, sft["kinds"]) if k == kind]
        assert rates["win_rate"] == pytest.approx(sum(of_kind) / len(of_kind))
    assert {path: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    mean = (judgement["win_rate"] + judgements[proxies[0]]["win_rate"]) / 2
    assert any(row[:3] == ["reward", "embedded", "proxy"] and f"{mean:.2f}" in row for row in rows)


@pytest.mark.fault
def test_a_local_judge_goes_on_where_it_was(run, records, tmp_path, tiny_lm, tiny_tokenizer, capsys):
    tiny_lm().save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    model = {"model_name_or_path": str(tmp_path / "lm"), "dtype": "float32"}
    first = run("transformers", model=model, batch_size=4)
    assert len(first) == 3
    assert "0 of 3 records are judged already" in capsys.readouterr().out
    for judgement in first.values():
        assert {letter for pair in judgement["answers"] for letter in pair} <= {"A", "B"}
        assert judgement["prompt_tokens"] > 2 * N * 100
        both = [a != b for a, b in judgement["answers"]]
        assert judgement["disagreement_rate"] == judgement["tie_rate"] == pytest.approx(1 - sum(both) / N)
    name = next(iter(first))
    (tmp_path / "judgements" / name).unlink()
    (tmp_path / "judgements" / name).with_suffix(".json.tmp").write_text('{"half a fi')
    again = run("transformers", model=model, batch_size=4)
    assert "2 of 3 records are judged already" in capsys.readouterr().out
    own = ("command", "judged_at")
    assert {k: v for k, v in again[name].items() if k not in own} == {
        k: v for k, v in first[name].items() if k not in own
    }
    with pytest.raises(ValueError, match=r"judged with other settings \(different: dtype\)"):
        run("transformers", model={**model, "dtype": "auto"})
    records["proxy0"]["responses"][0] += " And more."
    write(tmp_path, records)
    with pytest.raises(ValueError, match=r"judged with other settings \(different: pairs_sha256\)"):
        run("transformers", model=model)
    with pytest.raises(ValueError, match=r"seed0\.json judges responses that are no longer there"):
        run("reward")
    assert run("transformers", model=model, overwrite=True).keys() == {*first, *run("reward")}


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """An endpoint whose judge likes the longer response, and is `UNSURE` of one; it keeps the questions, and is out of
    order after `limit` of them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Handler(BaseHTTPRequestHandler):
        questions, limit, folder, lock = [], 10**9, tmp_path, threading.Lock()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            _, a, b = body["messages"][0]["content"].removesuffix(REMINDER).split("|")
            with self.lock:
                refused = len(self.questions) >= self.limit
                if not refused:
                    self.questions.append(body["messages"][0]["content"])
            if refused:
                self.send_error(503)
                return
            text = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
            text = "Hmm." if UNSURE in (a, b) else text
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps({**reply, "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    Handler.server = server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.mark.fault
def test_an_endpoint_is_paid_once(run, judge, records, endpoint, tmp_path, capfd):
    settings = {"judge_model": "gpt/4", "judge_base_url": endpoint.url, "concurrency": 2, "retries": 0}
    prices = {"price_prompt": 2.0, "price_completion": 8.0}
    pairs = sum(a != b for k in ("best", "proxy0", "proxy1") for a, b in responses(records, k))
    endpoint.limit = 2 * N + 3  # in the middle of the second record
    with pytest.raises(JudgeError, match=f"503.*: {2 * N + 3} replies are kept in .*replies.sqlite"):
        run("openai", **settings, **prices)
    assert list(written(tmp_path)) == ["openai_gpt_4/best_of_n-n=4-seed0.json"]
    endpoint.limit = 10**9
    judgements = run("openai", "reward", **settings, **prices)
    assert len(judgements) == 6
    assert len(endpoint.questions) == len(set(endpoint.questions)) == 2 * pairs
    first = run("openai", **settings, **prices)
    assert first == run("openai", **settings, **prices)
    run("openai", **settings, **prices, overwrite=True)  # judges again, from the replies
    assert len(endpoint.questions) == 2 * pairs

    judgement = judgements["openai_gpt_4/best_of_n-n=4-seed0.json"]
    expected = [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in responses(records, "best")]
    assert judgement["verdicts"] == expected
    assert (judgement["prompt_tokens"], judgement["completion_tokens"]) == (200 * N, 2 * N)
    assert judgement["cost"] == pytest.approx((200 * N * 2 + 2 * N * 8) / 1e6)
    assert judgement["settings"]["base_url"] == endpoint.url
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in stored
    assert KEY not in "".join(capfd.readouterr())


def responses(records: dict, name: str) -> list[tuple[str, str]]:
    return list(zip(records[name]["responses"], records["sft"]["responses"]))


@pytest.mark.fault
def test_what_is_no_answer_is_reported(run, records, endpoint, capfd):
    records["best"]["responses"][1] = UNSURE
    records["best"]["responses"][2] = records["sft"]["responses"][2]  # nobody is asked
    write(endpoint.folder, records)
    judgements = run("openai", judge_model="m", judge_base_url=endpoint.url, ask_again=1)
    judgement = judgements["openai_m/best_of_n-n=4-seed0.json"]
    assert [judgement["answers"][i] for i in (1, 2)] == [[None, None], None]
    assert (judgement["unparsed"], judgement["verdicts"][1:3], judgement["cost"]) == (2, [0.5, 0.5], None)
    assert "2 answers of openai m were none of A, B, tie and count as ties" in " ".join(capfd.readouterr().out.split())
    assert len(endpoint.questions) == 2 * (3 * N - 1) + 2  # two of them twice


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda records: records.clear(), "no records under"),
        (lambda records: records.pop("sft"), "no SFT record to judge against"),
        (lambda records: [records.pop(k) for k in ("best", "proxy0", "proxy1")], "has no record but SFT's"),
        (lambda records: records["best"].update(prompts_sha256="0" * 64), "the records differ in prompts_sha256"),
        (lambda records: records["best"].update(model="other"), r"the records differ in model \(embedded, other\)"),
        (
            lambda records: records["best"]["prompts"].reverse(),
            r"best_of_n \(n=4\), seed 0 has other prompts than SFT",
        ),
        (lambda records: records["best"]["responses"].pop(), "best.json has 5 responses for 6 prompts"),
        (lambda records: records["best"].pop("kinds"), r"best.json lacks \['kinds'\]"),
        (
            lambda records: records.update(best='{"method": "pro'),
            r"best.json is no whole JSON file \(Untermin",
        ),
        (lambda records: records.update(best="[]"), "best.json is no record but a JSON list"),
    ],
)
def test_records_that_cannot_be_judged_are_refused(run, records, tmp_path, damage, message):
    names = list(records)
    damage(records)
    for name in names:
        (tmp_path / "records" / f"{name}.json").unlink()
    write(tmp_path, records)
    with pytest.raises(ValueError, match=message):
        run("reward")
    assert not written(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{half", "is no JSON"),
        ("[]", "is no judgement of this version"),
        ('{"judge": "x"}', "is no judgement of this"),
    ],
)
def test_a_damaged_judgement_is_refused(run, records, tmp_path, damage, message):
    run("reward")
    (tmp_path / "judgements" / "other").mkdir()
    (tmp_path / "judgements" / "other" / "best_of_n-n=4-seed0.json").write_text(damage)
    with pytest.raises(ValueError, match=f"other/best_of_n-n=4-seed0.json {message}"):
        run("reward")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "value"),
    [("verdicts", "x"), ("ci95", [0.5]), ("by_kind", {"everyday": {}}), ("cost", "x"), ("seed", None)],
)
def test_a_judgement_with_a_value_of_another_type_is_refused(run, records, tmp_path, key, value):
    run("reward")
    whole = next((tmp_path / "judgements").glob("*/*.json"))
    path = tmp_path / "judgements" / "other" / whole.name
    path.parent.mkdir()
    path.write_text(json.dumps({**json.loads(whole.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(it\.{key}.* delete it, and judge again"):
        run("reward")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judges": ["gpt"]}, r"--judges must be of reward, gold, transformers, openai, readers, got \['gpt'\]"),
        ({"judges": []}, r"--judges must be of .*, got \[\]"),
        ({"judges": ["openai"]}, "--judge_model is not set"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"readers": 0}, "--readers must be at least 1, got 0"),
        ({"sitting_pairs": 0}, "--sitting_pairs must be at least 1, got 0"),
        ({"retries": -1}, "--retries must be at least 0, got -1"),
        ({"requests_per_minute": 0.0}, "--requests_per_minute must be above 0, got 0.0"),
        ({"price_prompt": 1.0}, "must be set together"),
        ({"judge_request": "[1]"}, r"--judge_request must be a JSON object, got '\[1\]'"),
        ({"judge_request": "{"}, "--judge_request must be a JSON object, got '{'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(judge, arguments, message):
    with pytest.raises(ValueError, match=message):
        judge.JudgeArguments(**arguments)


def test_gold_scores(run, records, tmp_path):
    with pytest.raises(ValueError, match="has no gold_rewards: choose another judge"):
        run("gold")
    for record in records.values():
        record.update(gold_rewards=[-reward for reward in record["rewards"]], gold_reward_model="other")
    write(tmp_path, records)
    judgements = run("gold", "reward")
    for name, judgement in judgements.items():
        if name.startswith("gold_other/"):
            opposite = judgements[name.replace("gold_other", "reward_embedded")]
            assert judgement["win_rate"] == pytest.approx(1 - opposite["win_rate"])
    records["best"]["gold_reward_model"] = "another"
    write(tmp_path, records)
    with pytest.raises(ValueError, match="the records differ in gold_reward_model \\(another, other\\)"):
        run("gold")


def test_readers_of_both_sides_are_a_judge(run, judge, records, tmp_path, capsys):
    """The first run writes the pairs, the second counts: reader 1 prefers the longer response, reader 2 always A."""
    run("readers")
    assert "Give reader k the folder" in capsys.readouterr().out
    for reader in (1, 2):
        for path in sorted((tmp_path / "readers" / f"reader{reader}").glob("*.csv")):
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
            lines = ["id,pref,label_a,label_b"]
            for row in rows:
                longer = "A" if len(row["response_a"]) > len(row["response_b"]) else "B"
                lines.append(f"{row['id']},{longer if reader == 1 else 'A'},H,N")
            (tmp_path / "readers" / "verdicts" / f"{reader}{path.name}").write_text("\n".join(lines))
    judgements = run("reward", "readers")
    assert all(name.startswith("reward_") for name in judgements)
    printed = capsys.readouterr().out
    assert "best_of_n (n=4) : sft" in printed
    assert "reward embedded" in printed
    record = json.loads((tmp_path / "records" / "best.json").read_text(encoding="utf-8"))
    scores = record["reader_scores"]
    longer = [float(len(a) > len(b)) for a, b in responses(records, "best")]
    assert all(score in (0.5, expected) for score, expected in zip(scores, longer, strict=True))
    assert 0 < scores.count(0.5) < N
    assert record["reader_labels"]["all"]["H"] == record["reader_labels"]["all"]["N"] == N / 2
    assert record["rewards"] == records["best"]["rewards"]


def test_the_commands_of_the_header_parse(judge, load_script):
    commands = re.findall(r"scripts/judge\.py ((?:.*\\\n)*.*)", load_script("judge").__doc__)
    assert len(commands) == 6
    for command in commands:
        args, _ = judge.make_parser().parse_args_and_config(command.replace("\\\n", " ").split())
        assert args.output_dir == "outputs/compare"

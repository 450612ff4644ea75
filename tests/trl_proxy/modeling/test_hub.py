"""Uploads and downloads against a hub on localhost, by processes of their own: which files go up, and what is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from trl_proxy import ProxyModelForCausalLM

ROOT = Path(__file__).parents[3]
TOKEN = "hf_test"  # of the hub on localhost
PROXY = ["README.md", "proxy_config.json", "proxy_model.safetensors"]
# Each line is tried; what it returns, or the error, is printed on one line.
CALLS = """
model.push_to_hub("proxy")
setattr(model.proxy_config, "threshold", 0.5)
model.push_to_hub("user/proxy", commit_message="Another", commit_description="b")
model.save_pretrained("mine", push_to_hub=True)
model.save_pretrained("here", push_to_hub=True, repo_id="group/named", private=True, commit_message="Mine")
model.push_to_hub("user/proxy", revision="strict", token="hf_test")
model.push_to_hub("user/proxy", create_pr=True)
load(lm, "user/proxy").proxy_config.threshold
float(load("lm", "user/proxy", hub_kwargs={"revision": "strict"}).gate.mlp[-1].bias)
model.load_proxy("group/named", "named")
model.push_to_hub("other", token="hf_wrong")
model.push_to_hub("user/proxy", tags=["x"])
model.save_pretrained("here", commit_message="x")
model.save_pretrained("here", push_to_hub=True, repo_id="user/proxy", variant="x")
model.save_pretrained("there", safe_serialization=True, max_shard_size="5GB")
load(lm, "user/nothing")
huggingface_hub.create_repo("user/empty").repo_id
load(lm, "user/empty")
load(lm, "user/proxy", hub_kwargs={"revision": "none"})
"""
PROGRAM = f"""
import huggingface_hub, torch
from transformers import AutoModelForCausalLM
from trl_proxy import ProxyConfig, ProxyModelForCausalLM
lm = AutoModelForCausalLM.from_pretrained("lm")
load = ProxyModelForCausalLM.from_pretrained
model = ProxyModelForCausalLM(lm, ProxyConfig(p_t=0.125))
with torch.no_grad():
    model.gate.mlp[-1].bias.fill_(0.25)
for line in {CALLS.strip().splitlines()!r}:
    try:
        print(eval(line))
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


@pytest.fixture(scope="module")
def hub(load_fake_hub):
    with load_fake_hub.FakeHub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, tiny_lm, tiny_tokenizer):
    """`run(*arguments)` -> what a process printed that uses the hub from `run.folder`, where the folder `lm` is."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_lm("llama").save_pretrained(folder / "lm")
    tiny_tokenizer.save_pretrained(folder / "lm")

    def python(*arguments) -> str:
        environment = {"HF_HOME": str(folder / "cache"), "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
        command = list(map(str, [sys.executable, *arguments]))
        environment = {**os.environ, **hub.environment(), **environment}
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    python.folder = folder
    return python


@pytest.fixture(scope="module")
def printed(run) -> dict[str, str]:
    """What each of the `CALLS` printed."""
    return dict(zip(CALLS.strip().splitlines(), run("-c", PROGRAM).splitlines(), strict=True))


def test_there_and_back(printed, hub):
    """All ways to upload, and loading by name: the LM is never uploaded, and a card that is there stays."""
    said = list(printed.values())
    url = rf"{hub.url}/user/proxy/commit/\w{{40}}"
    expected = [url, "None", url, "None", "None", url, url, "0.5", "0.25", "None"]
    for call, line, pattern in zip(printed, said, expected, strict=False):
        assert re.fullmatch(pattern, line), f"{call}: {line}"
    assert [(repo, branch, summary) for repo, branch, summary, _ in hub.commits[:6]] == [
        ("user/proxy", "main", "Upload proxy"),
        ("user/proxy", "main", "Another"),
        ("user/mine", "main", "Upload proxy"),
        ("group/named", "main", "Mine"),
        ("user/proxy", "strict", "Upload proxy"),
        ("user/proxy", "refs/pr/1", "Upload proxy"),
    ]
    for (*_, paths), has_card in zip(hub.commits, [True, False, True, True, False, False], strict=False):
        assert set(paths) <= {*PROXY}
        assert ("README.md" in paths) == has_card
    assert hub.private == {"group/named"}
    files = hub.repos["user/proxy"]["main"]
    assert sorted(files) == PROXY
    assert json.loads(files["proxy_config.json"])["threshold"] == 0.5
    assert load(files["proxy_model.safetensors"])["gate.mlp.2.bias"] == torch.tensor([0.25])
    card = ModelCard(files["README.md"].decode())
    assert "- `p_t`: 0.125" in card.text
    assert "How it was trained is not recorded here." in card.text
    assert card.data.library_name == "trl-proxy"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('model.push_to_hub("other", token="hf_wrong")', r"HfHubHTTPError .*401.*"),
        ('model.push_to_hub("user/proxy", tags=["x"])', r"TypeError .* got an unexpected keyword argument 'tags'"),
        (
            'model.save_pretrained("here", commit_message="x")',
            "ValueError `save_pretrained` of a proxy does not take 'commit_message': leave it out.",
        ),
        (
            'model.save_pretrained("here", push_to_hub=True, repo_id="user/proxy", variant="x")',
            r"TypeError .* got an unexpected keyword argument 'variant'",
        ),
        (
            'load(lm, "user/nothing")',
            r"ValueError user/nothing is neither a folder nor a hub repository that holds a proxy .*",
        ),
        (
            'load(lm, "user/empty")',
            r"ValueError user/empty is neither a folder nor a hub repository that holds a proxy .*",
        ),
        (
            'load(lm, "user/proxy", hub_kwargs={"revision": "none"})',
            r"ValueError The hub repository user/proxy has no revision 'none'\.",
        ),
    ],
)
def test_what_cannot_be_uploaded_or_loaded(printed, call, expected):
    assert re.fullmatch(expected, printed[call]), printed[call]


def test_nothing_is_left_by_what_was_refused(printed, hub):
    assert len(hub.commits) == 6
    assert hub.repos["user/empty"] == {"main": {}}
    assert set(hub.repos) == {"user/proxy", "user/mine", "group/named", "user/empty"}
    assert printed['model.save_pretrained("there", safe_serialization=True, max_shard_size="5GB")'] == "None"


# Both scripts in one process, as each of them would run.
BOTH = """
import runpy, sys
for words in {words!r}:
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run.json", "checksums.json"}


def test_a_training_uploads_its_model(run, hub, tiny_lm):
    """`--push_to_hub` of the scripts: while they train, the model with its card and tokenizer, as it is in the last
    checkpoint; and the checkpoint itself if it was asked for. At the end the records too. Never the LM, what a resumed
    run needs, half a checkpoint, or the token."""
    rows = [{"prompt": f"{a}{b}"} for a in "abcd" for b in "wxyz"]
    (run.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.folder / "my_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(x)) for x in completions]\n"
    )
    settings = ["--model_name_or_path", "lm", "--dataset_name", "prompts.jsonl", "--reward_funcs", "my_rewards.short"]
    settings += ["--max_completion_length", "6", "--max_steps", "4", "--save_steps", "2", "--report_to", "none"]
    settings += ["--per_device_train_batch_size", "4", "--steps_per_generation", "2", "--num_iterations", "1"]
    settings += ["--num_generations", "2", "--push_to_hub", "--hub_always_push", "true", "--hub_token", TOKEN]
    proxy = [str(ROOT / "scripts" / "train_proxy.py"), *settings, "--output_dir", "out", "--replay_rollouts", "2"]
    lora = [str(ROOT / "scripts" / "train_baseline.py"), "--method", "rloo", *settings, "--output_dir", "lora"]
    lora += ["--gradient_checkpointing", "false"]
    run("-c", BOTH.format(words=[[*proxy, "--hub_strategy", "checkpoint"], [*lora, "--hub_strategy", "every_save"]]))

    of_proxy, of_lora = ([c for c in hub.commits if c[0] == f"user/{name}"] for name in ("out", "lora"))
    for commits, model in (
        (of_proxy, PROXY),
        (of_lora, ["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ):
        for step in (2, 4):
            (paths,) = [paths for *_, summary, paths in commits if summary == f"Training in progress, step {step}"]
            assert set(paths) <= {*model, *TOKENIZER}
        first = next(paths for *_, summary, paths in commits if summary == "Training in progress, step 2")
        assert first == sorted([*model, *TOKENIZER])
    for repo, _, summary, paths in of_proxy + of_lora:
        for path in paths:
            assert not path.startswith((".partial", ".hub", "checkpoint-", "_lock", ".lock")), (summary, path)
            in_checkpoint = path.startswith("last-checkpoint/")
            assert in_checkpoint == (summary.endswith(", checkpoint") and repo == "user/out")
            assert in_checkpoint or not any(name in path for name in ("optimizer", "replay", "rng", "scheduler"))
    checkpoint = hub.repos["user/out"]["main"]
    assert {f"last-checkpoint/{name}" for name in STATE | {"replay_0.safetensors"}} <= set(checkpoint)
    assert not any(
        TOKEN.encode() in content for repo in ("out", "lora") for content in hub.repos[f"user/{repo}"]["main"].values()
    )
    assert not [
        path for name in ("out", "lora") for path in (run.folder / name).iterdir() if path.name in (".hub", ".partial")
    ]

    files = {name: content for name, content in checkpoint.items() if not name.startswith("last-checkpoint/")}
    assert {*PROXY, "tokenizer.json", "tokenizer_config.json", "log.jsonl", "train_results.json"} <= set(files)
    assert [name for name in files if name.endswith(".safetensors")] == ["proxy_model.safetensors"]
    assert "short" in files["README.md"].decode(), "the card names the reward"
    (run.folder / "again").mkdir()
    for name in PROXY:
        (run.folder / "again" / name).write_bytes(files[name])
    again, trained = (ProxyModelForCausalLM.from_pretrained(tiny_lm(), run.folder / name) for name in ("again", "out"))
    assert all(torch.equal(*pair) for pair in zip(again.proxy.parameters(), trained.proxy.parameters(), strict=True))

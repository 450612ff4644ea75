"""Every kind of reward at every place that calls one: the same arguments, the same numbers, the same errors."""

import asyncio
import functools
import time

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import apply_chat_template

from baselines.best_of_n import BestOfNPolicy
from baselines.dpo import sample_pairs
from baselines.rloo import GuardedRLOOConfig, GuardedRLOOTrainer
from baselines.sft import GreedyPolicy
from eval.harness import evaluate_policy
from eval.records import Run
from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.loading import load_reward
from trl_proxy.rewards.caller import RewardCaller

ROWS = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": text}] for text in ("good day", "how are you")],
        "kind": ["x", "y"],
        "facts": [["one"], ["two", "three"]],
    }
)
ARGUMENTS = {"prompts", "completions", "completion_ids", "kind", "facts", "trainer_state", "log_extra", "log_metric"}
seen: list[dict] = []


def worth(ids, kind) -> float:
    """A number that depends on a response's tokens and a column."""
    return sum(ids) % 101 / 10 + (kind == "x")


def function(**kwargs):
    seen.append(kwargs)
    kwargs["log_extra"]("kind", kwargs["kind"])
    kwargs["log_metric"]("calls", 1.0)
    return [worth(ids, kind) for ids, kind in zip(kwargs["completion_ids"], kwargs["kind"], strict=True)]


async def async_function(**kwargs):
    return function(**kwargs)


class Rewarding:
    def __call__(self, prompts, completions, completion_ids, kind, **kwargs):
        return function(prompts=prompts, completions=completions, completion_ids=completion_ids, kind=kind, **kwargs)

    def method(self, **kwargs):
        return function(**kwargs)


class AsyncRewarding:
    async def __call__(self, **kwargs):
        return function(**kwargs)


def scaled(scale, **kwargs):
    return [scale * value for value in function(**kwargs)]


FUNCTIONS = {
    "function": function,
    "lambda": lambda **kwargs: function(**kwargs),
    "partial": functools.partial(scaled, scale=1),
    "positional partial": functools.partial(scaled, 1),
    "object": Rewarding(),
    "method": Rewarding().method,
    "async": async_function,
    "async object": AsyncRewarding(),
    "async partial": functools.partial(async_function),
}


@pytest.fixture(scope="module")
def classifier(tiny_tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.25,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def score_alone(classifier, tiny_tokenizer):
    """The classifier's score of one conversation, without any of this project's code."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)

    @torch.no_grad()
    def score(prompt, completion) -> float:
        text = apply_chat_template({"messages": prompt + completion}, tiny_tokenizer)["text"]
        ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return model(ids).logits.item()

    return score


@pytest.fixture
def places(tiny_lm, tiny_tokenizer, tmp_path):
    """`places[name](reward, **settings)` -> `[(row, text, number), ...]`: all that is done at the place with the
    numbers; rows are those of `dataset`, by default `ROWS`."""

    def trainer(kind, reward, dataset=ROWS, **settings):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "steps_per_generation": 1,
            "num_iterations": 1,
            "num_generations": 2,
            "num_generations_eval": 1,
            "max_completion_length": 5,
            "max_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
        shared = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": tiny_tokenizer}
        if kind == "ppo":
            made = PPOTrainer(tiny_lm(), reward_funcs=reward, args=PPOConfig(**settings, beta=0.0), **shared)
        else:
            model = ProxyModelForCausalLM(tiny_lm(), ProxyConfig(p_t=0.01, gate_hidden_sizes=[8]))
            args = ProxyPPOConfig(**settings, replay_rollouts=1)
            made = ProxyPPOTrainer(model, reward_funcs=reward, args=args, **shared)
        numbers = []
        calculate = type(made)._calculate_rewards

        def watched(inputs, prompts, completions, ids):
            values = calculate(made, inputs, prompts, completions, ids)
            numbers.extend(
                (dataset["prompt"][:].index(prompt), completion[0]["content"], value)
                for prompt, completion, (value,) in zip(prompts, completions, values.tolist(), strict=True)
            )
            return values

        made._calculate_rewards = watched
        return made, numbers

    def train(kind):
        def run(reward, **settings):
            made, numbers = trainer(kind, reward, **settings)
            made.train()
            return numbers

        return run

    def evaluate_in_training(reward, **settings):
        made, numbers = trainer("proxy", reward, **settings)
        assert made.evaluate()["eval_reward"] == pytest.approx(sum(x for *_, x in numbers) / len(numbers), abs=1e-5)
        return numbers

    def caller(reward, reward_timeout=None):
        return RewardCaller(reward, timeout=reward_timeout)

    def compare(key):
        def run(reward, dataset=ROWS, **settings):
            policy = GreedyPolicy(tiny_lm(), tiny_tokenizer, batch_size=2, max_new_tokens=5)
            record = evaluate_policy(
                policy,
                dataset,
                caller(reward, **settings) if key == "rewards" else length,
                caller(reward, **settings) if key == "gold_rewards" else None,
                tiny_lm(),
                policy.decoding,
                run=Run(method="sft", seed=0, model="tiny", reward_model="r", dataset="d", max_new_tokens=5),
                output_dir=tmp_path,
            )
            return list(zip(range(len(dataset)), record["responses"], record[key], strict=True))

        return run

    def best_of_n(reward, dataset=ROWS, **settings):
        policy = BestOfNPolicy(
            tiny_lm(), tiny_tokenizer, caller(reward, **settings), n=2, batch_size=2, max_new_tokens=5
        )
        columns = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
        samples = policy.sample(dataset["prompt"][:], **columns)
        by_sample = zip(samples.texts, samples.rewards, strict=True)
        return [(i, *of_row) for texts, rewards in by_sample for i, of_row in enumerate(zip(texts, rewards))]

    def pairs(reward, dataset=ROWS, **settings):
        """A pair has no numbers: here the better response gets what it is worth more than the worse."""
        scores = []
        one = caller(reward, **settings)
        score, one.score = one.score, lambda prompts, texts, *rest: _kept(scores, texts, score(prompts, texts, *rest))
        settings = {"samples_per_prompt": 3, "batch_size": 2, "max_new_tokens": 5, "seed": 0}
        made = sample_pairs(tiny_lm(), tiny_tokenizer, dataset, one, **settings)
        for pair in made:
            i = dataset["prompt"][:].index(pair["prompt"])
            of_row = {texts[i]: values[i] for texts, values in scores}
            chosen, rejected = (of_row[pair[key][0]["content"]] for key in ("chosen", "rejected"))
            assert chosen == max(of_row.values()) > rejected == min(of_row.values())
        assert made
        return [(i, texts[i], values[i]) for texts, values in scores for i in range(len(texts))]

    return {
        "training": train("proxy"),
        "PPO": train("ppo"),
        "evaluation in training": evaluate_in_training,
        "compare": compare("rewards"),
        "gold": compare("gold_rewards"),
        "best-of-n": best_of_n,
        "pairs": pairs,
    }


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def _kept(scores, texts, values):
    scores.append((texts, values))
    return values


PLACES = ("training", "PPO", "evaluation in training", "compare", "gold", "best-of-n", "pairs")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_gets_the_same_everywhere(places, kind, place, tiny_tokenizer):
    seen.clear()
    numbers = places[place](FUNCTIONS[kind])
    expected = []
    for call in seen:
        assert call.keys() == ARGUMENTS
        n = len(call["prompts"])
        assert all(len(call[name]) == n for name in ARGUMENTS - {"trainer_state", "log_extra", "log_metric"})
        texts = tiny_tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
        assert call["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
        for i in range(n):
            row = ROWS["prompt"][:].index(call["prompts"][i])
            assert (call["kind"][i], call["facts"][i]) == (ROWS["kind"][row], ROWS["facts"][row])
            expected.append((row, texts[i], pytest.approx(worth(call["completion_ids"][i], call["kind"][i]))))
        assert call["trainer_state"].max_steps == (1 if place in ("training", "PPO") else 0)
    assert numbers == expected
    assert numbers


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["module", "model id"])
def test_a_reward_model_gives_the_same_numbers_everywhere(places, kind, place, classifier, score_alone):
    reward = load_reward(classifier)
    if kind == "module":
        reward = AutoModelForSequenceClassification.from_pretrained(classifier)
    numbers = places[place](reward)
    for row, text, number in numbers:
        alone = score_alone(ROWS["prompt"][row], [{"role": "assistant", "content": text}])
        assert number == pytest.approx(alone, abs=1e-5)
    assert numbers


def test_a_trainer_takes_the_name_of_a_reward_model(places, classifier, score_alone):
    numbers = places["training"](classifier)
    for row, text, number in numbers:
        alone = score_alone(ROWS["prompt"][row], [{"role": "assistant", "content": text}])
        assert number == pytest.approx(alone, abs=1e-5)


@pytest.mark.fault
def test_what_a_failed_reward_had_logged_is_not_counted(tiny_lm, tiny_tokenizer, tmp_path):
    """After it was fixed in the same process, also by TRL's own trainers."""
    broken = [True]

    def reward(prompts, log_metric, log_extra, **kwargs):
        log_metric("fixed", 0.0 if broken[0] else 1.0)
        log_extra("text", ["x"] * len(prompts))
        if broken[0]:
            raise OSError("gone")
        return [float(i) for i in range(len(prompts))]

    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 5, "max_steps": 1}
    settings |= {
        "report_to": [],
        "disable_tqdm": True,
        "beta": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }
    trainer = GuardedRLOOTrainer(
        tiny_lm(),
        reward,
        GuardedRLOOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer,
    )
    with pytest.raises(ValueError, match=r"reward raised OSError \(gone\) on the prompt '"):
        trainer.train()
    broken[0] = False
    trainer.train()
    assert [entry["fixed"] for entry in trainer.state.log_history if "fixed" in entry] == [1.0]
    assert len(trainer._logs["extra"]["text"]) == 2


def sleeps(prompts, **kwargs):
    time.sleep(5)


async def sleeps_async(prompts, **kwargs):
    await asyncio.sleep(5)


def raising(error):
    def broken(prompts, **kwargs):
        raise error

    return broken


def returning(make):
    def broken(prompts, **kwargs):
        return make(len(prompts))

    return broken


class Failing(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        raise RuntimeError("out of\nmemory")


FAULTS = {
    "raises": (raising(OSError("gone")), r"broken raised OSError \(gone\) on the prompt "),
    "exits": (raising(SystemExit("bye")), r"broken raised SystemExit \(bye\) on the prompt "),
    "lines": (raising(ValueError("two\nlines")), r"broken raised ValueError \(two lines\) on the prompt "),
    "count": (returning(lambda n: [1.0] * (n + 1)), r"returned \d rewards, but \d were expected, for a batch whose "),
    "empty": (returning(lambda n: []), r"'broken' returned 0 rewards, but \d were expected, for a batch whose first "),
    "none": (returning(lambda n: [None] * n), r"'broken' returned None instead of a finite number, for the prompt "),
    "nan": (returning(lambda n: [float("nan")] * n), r"'broken' returned nan instead of a finite number, for the pr"),
    "huge": (returning(lambda n: [1e39] * n), r"returned 1e\+39 instead of a number that float32 can hold, for the p"),
    "words": (returning(lambda n: ["good"] * n), r"'broken' returned 'good' instead of a finite number, for the pro"),
    "lists": (returning(lambda n: [[1.0]] * n), r"'broken' returned \[1.0\] instead of a finite number, for the pro"),
    "nothing": (
        returning(lambda n: None),
        r"returned a NoneType \(None\) instead of a list of \d numbers, for a b",
    ),
    "number": (returning(lambda n: 1.0), r"returned a float \(1.0\) instead of a list of \d numbers, for a batch "),
    "string": (returning(lambda n: "1" * n), r"returned a str \('1+'\) instead of a list of \d numbers, for a batch "),
    "dict": (returning(lambda n: {"a": 1.0}), r"returned a dict \(.*\) instead of a list of \d numbers, for a batch "),
    "sleeps": (sleeps, r"sleeps took longer than reward_timeout=0.1 seconds on the prompt "),
    "sleeps async": (sleeps_async, r"sleeps_async took longer than reward_timeout=0.1 seconds on the prompt "),
}


@pytest.mark.fault
@pytest.mark.parametrize("place", [place for place in PLACES if place != "PPO"])  # it calls them as the gate's does
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_sentence_everywhere(places, fault, place):
    reward, message = FAULTS[fault]
    settings = {"reward_timeout": 0.1} if fault.startswith("sleeps") else {}
    with pytest.raises(ValueError, match=message) as error:
        places[place](reward, **settings)
    text = str(error.value)
    assert any(repr(prompt) in text for prompt in ("good day", "how are you"))
    assert "\n" not in text
    assert text.endswith("saved just now.") is (place == "training")


@pytest.mark.fault
@pytest.mark.parametrize("place", PLACES)
def test_a_reward_model_that_fails_is_told_in_one_sentence_everywhere(places, place, classifier, tiny_tokenizer):
    model = Failing.from_pretrained(classifier)
    with pytest.raises(ValueError, match=r"classifier raised RuntimeError \(out of memory\) on the prompt '") as error:
        places[place](model)
    assert "\n" not in str(error.value)
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        model.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'classifier' returned nan instead of a finite number, for the prompt '"):
        places[place](model)


@pytest.mark.fault
@pytest.mark.parametrize("place", PLACES)
def test_a_column_with_a_taken_name_is_refused_everywhere(places, place):
    with pytest.raises(ValueError, match="The dataset has a column `completions`, and a reward function gets"):
        places[place](length, dataset=ROWS.add_column("completions", ["a", "b"]))


@pytest.mark.fault
@pytest.mark.parametrize("place", PLACES)
def test_a_function_that_does_not_take_everything_is_refused_everywhere(places, place):
    def narrow(prompts, completions):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match=r"narrow does not take `completion_ids`, .*: add `\*\*kwargs` to its param"):
        places[place](narrow)


@pytest.mark.parametrize("place", PLACES)
def test_a_reward_that_changes_its_arguments_and_the_random_state_changes_nothing(places, place):
    def fine(completions, completion_ids, kind, **kwargs):
        return [worth(ids, k) for ids, k in zip(completion_ids, kind, strict=True)]

    def careless(prompts, completions, completion_ids, kind, facts, **kwargs):
        values = fine(completions, completion_ids, kind)
        torch.manual_seed(len(prompts))
        for row in (*prompts, *completions):
            row[0]["content"] = "changed"
            row.pop()
        for ids in completion_ids:
            ids.clear()
        facts[0].append("four")
        kind.reverse()
        prompts.pop()
        return values

    torch.manual_seed(0)
    expected = places[place](fine)
    torch.manual_seed(0)
    assert places[place](careless) == expected

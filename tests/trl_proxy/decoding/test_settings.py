"""One way to decode: with a gate that accepts everything, every entry point does what `lm.generate` does."""

import contextlib
import io
import json

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from baselines.best_of_n import BestOfNPolicy
from baselines.dpo import sample_pairs
from baselines.proxy import ProxyPolicy
from baselines.rloo import GuardedRLOOConfig, GuardedRLOOTrainer
from baselines.sft import GreedyPolicy
from eval.likelihood import likelihood
from trl_proxy import PPOConfig, PPOTrainer, ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.decoding.settings import (
    MOOT,
    REFUSED,
    SAMPLING,
    USED,
    DecodingSettings,
    check_generation_kwargs,
    with_system_prompt,
)
from trl_proxy.runs.ask import ask, make_parser

TEXTS = ["a longer prompt of many letters", "b", "some more", "one"]
NEW_TOKENS = 10


def number(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def trainer_of(kind, model, tokenizer, folder, **config):
    """A trainer that samples the LM's most probable token, or whose gate accepts everything."""
    classes = {
        "proxy": (ProxyPPOConfig, ProxyPPOTrainer),
        "ppo": (PPOConfig, PPOTrainer),
        "rloo": (GuardedRLOOConfig, GuardedRLOOTrainer),
    }
    config_class, trainer_class = classes[kind]
    fields = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": len(TEXTS),
        "per_device_eval_batch_size": len(TEXTS),
        "num_generations": 2,
        "num_generations_eval": 1,
        "steps_per_generation": 2,
        "max_completion_length": NEW_TOKENS,
        "report_to": [],
        "disable_tqdm": True,
        **({} if kind == "proxy" else {"top_k": 1, "beta": 0.0, "gradient_checkpointing": False}),
        **config,
    }
    return trainer_class(
        model=model,
        reward_funcs=number,
        args=config_class(**fields),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )


def rollout(trainer, training: bool) -> list[list[int]]:
    """Responses to all prompts as the trainer makes them, each prompt once."""
    trainer.model.train(training)
    repeats = trainer.num_generations if training else 1
    prompts = [text for text in TEXTS for _ in range(repeats)]
    return trainer._generate(prompts)[1][::repeats]


def accept_all(lm, features: str) -> ProxyModelForCausalLM:
    model = ProxyModelForCausalLM(lm, ProxyConfig(features=features, p_t=0.001, gate_hidden_sizes=[8]))
    with torch.no_grad():
        model.gate.mlp[-1].bias.fill_(100.0)  # so that drawn decisions accept too
    return model


def reference(lm, tokenizer, options: dict) -> list[list[int]]:
    """transformers' own greedy `generate`, prompt by prompt."""
    responses = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        output = lm.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, tokenizer=tokenizer, pad_token_id=0, **options
        )
        responses.append(output[0, ids.shape[1] :].tolist())
    return responses


TOKENS = st.integers(4, 95)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.3, 2.0]),
        "no_repeat_ngram_size": st.sampled_from([1, 2]),
        "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=20),
        "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=30),
        "begin_suppress_tokens": st.lists(TOKENS, min_size=1, max_size=30),
        "min_new_tokens": st.sampled_from([3, 8]),
        "eos_token_id": st.lists(TOKENS, min_size=1, max_size=12).map(lambda ids: [2, *ids]),
        "stop_strings": st.lists(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8),
        "exponential_decay_length_penalty": st.just((3, 1.5)),
        "forced_eos_token_id": st.just(2),
        "use_cache": st.just(False),
    },
)


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])  # an example takes seconds: no shrinking
@given(lms=OPTIONS, users=OPTIONS)
def test_every_entry_point_decodes_as_generate(tiny_lm, tiny_tokenizer, tmp_path_factory, lms, users):
    lm = tiny_lm()
    lm.generation_config = GenerationConfig.from_dict({**lm.generation_config.to_dict(), **lms})
    expected = reference(lm, tiny_tokenizer, users)
    folder = tmp_path_factory.mktemp("run")
    decoding = DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=NEW_TOKENS, generation_kwargs=users)
    shared = {"batch_size": 3, "decoding": decoding}
    rows = tiny_tokenizer(TEXTS)["input_ids"]

    assert GreedyPolicy(lm, tiny_tokenizer, **shared).complete(TEXTS).token_ids == expected
    samples = BestOfNPolicy(lm, tiny_tokenizer, number, n=2, temperature=1e-4, **shared).sample(TEXTS)
    assert samples.token_ids == [expected, expected]
    for kind in ("ppo", "rloo"):
        trainer = trainer_of(kind, lm, tiny_tokenizer, folder, generation_kwargs=users)
        assert rollout(trainer, training=True) == rollout(trainer, training=False) == expected, kind
    for features in ("prefix", "candidate"):
        model = accept_all(lm, features)
        completions = ProxyPolicy(model, tiny_tokenizer, **shared).complete(TEXTS)
        assert completions.token_ids == expected, features
        assert [len(response) for response in completions.trace] == [len(ids) for ids in expected]
        inputs = decoding.pad(rows, "cpu")
        direct = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, tokenizer=tiny_tokenizer, return_dict_in_generate=True, **users
        )
        length = direct.decisions.tokens.tolist()
        width = inputs["input_ids"].shape[1]
        assert [row[width : width + n] for row, n in zip(direct.sequences.tolist(), length)] == expected, features
        trainer = trainer_of("proxy", model, tiny_tokenizer, folder, generation_kwargs=users)
        assert rollout(trainer, training=True) == rollout(trainer, training=False) == expected, features
        stops = decoding.options.get("stop_strings") or []
        texts = tiny_tokenizer.batch_decode(expected)
        ended = [
            ids[-1] in decoding.eos_token_ids or any(stop in text for stop in stops)
            for ids, text in zip(expected, texts)
        ]
        assert trainer._ended == ended
    assert all(map(torch.isfinite, map(torch.tensor, likelihood(lm, decoding.encode(TEXTS), expected)[0])))


class Spy(LogitsProcessor, StoppingCriteria):
    """A processor, a criterion and a streamer that write down what they were called with."""

    def __init__(self, stop: int):
        self.stop, self.calls, self.finished = stop, [], None

    def __call__(self, input_ids, scores):
        if isinstance(scores, torch.Tensor):
            self.calls.append(("processor", input_ids.tolist(), tuple(scores.shape)))
            return scores
        self.calls.append(("criterion", input_ids.tolist()))
        return input_ids[:, -1] == self.stop

    def put(self, tokens):
        self.calls.append(("streamer", tokens.tolist()))

    def end(self):
        self.calls.append(("end",))


@pytest.mark.parametrize("features", ["prefix", "candidate"])
@pytest.mark.parametrize("tree", [None, True])
@pytest.mark.parametrize("rejects", [False, True])
def test_processors_criteria_and_streamers_see_what_transformers_shows(
    tiny_lm, ragged_batch, with_random_gate, features, tree, rejects
):
    """All rows at every step, in the same order. With rejections only the tokens differ."""
    lm = tiny_lm()
    inputs = ragged_batch([3, 9, 5])
    plain, gated = Spy(stop=50), Spy(stop=50)
    config = ProxyConfig(features=features, p_t=0.001, gate_hidden_sizes=[8], pooled_features=False)
    model = with_random_gate(lm, config) if rejects else accept_all(lm, features)
    for one, spy in ((lm, plain), (model, gated)):
        options = {} if one is lm else {"tree": tree}
        one.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            logits_processor=[spy],
            stopping_criteria=[spy],
            streamer=spy,
            **options,
        )
    if not rejects:
        assert gated.calls == plain.calls
    steps = min(len(gated.calls), len(plain.calls)) - 1
    shape = lambda call: (call[0], torch.tensor(call[1]).shape, *call[2:])  # noqa: E731
    assert steps > 9
    assert [shape(call) for call in gated.calls[:steps]] == [shape(call) for call in plain.calls[:steps]]


@pytest.mark.parametrize("tree", [False, True])
def test_rows_that_wait_for_each_other_decide_and_cost_the_same(tiny_lm, ragged_batch, with_random_gate, tree):
    """With a criterion that never ends a row all rows advance in step. The tokens, decisions and counts stay."""
    config = ProxyConfig(features="candidate", p_t=0.001, gate_hidden_sizes=[8])
    model = with_random_gate(tiny_lm(), config)
    options = {**ragged_batch([3, 9, 5, 7]), "max_new_tokens": NEW_TOKENS, "output_rollout": True, "tree": tree}
    alone, in_step = (
        model.generate(**options, stopping_criteria=criteria)
        for criteria in (None, [lambda ids, scores: ids[:, 0] < 0])
    )
    assert torch.equal(in_step.sequences, alone.sequences)
    for name, values in alone.decisions._asdict().items():
        assert torch.equal(getattr(in_step.decisions, name), values), name
    assert alone.decisions.rank_sum.unique().numel() > 1, "some rows wait"
    for name in ("token_ids", "positions", "accept", "mask"):
        assert torch.equal(getattr(in_step.rollout, name), getattr(alone.rollout, name)), name


def test_the_proxy_keeps_how_its_lm_was_decoded_and_generate_does_the_same(
    tiny_lm, tiny_tokenizer, tmp_path, monkeypatch
):
    lm, seen = tiny_lm(), {}
    template = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{{ 'x' if think else 'y' }}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    lm.save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    given_to_training = {"chat_template_kwargs": {"think": True}, "generation_kwargs": {"repetition_penalty": 1.7}}
    trainer = trainer_of("proxy", accept_all(lm, "prefix"), tiny_tokenizer, tmp_path / "run", **given_to_training)
    trainer.save_model(str(tmp_path / "proxy"))
    assert ProxyConfig.from_pretrained(tmp_path / "proxy").decoding == given_to_training

    def spy(self, **kwargs):
        seen.update(kwargs, prompt=tiny_tokenizer.decode(kwargs["input_ids"][0]))
        raise InterruptedError

    monkeypatch.setattr(ProxyModelForCausalLM, "generate", spy)
    arguments = ["hi", "--proxy", str(tmp_path / "proxy"), "--model_name_or_path", str(tmp_path / "lm")]
    with pytest.raises(InterruptedError):
        ask(make_parser().parse_args(arguments))
    assert (seen["prompt"], seen["repetition_penalty"]) == ("uhix", 1.7)
    flags = ["--chat_template_kwargs", '{"think": false}', "--system_prompt", "S"]
    with pytest.raises(InterruptedError):
        ask(make_parser().parse_args([*arguments, *flags]))
    assert (seen["prompt"], seen["repetition_penalty"]) == ("sSuhiy", 1.7)


def test_ask_follows_the_lms_own_generation_config(tiny_lm, tiny_tokenizer, tmp_path):
    """An LM that ships stop strings and a penalty, with and without a proxy."""
    lm = tiny_lm()
    lm.generation_config.repetition_penalty, lm.generation_config.stop_strings = 1.5, ["e", "o", "a"]
    lm.save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    accept_all(lm, "prefix").save_pretrained(tmp_path / "proxy")
    decoding = DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=20)
    inputs = decoding.pad(decoding.encode([[{"role": "user", "content": "hello"}]]), "cpu")
    expected = tiny_tokenizer.decode(decoding.generate(lm, inputs, do_sample=False)[0][0], skip_special_tokens=True)
    for proxy in ([], ["--proxy", str(tmp_path / "proxy")]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ask(
                make_parser().parse_args(
                    ["hello", "--model_name_or_path", str(tmp_path / "lm"), "--max_new_tokens", "20", *proxy]
                )
            )
        assert printed.getvalue().split("\n")[0] == expected


def test_dpo_samples_by_the_settings(tiny_lm, tiny_tokenizer):
    lm = tiny_lm()
    lm.generation_config.suppress_tokens = list(range(10, 96))
    pairs = sample_pairs(
        lm,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": TEXTS}),
        number,
        samples_per_prompt=4,
        batch_size=4,
        seed=0,
        max_new_tokens=NEW_TOKENS,
    )
    ids = tiny_tokenizer([pair["chosen"] for pair in pairs])["input_ids"]
    assert pairs
    assert max(map(max, ids)) < 10


# The ends of a response


def test_a_response_that_ends_with_any_eos_is_not_cut_off(tiny_lm, tiny_tokenizer, tmp_path):
    """The penalty for a missing EOS knows all ids and the stop strings that end a response."""
    lm = tiny_lm()
    first = reference(lm, tiny_tokenizer, {})
    lm.generation_config.eos_token_id = [2, first[0][3]]
    trainer = trainer_of(
        "proxy", accept_all(lm, "prefix"), tiny_tokenizer, tmp_path, missing_eos_penalty=5.0, group_baseline=False
    )
    inputs = [{"prompt": text} for text in TEXTS for _ in range(2)]
    trainer.model.train()
    token_ids = rollout(trainer, training=True)
    cut_off = [ids[-1] not in trainer.eos_token_ids for ids in token_ids]
    assert len(set(cut_off)) == 2
    trainer._generate_and_score_completions(inputs)
    lengths = [len(ids) - (ids[-1] == 2) for ids in token_ids]  # the text of the reward has no EOS
    scores = trainer._scores[-1][::2].tolist()
    assert scores == [n - 5.0 * cut for n, cut in zip(lengths, cut_off)]


def test_eos_ids_of_all_files_count_and_the_users_replace_them(tiny_lm, tiny_tokenizer):
    lm = tiny_lm()
    of = lambda **kwargs: DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=1, **kwargs).eos_token_ids  # noqa: E731
    assert of() == [2]
    lm.generation_config.eos_token_id, lm.config.eos_token_id = [9, 2], 7
    assert of() == [2, 7, 9]
    lm.generation_config.eos_token_id = None
    assert of() == [2, 7]
    assert of(generation_kwargs={"eos_token_id": 5}) == [5]
    lm.config.eos_token_id = 2


def test_stop_strings_are_no_cut_in_the_trainers_metrics(tiny_lm, tiny_tokenizer, tmp_path):
    lm = tiny_lm()
    stop = tiny_tokenizer.decode(reference(lm, tiny_tokenizer, {})[0][2])
    for kind in ("ppo", "proxy"):
        model = lm if kind == "ppo" else accept_all(lm, "prefix")
        trainer = trainer_of(kind, model, tiny_tokenizer, tmp_path, generation_kwargs={"stop_strings": [stop]})
        token_ids = rollout(trainer, training=False)
        ended = [stop in text for text in tiny_tokenizer.batch_decode(token_ids)]
        assert True in ended
        assert trainer._metrics["eval"]["completions/clipped_ratio"] == [1 - sum(ended) / len(ended)]


# What is refused


@pytest.mark.fault
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penaltyy": 1.1}, "'repetition_penaltyy', which is no option of `generate`: did you mean"),
        ({"nonsense": 1}, r"'nonsense', which is no option of `generate`\."),
        ({"top_k": 5}, "has top_k=5: the method decides how a token is chosen"),
        ({"temperature": 0.5}, "has temperature=0.5: the method decides"),
        ({"do_sample": True}, "has do_sample=True: the method decides"),
        ({"num_beams": 4}, "has num_beams=4, which is not supported: beams"),
        ({"num_return_sequences": 2}, "has num_return_sequences=2, which is not supported"),
        ({"guidance_scale": 1.5}, "has guidance_scale=1.5, which is not supported"),
        ({"watermarking_config": {"bias": 2.5}}, "has watermarking_config=.*, which is not supported"),
        ({"token_healing": True}, "has token_healing=True, which is not supported"),
        ({"penalty_alpha": 0.6}, "has penalty_alpha=0.6, which is not supported"),
        ({"dola_layers": "high"}, "has dola_layers='high', which is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "has prompt_lookup_num_tokens=3, which is not supported"),
        ({"max_new_tokens": 7}, "has max_new_tokens=7, which is not supported: the length of a response has its own"),
        ({"max_length": 7}, "has max_length=7, which is not supported"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        ProxyPPOConfig(output_dir="x", generation_kwargs=options)


@pytest.mark.fault
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "high"},
        {"bad_words_ids": []},
        {"bad_words_ids": [5]},
        {"min_new_tokens": "many"},
        {"exponential_decay_length_penalty": 3},
        {"sequence_bias": {"a": 1.0}},
        {"stop_strings": [3]},
        {"suppress_tokens": "abc"},
    ],
    ids=str,
)
def test_values_that_generate_refuses_are_refused_at_once(tiny_lm, tiny_tokenizer, options):
    with pytest.raises(ValueError, match=r"The decoding options .* are not valid \(.*\): correct them"):
        DecodingSettings.of(tiny_lm(), tiny_tokenizer, max_new_tokens=1, generation_kwargs=options)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_beams", 4, "'num_beams': 1"),
        ("guidance_scale", 2.0, "'guidance_scale': 1.0"),
        ("token_healing", True, ""),
    ],
)
def test_an_lm_whose_own_options_cannot_be_kept_is_refused(tiny_lm, tiny_tokenizer, name, value, remedy):
    lm = tiny_lm()
    setattr(lm.generation_config, name, value)
    with pytest.raises(
        ValueError, match=f"generation_config.json has {name}={value}, which is not supported.*{remedy}"
    ):
        DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=1)
    off = {name: REFUSED[name][0][-1]}
    assert DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=1, generation_kwargs=off).options[name] == off[name]


def test_every_option_of_transformers_has_its_place():
    names = {name for name in GenerationConfig().__dict__ if not name.startswith("_")}
    places = [*SAMPLING, *USED, *REFUSED, *MOOT]
    assert sorted(places) == sorted(set(places)), "an option has two places"
    assert names <= set(places), "give the new option of a new transformers its place"


def test_what_an_option_does_not_mean_is_said_once(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            logging.set_verbosity_warning()
            check_generation_kwargs({"length_penalty": 1.7})
    finally:
        logging.set_verbosity_error()
        logging.disable_propagation()
    assert "`generation_kwargs` has length_penalty, which has no meaning" in caplog.text


@pytest.mark.fault
def test_a_prompt_that_leaves_no_room_is_refused(tiny_lm, tiny_tokenizer):
    lm = tiny_lm()
    policy = GreedyPolicy(lm, tiny_tokenizer, batch_size=2, max_new_tokens=250)
    with pytest.raises(
        ValueError, match=r"Prompt and response need 270 positions \(20 \+ 250\), the LM has 256: short"
    ):
        policy.complete(["x" * 20])


def test_the_system_prompt_is_put_before_conversations_that_have_none():
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "S"}
    assert with_system_prompt([user], "S") == [system, user]
    assert with_system_prompt([{**system, "content": "own"}, user], "S")[0]["content"] == "own"
    assert with_system_prompt("plain", None) == "plain"
    with pytest.raises(ValueError, match="`system_prompt` needs conversations, the prompt 'plain' is plain text"):
        with_system_prompt("plain", "S")


def test_settings_are_json(tiny_lm, tiny_tokenizer):
    lm = tiny_lm()
    lm.generation_config.sequence_bias = [[[5], 1.0]]
    decoding = DecodingSettings.of(lm, tiny_tokenizer, max_new_tokens=3, chat_template_kwargs={"a": 1})
    assert json.loads(json.dumps(decoding.as_dict())) == decoding.as_dict()
    assert decoding.as_dict()["eos_token_ids"] == [2]

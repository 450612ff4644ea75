"""Tests of `scripts/compare.py`: a whole comparison of tiny models on disk, resuming, and its error messages."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from eval.trained import describe, read_proxy
from trl_proxy import ProxyConfig, ProxyModelForCausalLM, files
from trl_proxy.files import WriteError
from trl_proxy.modeling.card import proxy_card

ROOT = Path(__file__).parents[2]
REWARD = """
def length(prompts, completions, **columns):
    assert set(columns) == {"kind", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    return [len(c[0]["content"]) + c[0]["content"].count("a") / 7 for c in completions]

def vowels(prompts, completions, **columns):
    return [float(sum(x in "aeiou" for x in c[0]["content"])) for c in completions]
"""


@pytest.fixture(scope="module")
def compare():
    return importlib.import_module("eval.runner")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_lm, tiny_tokenizer, with_random_gate):
    """An LM, two trained proxies, prompts and rewards on disk."""
    folder = tmp_path_factory.mktemp("compare")
    lm = tiny_lm()
    lm.save_pretrained(folder / "lm")
    tiny_tokenizer.save_pretrained(folder / "lm")
    with_random_gate(lm, ProxyConfig(p_t=0.02)).save_pretrained(folder / "prefix")
    with_random_gate(lm, ProxyConfig(p_t=0.02, features="candidate")).save_pretrained(folder / "candidate")
    config = ProxyConfig.from_pretrained(folder / "prefix")
    proxy_card(config, 1, 2).save(folder / "prefix" / "README.md")
    for name, seed in (("prefix", 5), ("candidate", 6)):
        run = {"seed": seed, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 4}
        history = [{"step": step, "reward": 0.1 * step} for step in (1, 2, 3)]
        results = {"episodes": 24, "steps": 3, "train_seconds": 7.5, "train_peak_memory_mb": 300.0}
        (folder / name / "run.json").write_text(json.dumps(run))
        (folder / name / "train_results.json").write_text(json.dumps(results))
        (folder / name / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    base = AutoModelForCausalLM.from_pretrained(folder / "lm")
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(base, adapter).save_pretrained(folder / "ppo")
    run = {"method": "ppo", "seed": 7, "use_peft": True, "lora_r": 4}
    (folder / "ppo" / "run.json").write_text(json.dumps(run))
    rows = [
        {"prompt": [{"role": "user", "content": "x" * (i + 1)}], "kind": ["everyday", "harm_adjacent"][i % 2]}
        for i in range(6)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "tiny_rewards.py").write_text(REWARD)
    return folder


@pytest.fixture
def run(compare, folder, tmp_path, monkeypatch):
    """Runs the script with the arguments of a small comparison, overridden; returns its records by file name."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts the working directory there

    def run(**overrides) -> dict[str, dict]:
        arguments = {
            "model_name_or_path": folder / "lm",
            "proxies": [folder / "prefix", folder / "candidate"],
            "dataset_name": folder / "prompts.jsonl",
            "split": "train",
            "reward_model_name_or_path": "tiny_rewards.length",
            "gold_reward_model_name_or_path": "tiny_rewards.vowels",
            "best_of": [1, 2],
            "max_new_tokens": 6,
            "batch_size": 4,
            "output_dir": tmp_path,
            **overrides,
        }
        argv = []
        for key, value in arguments.items():
            values = [] if value is True else value if isinstance(value, list) else [value]
            argv += [f"--{key}", *map(str, values)] if value != [] else []
        compare.compare(*compare.make_parser().parse_args_and_config(argv))
        return {
            p.stem: json.loads(p.read_text()) for p in sorted((Path(arguments["output_dir"]) / "records").iterdir())
        }

    return run


@pytest.fixture
def no_model(compare, monkeypatch):
    """Fails if a model would be loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(compare, "load_policy", fail)
    monkeypatch.setattr(compare, "load_reward", fail)


def test_a_whole_comparison(run, tmp_path, capsys):
    records = run()
    assert list(records) == [
        "best_of_n-n=1-seed0",
        "best_of_n-n=2-seed0",
        "proxy-candidate_p_t=0.02-seed6",
        "proxy-prefix_p_t=0.02-seed5",
        "sft-seed0",
    ]
    sft, proxy = records["sft-seed0"], records["proxy-prefix_p_t=0.02-seed5"]
    assert [len(record["responses"]) for record in records.values()] == [6] * 5
    deltas = [a - b for a, b in zip(proxy["rewards"], sft["rewards"], strict=True)]
    assert proxy["delta_vs_sft"] == pytest.approx(sum(deltas) / 6)
    assert {kind: values["n_prompts"] for kind, values in proxy["by_kind"].items()} == {
        "everyday": 3,
        "harm_adjacent": 3,
    }
    pairs = zip(records["best_of_n-n=1-seed0"]["rewards"], records["best_of_n-n=2-seed0"]["rewards"], strict=True)
    assert all(two >= one for one, two in pairs)

    card = (Path.cwd() / "prefix" / "README.md").read_text()
    assert f"- gain over the LM's greedy decoding: {proxy['delta_vs_sft']:.3f} (95 % interval " in card

    # what training left, and the sizes
    assert (proxy["episodes"], proxy["train_seconds"], proxy["train_peak_memory_mb"]) == (24, 7.5, 300.0)
    assert proxy["adapter_bytes"] > 4 * proxy["trainable_parameters"] > 0
    assert proxy["total_parameters"] == sft["total_parameters"] + proxy["trainable_parameters"]
    assert sft["trainable_parameters"] == 0

    # what was rejected, and what was written
    for record in (proxy, records["proxy-candidate_p_t=0.02-seed6"]):
        tokens = [token for response in record["trace"] for token in response]
        assert len(tokens) == pytest.approx(6 * record["response_tokens_mean"])
        rejections = sum(len(rejected) for _, rejected in tokens)
        assert rejections == pytest.approx(record["accepted_rank_mean"] * len(tokens))
        for response, traced in zip(record["responses"], record["trace"], strict=True):
            assert re.sub("<.?[a-z]+>", "", "".join(text for text, _ in traced)) == response  # special tokens show

    # what a method cannot have is null
    assert sft["trace"] is None
    assert sft["kl_to_lm"] == 0.0
    assert proxy["kl_to_lm"] > 0
    assert records["proxy-candidate_p_t=0.02-seed6"]["kl_to_lm"] is None
    assert records["best_of_n-n=2-seed0"]["reject_rate"] is None
    assert 0 < proxy["reject_rate"] < 1
    assert proxy["lm_forwards_per_token"] == 1.0 < records["proxy-candidate_p_t=0.02-seed6"]["lm_forwards_per_token"]
    assert len({record["tokens_per_second_sft"] for record in records.values()}) == 1

    plots = {path.name for path in (tmp_path / "plots").glob("*.png")}
    names = ["reward_distributions", "gains", "win_rates", "cost_against_gain", "reward_against_logprob"]
    assert plots == {f"{name}.png" for name in [*names, "training_curve"]}
    for name in plots:
        assert f"(plots/{name})" in (tmp_path / "report.md").read_text()
    assert "proxy (prefix, p_t=0.02)" in (tmp_path / "samples.md").read_text()
    assert "best_of_n (n=2)" in capsys.readouterr().out


def test_a_trained_baseline_leaves_the_lm_as_it_was(run, folder, tmp_path):
    """Its adapter judges nothing, and is off the LM when the next method is evaluated."""
    records = run(baselines=[folder / "ppo"], output_dir=tmp_path / "with")
    without = run(output_dir=tmp_path / "without")
    assert set(records) - set(without) == {"ppo-lora_r=4-seed7"}
    for name in without:
        assert records[name]["responses"] == without[name]["responses"], name
        assert records[name]["lm_logprob_per_token"] == pytest.approx(without[name]["lm_logprob_per_token"])
    ppo, sft = records["ppo-lora_r=4-seed7"], records["sft-seed0"]
    assert ppo["responses"] != sft["responses"]
    assert ppo["kl_to_lm"] > 0.01
    assert ppo["lm_logprob_per_token"] < sft["lm_logprob_per_token"]
    assert ppo["adapter_bytes"] > 4 * ppo["trainable_parameters"] > 0
    assert ppo["total_parameters"] == sft["total_parameters"] + ppo["trainable_parameters"]


def test_recipes_are_trained_where_they_are_not_yet(run, folder, tmp_path, capfd, fork_server):
    shared = {
        "model_name_or_path": str(folder / "lm"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": ["tiny_rewards.vowels"],
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    recipes = []
    for method, settings in (("proxy", {"num_generations": 2, "gate_hidden_sizes": [8]}), ("dpo", {"lora_r": 2})):
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(shared | settings))
        recipes.append(f"{method}={tmp_path / method}.yaml")
    launch = shlex.join(["env", f"PYTHONPATH={ROOT}:{folder}", fork_server.python])
    call = {"proxies": [], "recipes": recipes, "seeds": [4], "launch": launch, "methods": ["proxy"]}
    records = run(**call)
    assert set(records) == {"sft-seed0", "dpo-lora_r=2-seed4", "proxy-prefix_gate_hidden_sizes=_8_-seed4"}
    assert all(records[name]["train_seconds"] > 0 for name in set(records) - {"sft-seed0"})
    assert capfd.readouterr().out.count("Training ") == 2
    run(**call)
    assert "Training " not in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"training .*proxy-seed9 failed, see above"):
        run(**{**call, "seeds": [9], "launch": "false"})
    with pytest.raises(ValueError, match="--recipes must be <method>=<file>"):
        run(recipes=["ppo=nothing.yaml"])


@pytest.mark.fault
def test_folders_that_are_no_baselines_are_named(run, folder, no_model):
    with pytest.raises(ValueError, match=r"prompts.jsonl has no run.json"):
        run(baselines=[folder / "prompts.jsonl"])


@pytest.mark.fault
def test_going_on_evaluates_only_what_is_missing(run, compare, monkeypatch, tmp_path):
    settings = {"methods": ["best_of_n"]}
    monkeypatch.setattr(compare, "write_report", lambda *args: None)
    first = run(best_of=[1], **settings)
    assert list(first) == ["best_of_n-n=1-seed0", "sft-seed0"]  # sft comes with everything
    second = run(best_of=[1, 2], **settings)
    assert second.items() > first.items()
    # the samples of both runs are the same, so that n=2 continues n=1
    fresh = run(best_of=[2], output_dir=tmp_path / "fresh", **settings)
    assert fresh["best_of_n-n=2-seed0"]["responses"] == second["best_of_n-n=2-seed0"]["responses"]

    with monkeypatch.context() as context:  # nothing is left to do: no model is needed
        context.setattr(compare, "load_policy", None)
        assert run(best_of=[1, 2], **settings) == second

    with pytest.raises(
        ValueError, match=r"sft-seed0.json was written with other settings \(different: max_new_tokens"
    ):
        run(best_of=[1], max_new_tokens=5, **settings)
    again = run(best_of=[1], max_new_tokens=5, overwrite=True, **settings)
    assert again["best_of_n-n=1-seed0"]["max_new_tokens"] == 5
    assert again["best_of_n-n=2-seed0"] == second["best_of_n-n=2-seed0"]


def test_thresholds(run, folder, tmp_path):
    """Alignment strength without training: above its own threshold a proxy rejects more."""
    settings = {"proxies": [folder / "prefix"], "methods": ["proxy"], "output_dir": tmp_path / "out"}
    records = run(thresholds=[-50, 0, 50], **settings)
    names = {name.removeprefix("proxy-prefix_p_t=0.02"): record for name, record in records.items() if "proxy" in name}
    assert names.keys() == {"-seed5", "_threshold=_50.0-seed5", "_threshold=50.0-seed5"}
    rates = [names[f"{name}-seed5"]["reject_rate"] for name in ("_threshold=_50.0", "", "_threshold=50.0")]
    assert rates[0] == 0.0 < rates[1] < 1.0 == rates[2]
    # One that accepts everything is the LM; the divergence is of the moved gate, too.
    assert names["_threshold=_50.0-seed5"]["responses"] == records["sft-seed0"]["responses"]
    assert names["_threshold=_50.0-seed5"]["kl_to_lm"] != names["-seed5"]["kl_to_lm"]
    assert (tmp_path / "out" / "plots" / "reward_against_threshold.png").is_file()
    assert run(thresholds=[-50, 0, 50], **settings) == records  # nothing is left to do
    gain = f"- gain over the LM's greedy decoding: {names['-seed5']['delta_vs_sft']:.3f} (95 % interval "
    assert gain in (folder / "prefix" / "README.md").read_text()  # it tells of the proxy as it is


@pytest.mark.fault
def test_a_retrained_proxy_is_not_taken_for_the_old_one(run, compare, monkeypatch, folder, tmp_path, tiny_lm):
    monkeypatch.setattr(compare, "write_report", lambda *args: None)
    model = ProxyModelForCausalLM(tiny_lm(), ProxyConfig())
    model.save_pretrained(tmp_path / "proxy")
    arguments = {"proxies": [f"{tmp_path / 'proxy'}:1"], "methods": ["proxy"], "output_dir": tmp_path / "out"}
    records = run(**arguments)
    # an untrained proxy is the LM, and the decoding path the same
    assert records["proxy-prefix-seed1"]["responses"] == records["sft-seed0"]["responses"]
    assert records["proxy-prefix-seed1"]["delta_ci95"] == [0.0, 0.0]
    model.gate.mlp[-1].bias.data.fill_(-1.0)
    model.save_pretrained(tmp_path / "proxy")
    with pytest.raises(ValueError, match="different: proxy_weights_sha256"):
        run(**arguments)


def test_num_prompts_is_a_fixed_choice(run, compare, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "write_report", lambda *args: None)
    prompts = [
        run(methods=["sft"], num_prompts=3, seed=seed, output_dir=tmp_path / str(seed))[f"sft-seed{seed}"]["prompts"]
        for seed in (0, 1)
    ]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 3


@pytest.mark.fault
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"proxies": []}, "--proxies names no folder"),
        ({"proxies": ["no/such/folder"]}, "no/such/folder is neither a folder nor a hub repository"),
        ({"methods": ["ppo"]}, "--methods knows sft, proxy, best_of_n, not ppo"),
        ({"best_of": [0]}, r"--best_of must name numbers of at least 1, got \[0\]"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"num_prompts": 7}, "--num_prompts is 7, .* has 6"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(run, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(**overrides)


@pytest.mark.fault
@pytest.mark.usefixtures("no_model")
def test_a_proxy_needs_a_seed_and_its_own_record(run, folder, tmp_path, tiny_lm):
    ProxyModelForCausalLM(tiny_lm(), ProxyConfig(p_t=0.02)).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match=r"has no run.json .* give its training seed, .*p:0"):
        run(proxies=[tmp_path / "p"])
    with pytest.raises(ValueError, match=r"Two runs would write .*proxy-prefix_p_t=0.02-seed5.json"):
        run(proxies=[folder / "prefix", f"{tmp_path / 'p'}:5"])


@pytest.mark.fault
@pytest.mark.usefixtures("no_model")
def test_empty_data(run, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        run(dataset_name=tmp_path / "empty.jsonl")
    with pytest.raises(
        ValueError, match=r"--split test: The dataset .*prompts.jsonl has no split 'test', only train:"
    ):
        run(split="test")


@pytest.mark.fault
def test_a_prompt_that_cannot_be_answered_is_named_before_decoding(run, tmp_path, monkeypatch):
    """By the LM's chat template, or because it is too long."""
    monkeypatch.setattr("baselines.sft.GreedyPolicy.complete", None)
    rows = [{"prompt": [{"role": "user", "content": "x" * n}]} for n in (3, 251)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"Row 2 of .*long.jsonl \(train\) has a prompt of 256 tokens, which with up"):
        run(dataset_name=tmp_path / "long.jsonl")
    rows[1]["prompt"][0]["content"] = [{"type": "text", "text": "x"}]
    (tmp_path / "parts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"Row 2 of .*parts.jsonl \(train\) .* refuses, saying 'TypeError: can only"):
        run(dataset_name=tmp_path / "parts.jsonl")


@pytest.mark.fault
def test_unknown_yaml_keys(compare, tmp_path):
    (tmp_path / "recipe.yaml").write_text("methods: [sft]\nbest_off: [2]\n")
    with pytest.raises(ValueError, match=r"recipe.yaml sets `best_off`, which is no option: best_of\?"):
        compare.make_parser().parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])


def test_train_settings_on_the_command_line(compare):
    words = ["--methods", "sft", "--train_settings", '{"max_steps": 8, "gate_hidden_sizes": [64]}']
    assert compare.make_parser().parse_args_and_config(words)[0].train_settings == {
        "max_steps": 8,
        "gate_hidden_sizes": [64],
    }
    with pytest.raises(ValueError, match=r"--train_settings must be a JSON object, such as .*, got max_steps=8"):
        compare.make_parser().parse_args_and_config([*words[:-1], "max_steps=8"])


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "recipes").glob("compare_*.yaml")), ids=lambda p: p.name)
def test_recipes(compare, path):
    args, model_args = compare.make_parser().parse_args_and_config(["--config", str(path)])
    values = yaml.safe_load(path.read_text())
    assert {key: {**args.__dict__, **model_args.__dict__}[key] for key in values} == values
    assert isinstance(model_args, ModelConfig)
    for name in args.proxies:  # what a recipe of the training writes
        trained = [yaml.safe_load(p.read_text())["output_dir"] for p in path.parent.glob("*.yaml") if p != path]
        assert name in trained


@pytest.mark.fault
def test_a_full_disk_loses_nothing(run, folder, tmp_path, monkeypatch):
    """A record, a plot and the report; the same command writes what is missing."""
    arguments, full, temporary_path = {"methods": ["sft"], "proxies": []}, tmp_path / "full", files.temporary_path

    def no_room(path):
        if not str(path).endswith(place):
            return temporary_path(path)
        full.symlink_to("/dev/full")
        return str(full)

    monkeypatch.setattr(files, "temporary_path", no_room)
    for place in ("records/sft-seed0.json", "plots/reward_distributions.png", "samples.md", "report.md"):
        if place.endswith(".png"):  # drawn in its place
            (tmp_path / "plots").mkdir(exist_ok=True)
            (tmp_path / place).symlink_to("/dev/full")
        with pytest.raises(WriteError, match=r"could not be written \(No space left on device\): make room"):
            run(**arguments)
        if place.endswith(".png"):
            (tmp_path / place).unlink()
        assert not full.is_symlink()
        assert not (tmp_path / "report.md").exists()
    place = "nothing more"
    assert list(run(**arguments)) == ["sft-seed0"]
    assert (tmp_path / "report.md").is_file()


@pytest.mark.fault
@pytest.mark.parametrize("name", ["run.json", "train_results.json"])
def test_damaged_files_of_a_training_are_named(run, folder, no_model, tmp_path, name):
    shutil.copytree(folder / "prefix", tmp_path / "proxy")
    (tmp_path / "proxy" / name).write_text('{"seed": 5')
    with pytest.raises(ValueError, match=rf"proxy/{name} is damaged \(.*\): take it from a copy, or train anew"):
        run(proxies=[tmp_path / "proxy"])


def test_variants_name_what_is_not_default():
    assert describe(ProxyConfig()) == "prefix"
    assert describe(ProxyConfig(features="candidate", p_t=0.1, gate_hidden_sizes=[64])) == (
        "candidate, p_t=0.1, gate_hidden_sizes=[64]"
    )


def test_a_checkpoint_finds_its_run_file(folder, tmp_path, tiny_lm):
    ProxyModelForCausalLM(tiny_lm(), ProxyConfig()).save_pretrained(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "run.json").write_text(json.dumps({"seed": 9}))
    proxy = read_proxy(str(tmp_path / "out" / "checkpoint-2"))
    assert (proxy.seed, proxy.episodes, proxy.log) == (9, None, None)
    # Without its log a training's curve is not drawn; the rest is known.
    (tmp_path / "out" / "checkpoint-2" / "train_results.json").write_text(json.dumps({"episodes": 24, "steps": 3}))
    proxy = read_proxy(str(tmp_path / "out" / "checkpoint-2"))
    assert (proxy.episodes, proxy.log) == (24, None)
    assert read_proxy(f"{folder / 'prefix'}:3").seed == 3  # what the caller says wins


@pytest.mark.parametrize("known", [True, False])
def test_a_proxy_that_was_trained_further_cost_both_trainings(folder, tmp_path, known):
    shutil.copytree(folder / "prefix", tmp_path / "first")
    shutil.copytree(folder / "prefix", tmp_path / "further")
    if not known:
        (tmp_path / "first" / "train_results.json").unlink()
    run = {"seed": 5, "proxy_name_or_path": str(tmp_path / "first")}
    (tmp_path / "further" / "run.json").write_text(json.dumps(run))
    proxy = read_proxy(str(tmp_path / "further"))
    costs = (proxy.episodes, proxy.train_seconds, proxy.train_peak_memory_mb)
    assert costs == ((48, 15.0, 300.0) if known else (None, None, None))


@pytest.mark.fault
def test_half_a_record_is_named_before_a_model_is_loaded(run, no_model, tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "sft-seed0.json").write_text('{"method": "sft", "rew')
    with pytest.raises(ValueError, match=r"sft-seed0.json is no whole JSON file .*: delete it and evaluate again"):
        run()


# How an LM is decoded


def with_decoding(folder, name: str, copied: Path, **decoding) -> Path:
    """A copy of a trained proxy that was decoded in training as said."""
    shutil.copytree(folder / name, copied)
    config = json.loads((copied / "proxy_config.json").read_text())
    (copied / "proxy_config.json").write_text(json.dumps({**config, "decoding": decoding}))
    return copied


def test_methods_are_decoded_as_in_training(run, folder, tmp_path):
    """The records say how, and an untrained gate answers as the LM: both with what the LM ships and the user gave."""
    proxy = with_decoding(
        folder, "prefix", tmp_path / "p", generation_kwargs={"suppress_tokens": [40]}, system_prompt="S"
    )
    accepting = ProxyModelForCausalLM(AutoModelForCausalLM.from_pretrained(folder / "lm"), ProxyConfig())
    accepting.save_pretrained(tmp_path / "accepting")
    shutil.copy(tmp_path / "accepting" / "proxy_model.safetensors", proxy)
    config = json.loads((tmp_path / "accepting" / "proxy_config.json").read_text())
    config["decoding"] = json.loads((proxy / "proxy_config.json").read_text())["decoding"]
    (proxy / "proxy_config.json").write_text(json.dumps(config))
    records = run(proxies=[proxy], output_dir=tmp_path / "a", best_of=[2])
    sft, gated, best = (
        next(r for name, r in records.items() if name.startswith(m)) for m in ("sft", "proxy", "best_of_n")
    )
    assert gated["responses"] == sft["responses"]
    assert sft["decoding"] == gated["decoding"] == best["decoding"]
    assert sft["decoding"]["generation_kwargs"]["suppress_tokens"] == [40]
    assert sft["decoding"]["system_prompt"] == "S"
    plain = run(proxies=[proxy], output_dir=tmp_path / "b", methods="sft", generation_kwargs="{}", system_prompt="")
    assert "suppress_tokens" not in plain["sft-seed0"]["decoding"]["generation_kwargs"]


@pytest.mark.fault
def test_trainings_that_were_decoded_differently_are_not_compared_unsaid(run, folder, tmp_path, no_model):
    one = with_decoding(folder, "prefix", tmp_path / "p", chat_template_kwargs={"enable_thinking": False})
    other = with_decoding(folder, "candidate", tmp_path / "c", chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ValueError, match=r"chat_template_kwargs=.*False.* with .*True.*: say which counts by --chat"):
        run(proxies=[one, other])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("generation_kwargs", '{"top_k": 5}', "has top_k=5: the method decides"),
        ("generation_kwargs", '{"num_beems": 5}', "did you mean 'num_beams'"),
        ("generation_kwargs", "[1]", "--generation_kwargs must be a JSON object"),
        ("chat_template_kwargs", "thinking", "--chat_template_kwargs must be a JSON object"),
    ],
)
def test_decoding_arguments_that_cannot_be_kept_are_refused(run, flag, value, message):
    with pytest.raises(ValueError, match=message):
        run(**{flag: value})

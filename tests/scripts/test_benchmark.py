"""scripts/benchmark.py runs on a tiny LM and writes what it measured."""

import json


def test_it_times_every_method(tmp_path, tiny_lm, tiny_tokenizer, load_script):
    script = load_script("benchmark")
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    script.main(
        script.BenchmarkArguments(
            model_name_or_path=str(tmp_path / "lm"),
            dtype="float32",
            batch_size=2,
            max_new_tokens=4,
            rounds=2,
            output_dir=str(tmp_path / "out"),
        )
    )
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert found["prefix features"]["lm_forwards_per_token"] == 1.0
    assert found["candidate features"]["lm_forwards_per_token"] > 1.0
    assert found["generate, sampled"]["ratio"] == 1.0
    assert all(found[name]["tokens_per_second"] > 0 for name in ("generate, greedy", "prefix features, pooled"))

"""Datasets in every format, with their splits, and what is said of rows and files that cannot be used."""

import bz2
import datetime
import gzip
import json
import lzma
import math
import random
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers.trainer_utils import IntervalStrategy

from baselines.dpo import DPOArguments
from eval.jobs import CompareArguments, select_prompts
from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.loading import load_prompts
from trl_proxy.prompts import check_prompts
from trl_proxy.reading import check_pairs, read_dataset
from trl_proxy.rewards.training import load_pairs
from trl_proxy.runs.arguments import RunArguments, load_datasets, load_split

ABSENT = object()
SENTENCE = r"\A[^\n]{20,700}\.\Z"  # one line that ends as a sentence does


def says(text, role="user", **more):
    return {"role": role, "content": text, **more}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Fails if a model would be loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trl_proxy.loading.AutoModelForCausalLM.from_pretrained", fail)


@pytest.fixture(scope="module")
def settings():
    """What a training takes from its arguments, for `load_datasets`: rollouts of two prompts."""
    return SimpleNamespace(
        eval_strategy="no", max_steps=4, num_train_epochs=3.0, generation_batch_size=4, num_generations=2
    )


@pytest.fixture
def trainer(tmp_path, tiny_lm, tiny_tokenizer):
    """`trainer(dataset, **arguments)` -> a ProxyPPOTrainer whose rollouts take two prompts."""

    def build(dataset, eval_dataset=None, tokenizer=None, **arguments):
        config = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "max_steps": 1}
        config |= {"use_cpu": True, "bf16": False, "report_to": [], "output_dir": str(tmp_path / "out")}
        return ProxyPPOTrainer(
            model=ProxyModelForCausalLM(tiny_lm(), ProxyConfig(gate_hidden_sizes=[8])),
            reward_funcs=lambda prompts, completions, **columns: [0.0] * len(prompts),
            args=ProxyPPOConfig(**{**config, **arguments}),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer or tiny_tokenizer,
        )

    return build


# Rows

TOOL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
FILL_IN = "fill it in, or remove the row."
MESSAGES = "give text, or a list of messages with `role` and `content`."
TEXT_ALONE = "the LM reads text alone, so leave other parts out."
BAD_ROWS = {
    "null": (None, "that is null (None)", FILL_IN),
    "absent": (ABSENT, "that is null", FILL_IN),
    "not a number": (math.nan, "that is null", FILL_IN),
    "empty": ("", "that is empty ('')", FILL_IN),
    "spaces": ("  \n\t ", "that is empty", FILL_IN),
    "a space that does not break": ("\u00a0", "that is empty", FILL_IN),
    "a number": (3, "that is a number (3)", MESSAGES),
    "a fraction": (2.5, "that is a number (2.5)", MESSAGES),
    "a truth value": (True, "that is a truth value", MESSAGES),
    "one message": (says("x"), "that is a mapping", MESSAGES),
    "a mapping of text": ({"text": "x"}, "that is a mapping", MESSAGES),
    "a conversation as JSON": (json.dumps([says("x")]), "that is a conversation written as text", "as a list"),
    "a conversation as Python": (str([says("x")]), "that is a conversation written as text", "as a list"),
    "ShareGPT as JSON": ('[{"from": "human", "value": "x"}]', "that is a conversation written as text", "as a list"),
    "indented JSON": (json.dumps([says("x")], indent=1), "that is a conversation written as text", "as a list"),
    "no messages": ([], "without messages ([])", FILL_IN),
    "texts": (["a", "b"], "whose message 1 is text", "give messages with `role` and `content`"),
    "numbers": ([1, 2], "whose message 1 is a number", "give messages with"),
    "a null message": ([None], "whose message 1 is of type NoneType", "give messages with"),
    "a null message between": ([says("a"), None, says("b")], "whose message 2 is of type NoneType", "give messages"),
    "several conversations": ([[says("a")], [says("b")]], "whose message 1 is a list of", "one conversation a row"),
    "no role": ([{"content": "x"}], "whose message 1 has no role", "name who speaks"),
    "a null role": ([says("x", role=None)], "whose message 1 has no role", "name who speaks"),
    "an empty role": ([says("x", role="")], "whose message 1 has no role", "name who speaks"),
    "a role that is a number": ([says("x", role=1)], "whose message 1 has no role", "name who speaks"),
    "ShareGPT": ([{"from": "human", "value": "x"}], "whose message 1 has no role", "rename `from` to `role`"),
    "a part of ShareGPT": ([says("a"), {"from": "gpt", "value": "x"}], "whose message 2 has no role", "rename `from`"),
    "no content": ([{"role": "user"}], "whose message 1 has no content", FILL_IN),
    "a null content": ([says(None)], "whose message 1 has no content", FILL_IN),
    "a null system prompt": ([says(None, "system"), says("x")], "whose message 1 has no content", FILL_IN),
    "text in place of content": ([{"role": "user", "text": "x"}], "whose message 1 has no content", FILL_IN),
    "a content that is a number": ([says(7)], "whose message 1 has a content that is a number", "write it as text."),
    "a content that is true": ([says(True)], "has a content that is a truth value", "write it as text."),
    "a content that is a mapping": ([says({"text": "x"})], "has a content that is a mapping", "write it as text."),
    "an empty question": ([says("")], "whose message 1 (user) is empty", FILL_IN),
    "a blank question": ([says(" \n ")], "whose message 1 (user) is empty", FILL_IN),
    "an empty question before": ([says(""), says("a", "assistant"), says("b")], "whose message 1 (user) is", FILL_IN),
    "a blank last question": ([says("a"), says("b", "assistant"), says(" ")], "whose message 3 (user) is", FILL_IN),
    "no parts": ([says([])], "whose message 1 has no content", FILL_IN),
    "an image": ([says([{"type": "image"}, {"type": "text", "text": "x"}])], "a part of type image", TEXT_ALONE),
    "an image's address": (
        [says([{"type": "image_url", "image_url": {"url": "x"}}])],
        "of type image_url",
        TEXT_ALONE,
    ),
    "a sound": ([says([{"type": "text", "text": "x"}, {"type": "audio", "audio": "x"}])], "of type audio", TEXT_ALONE),
    "a film": ([says([{"type": "video", "video": "x"}])], "has a part of type video", TEXT_ALONE),
    "parts that are texts": ([says(["x"])], "has a part of type None", TEXT_ALONE),
    "a part without a type": ([says([{"text": "x"}])], "has a part of type None", TEXT_ALONE),
    "a part without text": ([says([{"type": "text"}])], "has a part without text", FILL_IN),
    "a part of null": ([says([{"type": "text", "text": None}])], "has a part without text", FILL_IN),
    "an empty part": ([says([{"type": "text", "text": ""}])], "whose message 1 (user) is empty", FILL_IN),
    "an answer at the end": (
        [says("a"), says("b", "assistant")],
        "that ends with the assistant's turn",
        "end it with",
    ),
    "an answer alone": ([says("b", "assistant")], "that ends with the assistant's turn", "end it with"),
    "a call at the end": (
        [says("a"), says(None, "assistant", tool_calls=[TOOL])],
        "ends with the assistant",
        "end it",
    ),
    "text among conversations": (
        "x",
        "that is plain text where row 1 has a conversation",
        "give all rows one format.",
    ),
    "a conversation among texts": ([says("x")], "that is a conversation where row 1 has plain text", "one format."),
}


def rows_around(name: str) -> list[dict]:
    """Two good rows, the bad one, and a good one."""
    value = BAD_ROWS[name][0]
    conversations = isinstance(value, list) != (name.split()[1:2] == ["conversation"] and "among" in name)
    good = [says("Hello")] if conversations or name == "text among conversations" else "Hello"
    if name == "a conversation among texts":
        good = "Hello"
    return [{"prompt": good}, {"prompt": good}, {"k": 1} if value is ABSENT else {"prompt": value}, {"prompt": good}]


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_before_an_lm_is_loaded(tmp_path, settings, name):
    path = jsonl(tmp_path / "rows.jsonl", rows_around(name))
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_datasets(RunArguments(dataset_name=path), settings)
    text = str(error.value)
    assert text.startswith(f"Row 3 of {path} (train) has a prompt ")
    for part in BAD_ROWS[name][1:]:
        assert part in text


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_the_trainer(tmp_path, trainer, name):
    dataset = read_dataset(jsonl(tmp_path / "rows.jsonl", rows_around(name)))
    with pytest.raises(ValueError, match=SENTENCE) as error:
        trainer(dataset)
    text = str(error.value)
    assert text.startswith("Row 3 of `train_dataset` has a prompt ")
    for part in BAD_ROWS[name][1:]:
        assert part in text


@pytest.mark.fault
@pytest.mark.parametrize("name", random.Random(0).sample(sorted(BAD_ROWS), 12))
def test_a_bad_row_is_named_by_every_other_caller(tmp_path, trainer, name):
    """A comparison, DPO's pairs, the training of a reward, and the trainer's evaluation."""
    rows = [{**row, "chosen": "a", "rejected": "b"} for row in rows_around(name)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    callers = {
        "compare": lambda: select_prompts(CompareArguments(methods=["sft"], dataset_name=path, split="train")),
        "pairs": lambda: check_pairs(load_split(DPOArguments(dataset_name=path), "train"), path),
        "reward": lambda: load_pairs(path),
        "evaluation": lambda: trainer(Dataset.from_dict({"prompt": ["a", "b"]}), {"hard": read_dataset(path)}),
    }
    for caller, call in callers.items():
        with pytest.raises(ValueError, match=SENTENCE) as error:
            call()
        text = str(error.value)
        where = "`eval_dataset`['hard']" if caller == "evaluation" else path
        assert text.startswith(f"Row 3 of {where}")
        assert BAD_ROWS[name][1] in text


GOOD_ROWS = {
    "text": ["Hello", "a", " x "],
    "all of Unicode": ["e\u0301 \U0001f600 你好 \u202e", "\x00 NUL \x07", "\ufeffBOM", "\\ud800", "[brackets] {}"],
    "text like code": ['[{"id": 1}]', "[1, 2]", "{'role': 'user'}", "None", "nan", "3"],
    "HH-RLHF's text as a prompt": ["\n\nHuman: Hello\n\nAssistant:"],
    "a conversation": [[says("a"), says("b", "assistant"), says("c")]],
    "a system prompt, empty too": [[says("a", "system"), says("b")], [says("", "system"), says("b")]],
    "a role of the template's": [[says("a", "critic")], [says("a", "developer"), says("b")]],
    "a tool's answer": [[says("a"), says(None, "assistant", tool_calls=[TOOL]), says("3", "tool", name="f")]],
    "text parts": [[says([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]],
    "text and parts": [[says("a")], [says([{"type": "text", "text": "a"}])]],
    "more keys": [[says("a", name="Ann", weight=1)]],
    "a long one": ["x" * 100_000],
}


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_good_rows_are_read_as_they_are(tmp_path, name):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in GOOD_ROWS[name]])
    read = load_prompts(path)["prompt"][:]
    assert len(read) == len(GOOD_ROWS[name])
    for prompt, given in zip(read, GOOD_ROWS[name], strict=True):
        if isinstance(given, str):
            assert prompt == given
        else:  # the rows share their keys, those that one has not are null
            shared = [{k: v for k, v in message.items() if v is not None} for message in prompt]
            assert shared == [{k: v for k, v in message.items() if v is not None} for message in given]


COLUMNS = {
    "question": ({"question": "x"}, "only question: rename `question` to `prompt`."),
    "another case": ({"Prompt": "x", "id": 1}, "only Prompt, id: rename `Prompt` to `prompt`."),
    "spaces": ({" prompt": "x"}, "rename ` prompt` to `prompt`."),
    "the plural": ({"prompts": "x"}, "rename `prompts` to `prompt`."),
    "Alpaca": ({"output": "y", "input": "", "instruction": "x"}, "rename `instruction` to `prompt`."),
    "language modelling": ({"text": "x"}, "rename `text` to `prompt`."),
    "chats": ({"messages": [says("x"), says("y", "assistant")]}, "make `prompt` from `messages`, without the assist"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "x"}]}, "make `prompt` from `conversations`, without"),
    "unknown names": ({"a": "x", "b": "y"}, "only a, b: rename the one that holds the prompts."),
    "data in a key": ({"data": [{"prompt": "x"}]}, "only data: rename the one that holds the prompts."),
    "an image": ({"prompt": "x", "image": "x.png"}, "has a column `image`, which TRL's trainers read as pictures"),
    "images": ({"prompt": "x", "images": ["x.png"]}, "has a column `images`, which TRL's trainers read as pictures"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", COLUMNS)
def test_other_columns_are_named(tmp_path, trainer, name):
    row, expected = COLUMNS[name]
    path = jsonl(tmp_path / "rows.jsonl", [row] * 4)
    for call in (lambda: load_prompts(path), lambda: trainer(load_dataset("json", data_files=path, split="train"))):
        with pytest.raises(ValueError, match=SENTENCE) as error:
            call()
        assert expected in str(error.value)


# Files

ROWS = [{"prompt": "Hello", "level": 3}, {"prompt": "Bye", "level": None}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"prompt,level\nHello,3\nBye,\n"


def parquet(path):
    Dataset.from_list(ROWS).to_parquet(path)


FORMATS = {
    "rows.jsonl": LINES,
    "rows.json": json.dumps(ROWS).encode(),
    "rows.ndjson": LINES.replace(b"\n", b"\r\n\r\n"),
    "ROWS.JSONL": b"\xef\xbb\xbf" + LINES,
    "lines.json": LINES,
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "rows.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV,
    "rows.tsv": CSV.replace(b",", b"\t"),
    "rows.parquet": parquet,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(CSV),
    "rows.jsonl.bz2": bz2.compress(LINES),
    "rows.jsonl.xz": lzma.compress(LINES),
    "a b [v2] é.jsonl": LINES,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_datasets_reads_it(tmp_path, name):
    content = FORMATS[name]
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    (tmp_path / "a b v é.jsonl").write_text('{"prompt": "another file"}\n')
    assert load_prompts(str(tmp_path / name))[:] == {"prompt": ["Hello", "Bye"], "level": [3, None]}


PACKED = gzip.compress(LINES * 2000)
DAMAGED = {
    "cut.jsonl": (LINES + b'{"prompt": "Hel', "line 3: JSON parse error: Missing a closing quotation mark"),
    "between.jsonl": (LINES + b'{"prompt" "x"}\n' + LINES, "line 3: JSON parse error: Missing a colon"),
    "html.jsonl": (b"<!DOCTYPE html>\n<html>\n", "line 1: JSON parse error"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n", "line 1: JSON parse"),
    "commas.jsonl": (LINES.replace(b"\n", b",\n"), "line 1: "),
    "texts.jsonl": (b'"x"\n"y"\n', "JSON parse error"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}\n', "The surrogate pair in string is invalid"),
    "latin.jsonl": (LINES + b'{"prompt": "caf\xe9"}\n', "line 3: Column 0: In chunk 0: Invalid: Invalid UTF8"),
    "latin in another column.jsonl": (
        b'{"prompt": "x", "k": "caf\xe9"}\n',
        "line 1: Column 1: In chunk 0: Invalid: Invalid UTF8",
    ),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "line 1: "),
    "pretty.json": (json.dumps(ROWS, indent=1).encode()[:-20], "line 8: "),
    "ragged.csv": (b"prompt,k\nx,1\ny,2,3\n", "Expected 2 fields in line 3, saw 3"),
    "quote.csv": (b'prompt,k\n"x,1\ny,2\n', "EOF inside string starting at row 1"),
    "latin.csv": (CSV + b"caf\xe9,1\n", "line 4: 'utf-8' codec can't decode byte 0xe9"),
    "cut.parquet": (b"PAR1" + b"\0" * 50, "Parquet magic bytes not found in footer"),
    "csv.parquet": (CSV, "Parquet magic bytes not found in footer"),
    "cut.jsonl.gz": (PACKED[:-20], "Compressed file ended before the end-of-stream marker was reached"),
    "plain.jsonl.gz": (LINES, "Not a gzipped file"),
    "cut.csv.gz": (gzip.compress(CSV)[:-6], "Compressed file ended before the end-of-stream marker"),
    "line.jsonl.gz": (gzip.compress(LINES + b"{"), "line 3: JSON parse error"),
    "plain.csv.xz": (CSV, "format"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_its_line(tmp_path, capfd, name):
    content, expected = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_prompts(str(tmp_path / name))
    text = str(error.value)
    assert text.startswith(f"The dataset {tmp_path / name} could not be read (")
    assert expected in text
    assert text.endswith("): mend the file.")
    assert "Failed to" not in capfd.readouterr().err


UNREADABLE = {
    "prompts.txt": (b"Hello\n", "is of no known format: give .json, .jsonl,"),
    "prompts.xlsx": (b"PK", "is of no known format"),
    "prompts": (LINES, "is of no known format"),
    "prompts.parquet.gz": (gzip.compress(b"PAR1"), "is of no known format"),
    "prompts.jsonl.zip": (b"PK", "is of no known format"),
    "empty.jsonl": (b"", "is empty: the file has 0 bytes."),
    "empty.csv": (b"", "is empty: the file has 0 bytes."),
    "empty.parquet": (b"", "is empty: the file has 0 bytes."),
    "blank.jsonl": (b"\n\n", 'could not be read (Instruction "train" corresponds to no data)'),
    "header.csv": (b"prompt,level\n", 'could not be read (Instruction "train" corresponds to no data)'),
    "numbers.csv": (b"prompt\n1\n2\n", "Row 1 of {} (train) has a prompt that is a number (1)"),
    "gap.csv": (b"prompt,k\nx,1\n,2\n", "Row 2 of {} (train) has a prompt that is null"),
    "na.csv": (b"prompt,k\nx,1\nNA,2\n", "Row 2 of {} (train) has a prompt that is null"),
    "dates.jsonl": (b'{"prompt": "2024-01-01"}\n', "Row 1 of {} (train) has a prompt that is of type datetime"),
    "semicolons.csv": (b"prompt;level\nx;1\n", "has no `prompt` column, only prompt;level"),
    "columns.json": (b'{"prompt": ["x", "y"]}', "Row 1 of {} (train) has a prompt whose message 1 is text"),
    "nowhere/prompts.jsonl": (None, "There is no dataset file "),
    "missing.parquet": (None, "There is no dataset file "),
    "missing.csv.gz": (None, "There is no dataset file "),
    "missing": (None, "There is no dataset file "),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, name):
    content, expected = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_prompts(str(tmp_path / name))
    text = str(error.value)
    assert expected.format(tmp_path / name) in text
    assert str(tmp_path / name) in text
    assert "Hub" not in text


@pytest.mark.fault
@pytest.mark.parametrize("name", ["some-org/no-such-data", "no-such-data"])
def test_a_name_that_is_neither_here_nor_on_the_hub(name):
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_prompts(name)
    assert f"The dataset {name} could not be read (Couldn't reach '{name}' on the Hub" in str(error.value)
    assert "there is no such file or folder here" in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["rows.csv", "./rows", "data/v1/rows", "rows.jsonl.gz"])
def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_proxy.reading.load_dataset", None)
    with pytest.raises(ValueError, match=f"There is no dataset file {name}"):
        load_prompts(name)


def test_other_columns_reach_the_reward_as_they_are(tmp_path):
    rows = [
        {"prompt": "x", "when": datetime.datetime(2024, 1, 1), "meta": {"a": [1, None], "b": "y"}, "none": None},
        {"prompt": "y", "when": None, "meta": {"a": [], "b": None}, "none": None},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert load_prompts(str(tmp_path / "rows.parquet")).to_list() == rows


# Folders, configurations, splits


@pytest.fixture
def folders(tmp_path):
    """The same splits, `train` of ten rows and `test` of two, as each kind of folder."""
    train, test = ([{"prompt": f"{name} {i}"} for i in range(n)] for name, n in (("train", 10), ("test", 2)))
    for folder, suffix in (("plain", ""), ("data", "-00000-of-00001")):
        inside = tmp_path / folder / ("data" if suffix else "")
        inside.mkdir(parents=True)
        jsonl(inside / f"train{suffix}.jsonl", train)
        jsonl(inside / f"test{suffix}.jsonl", test)
    both = {"train": Dataset.from_list(train), "test": Dataset.from_list(test)}
    DatasetDict(both).save_to_disk(tmp_path / "disk")
    both["train"].save_to_disk(tmp_path / "single")
    (tmp_path / "configured").mkdir()
    for name in ("easy", "hard"):
        jsonl(tmp_path / "configured" / f"{name}.jsonl", [{"prompt": name}])
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard"))
    (tmp_path / "configured" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return tmp_path


SPLITS = {
    "train": [f"train {i}" for i in range(10)],
    "test": ["test 0", "test 1"],
    "train[:3]": ["train 0", "train 1", "train 2"],
    "train[-1:]": ["train 9"],
    "train[10%:30%]": ["train 1", "train 2"],
    "train[:-8]": ["train 0", "train 1"],
    "train[8:1000]": ["train 8", "train 9"],
    "test+train[:1]": ["test 0", "test 1", "train 0"],
    "train[:1] + train[:1]": ["train 0", "train 0"],
}


@pytest.mark.parametrize("folder", ["plain", "data", "disk"])
def test_splits_mean_what_they_mean_in_datasets(folders, folder):
    for split, expected in SPLITS.items():
        assert load_prompts(str(folders / folder), split)["prompt"][:] == expected
    for split in ("train[:3]", "train[10%:30%]", "test+train[:1]", "all"):
        assert load_prompts(str(folders / "plain"), split)[:] == load_dataset(str(folders / "plain"), split=split)[:]


def test_a_file_and_a_saved_dataset_have_one_split(folders):
    for name in ("plain/train.jsonl", "single"):
        assert load_prompts(str(folders / name), "train[9:]")["prompt"][:] == ["train 9"]
        for split in ("test", "validation"):
            with pytest.raises(ValueError, match=f"{name} has no split '{split}', only train: name one of them, or a"):
                load_prompts(str(folders / name), split)


def test_configurations(folders):
    for name in ("easy", "hard"):
        run_args = RunArguments(dataset_name=str(folders / "configured"), dataset_config=name)
        assert load_split(run_args, "train")["prompt"][:] == [name]
        compare = CompareArguments(
            methods=["sft"], dataset_name=str(folders / "configured"), dataset_config=name, split="train"
        )
        assert select_prompts(compare)["prompt"][:] == [name]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("folder", "split", "config", "expected"),
    [
        ("plain", "dev", None, "has no split 'dev', only train, test: name one of them, or a part of one"),
        ("plain", "Train", None, "has no split 'Train', only train, test"),
        ("disk", "validation", None, "has no split 'validation', only train, test"),
        ("single", "test", None, "has no split 'test', only train"),
        ("plain", "train[:1]+dev", None, "has no split 'train[:1]+dev', only train, test"),
        ("plain/train.jsonl", "validation[:2]", None, "has no split 'validation[:2]', only train"),
        ("plain", "", None, "The split '' of the dataset"),
        ("plain", "train[", None, "write splits and slices as in train, train[:90%] or train[:100]+test."),
        ("plain", "train[a:b]", None, "Unrecognized instruction format: train[a:b]"),
        ("plain", "train[3]", None, "Unrecognized instruction format"),
        ("plain", "train[::2]", None, "Unrecognized instruction format"),
        ("plain", "train[:200%]", None, "Percent slice boundaries must be"),
        ("plain", "train[20:]", None, "(train[20:]) is empty: train has 10, test has 2 rows."),
        ("plain", "train[5:3]", None, "(train[5:3]) is empty"),
        ("disk", "test[:1%]", None, "(test[:1%]) is empty"),
        ("configured", "train", None, "['easy', 'hard']): choose one by --dataset_config."),
        ("configured", "train", "middling", "BuilderConfig 'middling' not found. Available: ['easy', 'hard']"),
        ("plain", "train", "hard", "BuilderConfig 'hard' not found. Available: ['default']"),
        ("plain/train.jsonl", "train", "hard", "has no configurations: leave --dataset_config hard out."),
        ("disk", "train", "hard", "has no configurations: leave --dataset_config hard out."),
        ("embedded", "train", "hard", "The embedded prompts have no configurations"),
        ("embedded", "train_weekly", None, "has no split 'train_weekly', only train, validation, test,"),
        ("embedded", "train[2000:]", None, "The dataset embedded (train[2000:]) is empty: train has 896,"),
    ],
)
def test_a_split_that_does_not_exist_is_refused(folders, folder, split, config, expected):
    name = folder if folder == "embedded" else str(folders / folder)
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_prompts(name, split, config=config)
    assert expected in str(error.value)


def test_slices_of_the_embedded_prompts():
    whole = load_prompts("embedded", "train+train_everyday")
    part = load_prompts("embedded", "train[890:]+train_everyday[:2]")
    assert part["prompt"][:] == [*whole["prompt"][890:896], *whole["prompt"][896:898]]


FOLDERS = {
    "nothing": ({}, "doesn't contain any data files"),
    "no data": ({"load.py": b"x"}, "No (supported) data files found"),
    "a script": ({"a script.py": b"x"}, "Dataset scripts are no longer supported"),
    "a bad file": ({"train.jsonl": LINES, "test.jsonl": b"{"}, "JSON parse error"),
    "other columns": ({"train.jsonl": LINES, "test.jsonl": b'{"question": "x"}\n'}, "column names don't match"),
    "an empty split": ({"train.jsonl": LINES, "test.jsonl": b"\n"}, 'Instruction "test" corresponds to no data'),
    "half of a saved dataset": ({"state.json": b"{}"}, "Directory"),
    "a damaged saved dataset": ({"dataset_dict.json": b"{"}, "Expecting property name"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_read(tmp_path, name):
    files, expected = FOLDERS[name]
    (tmp_path / name).mkdir()
    for file, content in files.items():
        (tmp_path / name / file).write_bytes(content)
    with pytest.raises(ValueError, match=SENTENCE) as error:
        load_prompts(str(tmp_path / name))
    text = str(error.value)
    assert f"The dataset {tmp_path / name} could not be read (" in text
    assert expected in text


# Training and evaluation


@pytest.mark.fault
def test_a_file_has_no_rows_to_evaluate_on(folders, settings):
    path = str(folders / "plain" / "train.jsonl")
    evaluated = SimpleNamespace(**{**vars(settings), "eval_strategy": IntervalStrategy.STEPS})
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=SENTENCE) as error:
            load_datasets(RunArguments(dataset_name=path, dataset_test_split=split), evaluated)
        text = str(error.value)
        assert text.startswith(f"--eval_strategy steps has no prompts to evaluate on (The dataset {path} has no split")
        assert "--dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]'" in text
    remedied = RunArguments(dataset_name=path, dataset_train_split="train[:90%]", dataset_test_split="train[90%:]")
    train, test = load_datasets(remedied, evaluated)
    assert train["prompt"][:] == [f"train {i}" for i in range(9)]
    assert test["prompt"][:] == ["train 9"]
    assert load_datasets(RunArguments(dataset_name=path), settings)[1] is None


def test_prompts_in_both_splits_are_counted(folders, settings, monkeypatch):
    said = []
    monkeypatch.setattr("trl_proxy.runs.arguments.logger.warning", said.append)
    evaluated = SimpleNamespace(**{**vars(settings), "eval_strategy": "steps"})
    for train, test in (("train[:6]", "train[4:]"), ("train", "test")):
        folder = str(folders / "plain")
        load_datasets(RunArguments(folder, dataset_train_split=train, dataset_test_split=test), evaluated)
    assert said == [
        "2 prompts of the evaluation (train[4:]) are trained on too (train[:6]): `eval_reward` says less about new "
        "prompts."
    ]


@pytest.mark.fault
def test_streaming_is_refused():
    with pytest.raises(
        ValueError,
        match="`dataset_streaming=True` is not supported: every prompt is checked before training; leave it out",
    ):
        RunArguments(dataset_streaming=True)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("prompts", "arguments", "expected"),
    [
        (1, {}, "has 1 prompts and a rollout takes 2 (4 responses, num_generations=2)"),
        (6, {"steps_per_generation": 4}, "has 6 prompts and a rollout takes 8 (16 responses, num_generations=2)"),
        (6, {"max_steps": -1, "steps_per_generation": 4}, "give at least 8 prompts, or lower"),
        (3, {"num_generations": 1}, "has 3 prompts and a rollout takes 4 (4 responses, num_generations=1)"),
        (9, {"steps_per_generation": None, "generation_batch_size": 20}, "has 9 prompts and a rollout takes 10"),
        (9, {"max_steps": 0}, "`max_steps` must be at least 1, or -1 to train for `num_train_epochs`, got 0"),
        (9, {"max_steps": -1, "num_train_epochs": 0}, "`num_train_epochs` must be above 0, got 0"),
        (9, {"max_steps": -1, "num_train_epochs": -1}, "`num_train_epochs` must be above 0, got -1"),
    ],
)
def test_a_training_without_work_is_refused(trainer, prompts, arguments, expected):
    with pytest.raises(ValueError, match=SENTENCE) as error:
        trainer(Dataset.from_dict({"prompt": [f"p{i}" for i in range(prompts)]}), **arguments)
    assert expected in str(error.value)


@pytest.mark.fault
def test_too_few_prompts_are_found_before_the_lm_is_loaded(folders, settings):
    few = SimpleNamespace(**{**vars(settings), "generation_batch_size": 40})
    with pytest.raises(ValueError, match="has 10 prompts and a rollout takes 20"):
        load_datasets(RunArguments(str(folders / "plain")), few)


def test_every_row_is_evaluated_once(trainer, tmp_path):
    """Also if there are fewer than a batch, or one is left over, with several responses to each."""
    seen = []
    prompts = ["aa", "bb", "cc", "dd", "ee"]
    for number, generations in ((5, 1), (3, 2), (1, 2)):
        one = trainer(
            Dataset.from_dict({"prompt": prompts}),
            Dataset.from_dict({"prompt": prompts[:number]}),
            per_device_eval_batch_size=4,
            num_generations_eval=generations,
        )
        one.reward_caller.functions[0] = lambda prompts, completions, **columns: (
            seen.extend(prompts) or [0.0] * len(prompts)
        )
        seen.clear()
        one.evaluate()
        assert sorted(seen) == sorted(prompts[:number] * generations)
    with pytest.raises(ValueError, match="would leave 1 of the 5 evaluation responses out, because a batch has 4"):
        trainer(
            Dataset.from_dict({"prompt": prompts}),
            Dataset.from_dict({"prompt": prompts}),
            per_device_eval_batch_size=4,
            dataloader_drop_last=True,
        )


def test_a_stream_is_trained_on_as_before(trainer):
    rows = [{"prompt": f"p{i}"} for i in range(8)]
    one = trainer(IterableDataset.from_generator(lambda: iter(rows)))
    one.train()
    assert one.state.global_step == 1


# Chat templates

STRICT = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m['content'] | trim }}{% endfor %}"
)
REFUSED = {
    "a system prompt": (STRICT, [says("a", "system"), says("b")], "TemplateError: System role not supported"),
    "two questions": (STRICT, [says("a"), says("b")], "TemplateError: Conversation roles must alternate"),
    "an unknown role": (STRICT, [says("a"), says("b", "critic"), says("c", "critic")], "TemplateError: Conversation"),
    "parts": ("{{ messages[0]['content'] + '!' }}", [says([{"type": "text", "text": "a"}])], "TypeError: can only"),
    "a missing name": ("{{ messages[0].name.first }}", [says("a")], "UndefinedError: "),
    "few messages": ("{{ messages[1].content.strip() }}", [says("a")], "UndefinedError: "),
    "a sum": ("{{ 1 // (messages | length - 1) }}", [says("a")], "ZeroDivisionError: "),
    "nothing": ("{% if messages[0].content != 'a' %}x{% endif %}", [says("a")], "without tokens"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_refuses_is_named_before_the_first_rollout(trainer, tiny_tokenizer, monkeypatch, name):
    template, prompt, expected = REFUSED[name]
    good = [says("z", name={"first": "A"} if "name" in name else None), says("y", "assistant"), says("x")]
    rows = [{"prompt": good}] * 1001 + [{"prompt": prompt}, {"prompt": good}]
    template = template.replace("messages[1]", "messages[2]")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    dataset = read_dataset_of(rows)
    with pytest.raises(ValueError, match=SENTENCE) as error:
        trainer(dataset)
    text = str(error.value)
    assert text.startswith("Row 1002 of `train_dataset` has a prompt ")
    assert expected in text


def read_dataset_of(rows) -> Dataset:
    return Dataset.from_dict({"prompt": [row["prompt"] for row in rows]}, on_mixed_types="use_json")


@pytest.mark.fault
def test_a_tokenizer_that_gives_no_tokens(trainer, tiny_tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    render = lambda prompts: [[] if prompt == "b" else [1] for prompt in prompts]  # noqa: E731
    with pytest.raises(ValueError, match="Row 2 of x has a prompt without tokens"):
        check_prompts(dataset, "x", render)
    with pytest.raises(ValueError, match=r"Row 1 of x has a prompt of 1 tokens, which with up to 4 of the response"):
        check_prompts(dataset, "x", lambda prompts: [[1]] * len(prompts), positions=4, max_new_tokens=4)
    check_prompts(dataset, "x", lambda prompts: [[1]] * len(prompts), positions=5, max_new_tokens=4)


@pytest.mark.fault
def test_a_batch_that_cannot_be_rendered_at_all():
    def render(prompts):
        if len(prompts) > 1:
            raise RuntimeError("no batches")
        return [[1]]

    with pytest.raises(ValueError, match=r"The prompts 1 to 2 of x cannot be rendered \(RuntimeError: no batches\)"):
        check_prompts(Dataset.from_dict({"prompt": ["a", "b"]}), "x", render)


# Preference data


def hh(*turns) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


ANSWERS = {"chosen": [says("good", "assistant")], "rejected": [says("bad", "assistant")]}
PAIRS = {
    "HH-RLHF": {"chosen": hh("q", "good"), "rejected": hh("q", "bad")},
    "HH-RLHF without a first line": {"chosen": hh("q", "good").strip(), "rejected": hh("q", "bad").strip()},
    "messages without a prompt": {side: [says("q"), *answer] for side, answer in ANSWERS.items()},
    "UltraFeedback": {"prompt": "q", **{side: [says("q"), *answer] for side, answer in ANSWERS.items()}},
    "a prompt that is repeated": {"prompt": [says("q")], **{k: [says("q"), *v] for k, v in ANSWERS.items()}},
    "messages": {"prompt": [says("q")], **ANSWERS},
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_of_every_format_give_the_same_pairs(tmp_path, name):
    path = jsonl(tmp_path / "pairs.jsonl", [PAIRS[name] | {"k": 1}] * 2)
    expected = {"prompt": [says("q")], **ANSWERS}
    prompts = load_prompts(path)
    assert prompts[1] == expected | {"k": 1}
    assert check_pairs(prompts, path).to_list() == [expected] * 2
    assert load_pairs(path) == [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 2
    assert select_prompts(CompareArguments(methods=["sft"], dataset_name=path, split="train"))["prompt"][1] == [
        says("q")
    ]


def test_dialogues_of_several_turns(tmp_path):
    turns = ["What is it?", "A bird.\n\nIt sings.", "Which: one?"]
    path = jsonl(tmp_path / "hh.jsonl", [{"chosen": hh(*turns, "A wren"), "rejected": hh(*turns, "No")}])
    prompt = [says(turns[0]), says(turns[1], "assistant"), says(turns[2])]
    assert load_prompts(path).to_list() == [
        {"prompt": prompt, "chosen": [says("A wren", "assistant")], "rejected": [says("No", "assistant")]}
    ]
    text = "What is it?\n\nAssistant: A bird.\n\nIt sings.\n\nHuman: Which: one?"
    assert load_pairs(path) == [{"prompt": text, "chosen": "A wren", "rejected": "No"}]


def test_plain_pairs_stay_as_they_are(tmp_path):
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"}
    path = jsonl(tmp_path / "pairs.jsonl", [row])
    assert check_pairs(load_prompts(path), path).to_list() == [row]


LEFT_OUT = {
    "other prompts": ({"chosen": hh("q", "a"), "rejected": hh("p", "b")}, "the two sides answer different prompts"),
    "other turns": (
        {"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "c", "r", "d")},
        "the two sides answer different prompts",
    ),
    "no answer": ({"chosen": hh("q", "a", "r"), "rejected": hh("q", "b", "r")}, "a side does not end with an answer"),
    "one side has none": ({"chosen": hh("q", "a"), "rejected": hh("q")}, "a side does not end with an answer"),
    "a question twice": (
        {"chosen": "\n\nHuman: q\n\nHuman: p\n\nAssistant: a", "rejected": hh("q", "b")},
        "the turns of Human and Assistant do not alternate",
    ),
    "an answer first": (
        {"chosen": "\n\nAssistant: a", "rejected": hh("q", "b")},
        "the turns of Human and Assistant do",
    ),
    "an empty question": ({"chosen": hh("", "a"), "rejected": hh("", "b")}, "a turn before the answer is empty"),
    "an empty turn": (
        {"chosen": hh("q", "", "r", "a"), "rejected": hh("q", "", "r", "b")},
        "a turn before the answer is empty",
    ),
    "messages of other prompts": (
        {"chosen": [says("q"), says("a", "assistant")], "rejected": [says("p"), says("b", "assistant")]},
        "the two sides answer different prompts",
    ),
    "messages without an answer": ({"chosen": [says("q")], "rejected": [says("q")]}, "a side does not end with an"),
    "an answer alone": (ANSWERS, "a side does not end with an answer to a prompt"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_pair_that_answers_no_prompt_is_left_out_and_counted(tmp_path, monkeypatch, name):
    said = []
    monkeypatch.setattr("trl_proxy.reading.logger.warning", said.append)
    bad, expected = LEFT_OUT[name]
    good = PAIRS["HH-RLHF" if isinstance(bad["chosen"], str) else "messages without a prompt"]
    path = jsonl(tmp_path / "pairs.jsonl", [good, bad, good])
    assert load_prompts(path)["prompt"][:] == [[says("q")]] * 2
    assert len(said) == 1
    assert said[0].startswith(f"1 of the 3 rows of {path} (train) are left out: 1 because {expected}")
    path = jsonl(tmp_path / "pairs.jsonl", [bad])
    with pytest.raises(ValueError, match=r"1 of the 1 rows of .* and none is left, so mend the dataset") as error:
        load_prompts(path)
    assert expected in str(error.value)


USELESS = {
    "same text": ({"chosen": "a", "rejected": "a"}, "the two responses are the same"),
    "empty text": ({"chosen": "a", "rejected": ""}, "a response is empty"),
    "blank text": ({"chosen": " \n", "rejected": "a"}, "a response is empty"),
    "same dialogues": ({"chosen": hh("q", "a"), "rejected": hh("q", "a ")}, "the two responses are the same"),
    "an empty end": ({"chosen": hh("q", "a"), "rejected": hh("q", "")}, "a response is empty"),
    "same messages": (dict.fromkeys(ANSWERS, ANSWERS["chosen"]), "the two responses are the same"),
    "an empty message": ({**ANSWERS, "rejected": [says("", "assistant")]}, "a response is empty"),
    "another role": ({**ANSWERS, "rejected": [says("b", "user")]}, "a response is empty"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", USELESS)
def test_a_pair_that_prefers_nothing_is_left_out_and_counted(tmp_path, monkeypatch, name):
    said = []
    monkeypatch.setattr("trl_proxy.reading.logger.warning", said.append)
    bad, expected = USELESS[name]
    if "dialogues" in name or "end" in name:
        good = PAIRS["HH-RLHF"]
    elif isinstance(bad["chosen"], list):
        good, bad = PAIRS["messages"], {"prompt": [says("q")], **bad}
    else:
        good, bad = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", **bad}
    path = jsonl(tmp_path / "pairs.jsonl", [good, bad])
    prompts = load_prompts(path)
    assert len(prompts) == 2  # the prompt is good
    assert len(check_pairs(prompts, "pairs")) == 1
    assert said == [f"1 of the 2 rows of pairs are left out: 1 because {expected}."]


BAD_PAIRS = {
    "a null side": ({"prompt": "q", "chosen": "a", "rejected": None}, "has a rejected that is null"),
    "a score": ({"prompt": "q", "chosen": 0.5, "rejected": 0.1}, "has a chosen that is a number (0.5)"),
    "a list of answers": ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, "has a rejected whose message 1 is text"),
    "no role": (
        {"prompt": [says("q")], "chosen": [{"content": "a"}], "rejected": [{"content": "b"}]},
        "has a chosen whose message 1 has no role",
    ),
    "a null content": ({"prompt": [says("q")], **ANSWERS, "rejected": [says(None, "assistant")]}, "has no content"),
    "text for a conversation": ({"prompt": [says("q")], "chosen": "a", "rejected": "b"}, "of another format than its"),
    "one side of text": ({"prompt": [says("q")], **ANSWERS, "rejected": "b"}, "of another format than its prompt"),
    "messages for text": ({"prompt": "q", **ANSWERS}, "that is plain text, and the responses are conversations"),
    "conversations of another prompt": (
        {"prompt": "q", **{k: [says("p"), *v] for k, v in ANSWERS.items()}},
        "that is plain text, and the responses are conversations without it",
    ),
    "no dialogue": ({"chosen": "good", "rejected": "bad"}, "has a chosen that is no dialogue ('good'): add a column"),
    "one dialogue": ({"chosen": hh("q", "a"), "rejected": "bad"}, "has a rejected that is no dialogue ('bad')"),
    "words before": ({"chosen": "x" + hh("q", "a"), "rejected": hh("q", "b")}, "has a chosen that is no dialogue"),
    "a null dialogue": ({"chosen": None, "rejected": hh("q", "b")}, "has a chosen that is null"),
    "an empty question": (
        {k: [says(" "), *v] for k, v in ANSWERS.items()},
        "has a prompt whose message 1 (user) is empty",
    ),
    "a null prompt": ({"prompt": None, "chosen": [says("q"), says("a", "assistant")]}, "has a prompt that is null"),
    "no other side": ({"prompt": "q", "chosen": "a"}, "has no column rejected: a pair needs prompt, chosen, rejected"),
    "no answers": ({"prompt": "q"}, "has no column chosen, rejected: a pair needs prompt, chosen, rejected"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_named(tmp_path, name):
    pair, expected = BAD_PAIRS[name]
    path = jsonl(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(ValueError, match=SENTENCE) as error:
        check_pairs(load_prompts(path), f"{path} (train)")
    text = str(error.value)
    assert text.startswith((f"Row 1 of {path} (train) has a ", f"The dataset {path} (train) "))
    assert expected in text


@pytest.mark.parametrize("readme", [True, False])
def test_a_changed_file_of_a_folder_is_read_anew(tmp_path, readme):
    folder = tmp_path / "folder"
    folder.mkdir()
    if readme:
        listed = "- config_name: default\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for prompts in (["one"], ["one", "two"], ["two"]):
        (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        assert read_dataset(str(folder))["prompt"][:] == prompts

"""Fixtures that all tests share: one thread, fixed seeds, tiny language models and a tokenizer built in memory."""

import functools
import gc
import importlib.util
import os
import random
import re
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from scipy import stats
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from trl_proxy import ProxyConfig, ProxyModelForCausalLM

VOCAB_SIZE = 96  # <pad>, <bos>, <eos>, <unk> and 92 printable characters
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)

logging.set_verbosity_error()
torch.set_num_threads(1)
# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(config, items):
    """Skips tests for a GPU without one, and the slow ones unless they are asked for."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow runs it"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same state of every generator."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_searched():
    """Every training begins with a garbage collection. It passes over what was there before a file's first test: most
    of that are the libraries."""
    gc.freeze()


@functools.cache
def _config(kind: str, tie: bool):
    shared = {
        "vocab_size": VOCAB_SIZE,
        # Large, so that the outputs of an untrained model vary.
        "initializer_range": 0.25,
        "tie_word_embeddings": tie,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if kind == "gpt2":
        return GPT2Config(
            n_embd=64, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared
        )
    if kind == "mamba":
        return MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **shared)
    shared |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    # `mistral`: attends to the last 6 tokens alone; `gemma3`: so does every other layer.
    return {
        "gpt_neox": lambda: GPTNeoXConfig(**shared),
        "gemma3": lambda: Gemma3TextConfig(
            sliding_window=6, layer_types=["sliding_attention", "full_attention"], head_dim=16, **shared
        ),
        "llama": lambda: LlamaConfig(**shared),
        "qwen2": lambda: Qwen2Config(**shared),
        "mistral": lambda: MistralConfig(sliding_window=6, **shared),
    }[kind]()


@pytest.fixture(scope="session")
def tiny_lm():
    """`tiny_lm(kind, tie=True, attn="sdpa", seed=0, dtype=torch.float32)`: a new random LM of hidden size 64, with 2
    layers, 96 tokens and 256 positions; `kind` is llama (grouped heads), gpt2, qwen2, gpt_neox, mistral (sliding
    window), gemma3 (one in every other layer) or mamba (state space)."""

    def build(kind: str = "llama", tie: bool = True, attn: str = "sdpa", seed: int = 0, dtype=torch.float32):
        torch.manual_seed(seed)
        config = type(_config(kind, tie)).from_dict(_config(kind, tie).to_dict())
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def four_bit_lm(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm("llama").save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with pad, bos, eos and a chat template; made for the 96 tokens of `tiny_lm`."""
    characters = [chr(c) for c in range(32, 127) if chr(c) not in "`|~"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def ragged_batch():
    """`ragged_batch(lengths, seed=0)`: left-padded random prompts, `{"input_ids", "attention_mask"}`."""

    def build(lengths, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.full((len(lengths), max(lengths)), PAD)
        attention_mask = torch.zeros_like(input_ids)
        for row, length in enumerate(lengths):
            input_ids[row, max(lengths) - length :] = torch.randint(4, VOCAB_SIZE, (length,), generator=generator)
            attention_mask[row, max(lengths) - length :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    return build


@pytest.fixture(scope="session")
def with_random_gate():
    """`with_random_gate(lm, config, scale=3.0, bias=0.0, seed=0)`: a gate (one hidden layer of even width) whose
    logits spread by about `scale` around `bias`, so that it both accepts and rejects."""

    def build(lm, config: ProxyConfig, scale: float = 3.0, bias: float = 0.0, seed: int = 0) -> ProxyModelForCausalLM:
        model = ProxyModelForCausalLM(lm, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for network in (model.gate, model.critic):
                first, _, last = network.mlp
                half, size = first.out_features // 2, first.in_features
                moments = torch.rand(2, sum(network.part_sizes), generator=generator)
                network.standardise(moments[0] - 0.5, moments[1] + 0.5)
                # Units in pairs of opposite sign: without them all logits share one offset far from `bias`.
                weight = torch.randn(half, size, generator=generator) * (2 / size) ** 0.5
                first.weight.copy_(torch.cat([weight, -weight]))
                first.bias.copy_(0.1 * torch.randn(2 * half, generator=generator))
                weight = torch.randn(half, generator=generator) * scale / (2 * half) ** 0.5
                last.weight.copy_(torch.cat([weight, -weight])[None])
                last.bias.fill_(bias)
        return model

    return build


@pytest.fixture
def python_of(tmp_path, tiny_lm, tiny_tokenizer):
    """`python_of(page)`: the Python blocks of a page as they would be typed one after the other, with a tiny LM, which
    is saved to `tmp_path / "lm"`, in place of the hub's."""

    def read(page: str) -> str:
        tiny_lm("llama").save_pretrained(tmp_path / "lm")
        tiny_tokenizer.save_pretrained(tmp_path / "lm")
        text = (Path(__file__).parents[1] / page).read_text()
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        assert '"Qwen/Qwen2.5-0.5B-Instruct"' in code
        return code.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tmp_path / "lm")))

    return read


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def brute_force():
    """The module `brute_force.py` next to this file (pytest's importlib mode has no imports between tests)."""
    return _load(Path(__file__).parent / "brute_force.py")


@pytest.fixture(scope="session")
def load_ranks():
    """The module `ranks.py` next to this file."""
    return _load(Path(__file__).parent / "ranks.py")


@pytest.fixture(scope="session")
def recorded_training():
    """The module `trl_proxy/trainer/recorded_training.py`."""
    folder = Path(__file__).parent / "trl_proxy" / "trainer"
    _load(folder / "brute_force_step.py")
    return _load(folder / "recorded_training.py")


@pytest.fixture(scope="session")
def load_fake_hub():
    """The module `fake_hub.py` next to this file."""
    return _load(Path(__file__).parent / "fake_hub.py")


@pytest.fixture(scope="session")
def load_script():
    """`load_script("compare")` -> the module scripts/compare.py; scripts are no package."""
    return functools.cache(lambda name: _load(Path(__file__).parents[1] / "scripts" / f"{name}.py"))


@pytest.fixture(scope="session")
def launch_two():
    """`launch_two(script, arguments, cwd=None, config=None)` -> what `accelerate launch` of two gloo ranks on the CPU
    ended with, as on two GPUs; `config` is a file of accelerate's settings."""
    root = Path(__file__).parents[1]

    def launch(script, arguments, cwd=None, config=None):
        settings = ["--config_file", config or root / "scripts" / "accelerate_configs" / "cpu.yaml"]
        settings += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings, root / script, *arguments]
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={
                **os.environ,
                "PYTHONPATH": f"{root}{os.pathsep}{cwd or root}",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    return launch


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """`start(argv, cwd, log, **env)` -> a `Script` of `fork_server.py`: a script of this project as a process of its
    own, which starts in no time; its output goes to the end of the file `log`. `start.python` stands for `python`."""
    module = _load(Path(__file__).parent / "fork_server.py")
    path = str(tmp_path_factory.mktemp("fork") / "socket")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, module.__file__, path], env=environment)
    end = time.monotonic() + 120
    while not os.path.exists(path):
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < end
        time.sleep(0.05)

    def start(argv, cwd, log, **env):
        with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
            files = (nothing.fileno(), file.fileno(), file.fileno())
            env = {**environment, "PYTHONPATH": f"{root}{os.pathsep}{cwd}", **env}
            return module.Script(path, [str(x) for x in argv], str(cwd), env, files)

    start.python = f"{path}.sh"
    yield start
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def start_ranks(fork_server):
    """`start_ranks(world, argv, cwd, log)` -> the exit statuses of gloo ranks on the CPU, started in no time as a
    launcher starts them; their output goes to the end of the file `log`."""

    def start(world, argv, cwd, log):
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        ranks = [fork_server(argv, cwd, log, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(world)]
        return [rank.wait() for rank in ranks]

    return start


@pytest.fixture(scope="session")
def bare_python():
    """`bare_python(folder)`: makes an environment there that sees this one's packages, and not that this checkout is
    installed; returns its interpreter."""

    def build(folder: Path) -> Path:
        venv.create(folder, symlinks=True)
        (site,) = (folder / "lib").glob("*/site-packages")
        # A plain path: the .pth files in there, as that of an editable installation, are not read.
        (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return folder / "bin" / "python"

    return build


@pytest.fixture(scope="session")
def pooled_chisquare():
    """`pooled_chisquare(observed, probabilities)`: whether draws are of a distribution."""

    def p_value(observed, probabilities) -> float:
        """p-value of a chi-square test, cells of small expectation pooled into one."""
        observed = np.asarray(observed, dtype=float)
        expected = np.asarray(probabilities, dtype=float)
        expected = expected / expected.sum() * observed.sum()
        small = expected < 5
        if small.any():
            observed = np.append(observed[~small], observed[small].sum())
            expected = np.append(expected[~small], expected[small].sum())
        if expected[-1] == 0:
            assert observed[-1] == 0
            observed, expected = observed[:-1], expected[:-1]
        assert len(expected) > 2
        return stats.chisquare(observed, expected).pvalue

    return p_value

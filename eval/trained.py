"""What the training scripts leave behind, as comparisons read it: without loading any weights."""

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from baselines.training import BASELINES, method_of
from eval.training_logs import TrainingLog, training_log
from trl_proxy import ProxyConfig
from trl_proxy.core.config import CONFIG_NAME, MODEL_FIELDS, WEIGHTS_NAME, proxy_file
from trl_proxy.decoding.settings import SAMPLING
from trl_proxy.runs.resume import RESULTS_FILE, newest_checkpoint, read_json
from trl_proxy.trainer.checkpoints import RUN_FILE
from trl_proxy.trainer.decoding import settings_of


@dataclass(frozen=True)
class TrainedRun:
    """The folder (or hub repository) of something trained, and what its training left there."""

    method: str
    folder: str
    seed: int
    variant: str
    settings: dict  # fingerprints of its files
    adapter_bytes: int
    episodes: int | None
    train_seconds: float | None
    train_peak_memory_mb: float | None
    log: TrainingLog | None
    decoding: dict  # arguments by which its LM was decoded in training
    config: ProxyConfig | None = None  # of a proxy


def describe(config: ProxyConfig) -> str:
    """A proxy's variant: its kind of features, and what differs from the default configuration."""
    named, defaults = {"features", *MODEL_FIELDS}, dataclasses.asdict(ProxyConfig())
    changed = {k: v for k, v in dataclasses.asdict(config).items() if k not in named and v != defaults[k]}
    return ", ".join([config.features, *(f"{name}={value}" for name, value in changed.items())])


def read_proxy(name: str) -> TrainedRun:
    """Reads a trained proxy's folder, without its weights.

    Args:
        name: folder or hub repository, followed by `:<seed>` if the folder has no run.json.

    Raises:
        ValueError: if there is no proxy, or its training seed is not known.
    """
    folder, _, tail = name.rpartition(":")
    folder, seed = (folder, int(tail)) if folder and tail.isdigit() else (name, None)
    check_finished(folder)
    config = ProxyConfig.from_pretrained(folder)
    weights = Path(proxy_file(folder, WEIGHTS_NAME))
    # scripts/train_proxy.py leaves its settings in the output folder, next to the proxy or above a checkpoint
    run = next((read_json(p) for f in (".", "..") if (p := Path(folder, f, RUN_FILE)).is_file()), {})
    if seed is None:
        if "seed" not in run:
            raise ValueError(
                f"{folder} has no run.json of scripts/train_proxy.py: give its training seed, {folder}:0."
            )
        seed = run["seed"]
    return TrainedRun(
        method="proxy",
        folder=folder,
        seed=seed,
        config=config,
        decoding=config.decoding or {},
        variant=describe(config),
        settings={
            "proxy_config_sha256": hashlib.sha256(Path(proxy_file(folder, CONFIG_NAME)).read_bytes()).hexdigest(),
            "proxy_weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        adapter_bytes=weights.stat().st_size,
        **read_results(folder),
    )


def check_finished(folder: str) -> None:
    """`ValueError` if a folder is that of a run which has begun and not ended: it names the newest checkpoint."""
    if checkpoint := newest_checkpoint(folder):
        raise ValueError(
            f"The training in {folder} is not finished: let it finish (the same command resumes), or name its newest "
            f"checkpoint, {checkpoint}."
        )


def at_thresholds(one: TrainedRun, thresholds: list[float]) -> list[TrainedRun]:
    """A copy of a proxy for every threshold that is not its own; an empty list for a baseline."""
    if one.config is None:
        return []
    return [
        dataclasses.replace(
            one,
            variant=describe(dataclasses.replace(one.config, threshold=threshold)),
            settings={**one.settings, "threshold": threshold},
        )
        for threshold in sorted(set(thresholds) - {one.config.threshold})
    ]


def read_baseline(folder: str) -> TrainedRun:
    """Reads the output folder of scripts/train_baseline.py, without its weights.

    Raises:
        ValueError: if it is not such a folder, holds no trained model, or that of no baseline.
    """
    run_file = Path(folder, RUN_FILE)
    if not run_file.is_file():
        raise ValueError(f"{folder} has no {RUN_FILE}: it is no output folder of scripts/train_baseline.py.")
    run = read_json(run_file)
    if missing := [name for name in ("method", "seed", "use_peft", "lora_r") if name not in run]:
        raise ValueError(f"{run_file} lacks {', '.join(missing)}: it is not of scripts/train_baseline.py.")
    method = method_of(run["method"])
    if method not in BASELINES:
        raise ValueError(
            f"{run_file} has the method {run['method']!r}, which is no baseline that trains ({', '.join(BASELINES)}): "
            "name its folder by --proxies if it is a proxy, or leave it out."
        )
    check_finished(folder)
    weights = min(Path(folder).glob("*model*.safetensors"), default=None)
    if weights is None:
        raise ValueError(f"{folder} holds no trained model yet: let scripts/train_baseline.py finish first.")
    return TrainedRun(
        method=method,
        folder=folder,
        seed=run["seed"],
        variant=f"lora_r={run['lora_r']}" if run["use_peft"] else "full",
        decoding=decoding_of(run),
        settings={"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
        adapter_bytes=weights.stat().st_size,
        **read_results(folder),
    )


def decoding_of(run: dict) -> dict:
    """The decoding arguments of a baseline's run.json, without those of its sampling: an evaluation is greedy."""
    fields = ("generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation")
    args = argparse.Namespace(**{"max_completion_length": None, **dict.fromkeys(fields)} | run)
    if args.repetition_penalty is None:  # DPO has no such field
        args.repetition_penalty = 1.0
    decoding = settings_of(args)
    kept = {name: value for name, value in decoding["generation_kwargs"].items() if name not in SAMPLING}
    return {**decoding, "generation_kwargs": kept, "system_prompt": run.get("system_prompt")}


def read_results(folder: str) -> dict:
    """What a training script measured in a finished run. The costs of the proxy that the run began with are added; if
    they are not known, neither are the totals."""
    results_file, run_file = Path(folder, RESULTS_FILE), Path(folder, RUN_FILE)
    results = read_json(results_file) if results_file.is_file() else {}
    has_log = bool(results) and Path(folder, "trainer_state.json").is_file()
    values = {key: results.get(key) for key in ("episodes", "train_seconds", "train_peak_memory_mb")}
    began_with = read_json(run_file).get("proxy_name_or_path") if run_file.is_file() else None
    if began_with is not None:
        before = read_results(began_with)
        for key, combine in {"episodes": sum, "train_seconds": sum, "train_peak_memory_mb": max}.items():
            both = (before[key], values[key])
            values[key] = None if None in both else combine(both)
    return {**values, "log": training_log(folder) if has_log else None}

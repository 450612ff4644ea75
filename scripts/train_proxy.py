"""Train a proxy over a frozen language model by PPO on a reward.

On a bare machine (embedded LM, reward and prompts, 2 CPU cores):

    accelerate launch scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml

On a GPU, with any causal LM, dataset and reward model of the hub:

    accelerate launch scripts/train_proxy.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --load_in_4bit \\
        --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --output_dir outputs/proxy

The same command again goes on where an interrupted run stopped. `--reward_funcs package.module.function` adds reward
functions of your own, weighted by `--reward_weights`.
"""

import copy
import dataclasses
import json
import os
import resource
import sys
from dataclasses import dataclass, field

import torch
from transformers import TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from trl_proxy import ProxyConfig, ProxyModelForCausalLM, ProxyPPOConfig, ProxyPPOTrainer
from trl_proxy.actor_critic import RewardError
from trl_proxy.config import WEIGHTS_NAME
from trl_proxy.defaults import EMBEDDED, load_lm, load_prompts, load_reward

RUN_FILE = "run.json"
# What may differ between an interrupted run and the command that goes on with it.
_NOT_IDENTITY = {"resume_from_checkpoint", "output_dir", "logging_dir", "disable_tqdm", "log_level", "report_to"}


@dataclass
class ProxyScriptArguments(ScriptArguments):
    """TRL's script arguments and where the reward comes from."""

    dataset_name: str | None = field(default=EMBEDDED, metadata={"help": "`embedded`, a JSON file or a hub dataset."})
    dataset_test_split: str = field(default="validation", metadata={"help": "Split for evaluation while training."})
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "`embedded`, `embedded:harmless`, `embedded:helpful`, or a model id. Default: `embedded`."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Dotted import paths of reward functions, beside the reward model."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train from the start in a folder that holds another run's checkpoints."}
    )


# ProxyConfig on the command line: `--temperature` is the training arguments' already, and the model fills in the rest.
ProxyArguments = dataclasses.make_dataclass(
    "ProxyArguments",
    [
        (f.name, f.type, copy.copy(f))
        for f in dataclasses.fields(ProxyConfig)
        if f.name not in ("temperature", "hidden_size", "embedding_size", "base_model_name_or_path")
    ],
)


def make_parser() -> TrlParser:
    """TRL's parser over everything that can be set."""
    types = (ProxyScriptArguments, ProxyPPOConfig, ProxyArguments, ModelConfig)
    return TrlParser(types, description=__doc__.partition("\n")[0])


def identity(*configs) -> dict:
    """What makes a run the run it is, as JSON-ready values."""
    values = {k: v for config in configs for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def checkpoint_to_resume(output_dir: str, run: dict, overwrite: bool) -> str | None:
    """The last checkpoint of this very run in `output_dir`; `ValueError` where it holds another run's."""
    path = os.path.join(output_dir, RUN_FILE)
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is None or overwrite:
        return None
    if not os.path.isfile(path):
        raise ValueError(f"{output_dir} holds a checkpoint of something else: choose another --output_dir.")
    with open(path, encoding="utf-8") as file:
        before = json.load(file)
    changed = sorted(key for key in run.keys() | before.keys() if run.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"{output_dir} holds the checkpoint of another run (different: {', '.join(changed)}): choose another "
            "--output_dir, or start anew with --overwrite_output_dir."
        )
    return last


def measured(trainer: ProxyPPOTrainer) -> dict[str, float]:
    """What the whole run took, the parts before an interruption included: for the records of compare.py."""
    args, history = trainer.args, [entry for entry in trainer.state.log_history if "step_time" in entry]
    steps = [entry["step"] for entry in history]
    # `step_time` is the mean over the steps since the last entry, rollouts and rewards included.
    seconds = sum(entry["step_time"] * (b - a) for entry, a, b in zip(history, [0, *steps], steps))
    peak = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024)  # KiB -> MiB
    if torch.cuda.is_available():
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**20)
    peak = trainer.accelerator.reduce(peak.to(trainer.accelerator.device), reduction="sum")
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "episodes": trainer.state.global_step * samples // args.num_iterations,
        "steps": trainer.state.global_step,
        "num_processes": args.world_size,
        "train_seconds": seconds,
        "train_peak_memory_mb": peak.item(),
    }


def main(
    script_args: ProxyScriptArguments, training_args: ProxyPPOConfig, proxy_args, model_args: ModelConfig
) -> ProxyPPOTrainer:
    """Loads everything, trains, saves the proxy to `output_dir`."""
    proxy_config = ProxyConfig(**dataclasses.asdict(proxy_args), temperature=training_args.temperature)
    run = identity(script_args, training_args, model_args, proxy_config)
    checkpoint = training_args.resume_from_checkpoint or checkpoint_to_resume(
        training_args.output_dir, run, script_args.overwrite_output_dir
    )
    dataset = load_prompts(script_args.dataset_name, script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_prompts(script_args.dataset_name, script_args.dataset_test_split)
    names = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    names += script_args.reward_funcs or []
    rewards = [load_reward(name) for name in names or [EMBEDDED]]

    set_seed(training_args.seed)
    lm, tokenizer = load_lm(
        model_args.model_name_or_path or EMBEDDED,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
    )
    model = ProxyModelForCausalLM(lm, proxy_config)
    trainer = ProxyPPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    if trainer.accelerator.is_main_process:
        model.print_trainable_parameters()
        os.makedirs(training_args.output_dir, exist_ok=True)
        with open(os.path.join(training_args.output_dir, RUN_FILE), "w", encoding="utf-8") as file:
            json.dump(run, file, indent=2)
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
    if state and state.global_step >= state.max_steps:
        # transformers would train one step more.
        trainer.accelerator.print(f"{checkpoint} is the end of this run: nothing left to train.")
        if training_args.load_best_model_at_end and state.best_global_step:
            checkpoint = os.path.join(os.path.dirname(checkpoint), f"checkpoint-{state.best_global_step}")
        model.proxy.load_weights(os.path.join(checkpoint, WEIGHTS_NAME))
        trainer.state = state
    else:
        if checkpoint:
            trainer.accelerator.print(f"Going on from {checkpoint}.")
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.save_metrics("train", measured(trainer), combined=False)
    trainer.accelerator.print(f"Proxy saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    return trainer


def leave(status: int) -> None:
    """Ends the process. One of several ends without taking its objects apart: the last reference to a gloo process
    group is DDP's, its destructor waits for a thread, and now and then that thread waits for the interpreter."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        trainer = main(*make_parser().parse_args_and_config())
    except (ValueError, RewardError) as error:
        print(f"train_proxy: {error}", file=sys.stderr)
        leave(1)
    leave(0)

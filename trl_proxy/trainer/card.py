"""The model card of a proxy that was trained just now."""

import os

from huggingface_hub import ModelCard
from transformers import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from ..modeling.card import proxy_card


def training_card(
    trainer, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> ModelCard:
    """The proxy's card with its training: prompts, steps, rewards, the reward on the validation prompts, trackers.

    Args:
        trainer ([`~trl_proxy.ProxyPPOTrainer`]): after or during its training.
        model_name, dataset_name, tags: as for [`~transformers.Trainer.create_model_card`].
    """
    rewards = ", ".join(
        f"{weight:g} x `{name}`"
        for name, weight in zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    )
    measured = [log["eval_reward"] for log in trainer.state.log_history if log.get("eval_reward") is not None]
    training = (
        f"It was trained by PPO with `trl-proxy` on {dataset_name or 'the prompts given to the trainer'} for "
        f"{trainer.state.global_step} steps, on the reward {rewards}."
    )
    if measured:
        training += (
            f" On the validation prompts the reward was {measured[0]:.3f} at first, {max(measured):.3f} at best."
        )
    links = _tracked_at()
    if links:
        training += f" Its training is logged at {', '.join(f'[{name}]({url})' for name, url in links.items())}."
    tags = [*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
    if "JOB_ID" in os.environ:
        tags.append("hf_jobs")
    if "Trackio" in links:
        tags.append(f"trackio:{links['Trackio']}")
    return proxy_card(
        trainer.model.proxy_config,
        *trainer.model.get_nb_trainable_parameters(),
        revision=getattr(trainer.model.lm.config, "_commit_hash", None),
        training=training,
        name=model_name,
        dataset=dataset_name,
        tags=list(dict.fromkeys(tags)),
    )


def _tracked_at() -> dict[str, str]:
    """Tracker -> where it shows this process's run, as TRL's own cards say it."""
    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in urls.items() if url}

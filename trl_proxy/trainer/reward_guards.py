"""Guards that stop a run of TRL's online trainers if a reward function fails or the LM's logits are not finite.

List [`RewardGuardMixin`] before RLOOTrainer or GRPOTrainer among the parents. The run then ends on every process, not
only on the one whose reward failed. The error names the prompt in one sentence. The run can resume from a checkpoint.
"""

import torch
from accelerate.utils import gather, gather_object
from trl.models import prepare_deepspeed

from ..decoding.hidden_states import own_hook
from ..devices import random_state_of, set_random_state
from ..ranks import all_or_none
from ..rewards.caller import RewardCaller
from ..rewards.checks import RewardError
from ..rewards.classifier import ClassifierReward
from .checkpoints import REWARD_FAILED, AtomicCheckpointMixin, EpochSampler
from .metrics import RowMetricsMixin


class _LogitsWatch:
    """Notices NaN or +inf in the LM's logits; tokens drawn from such logits are meaningless."""

    def __init__(self, head: torch.nn.Module):
        self.head = head
        self.largest: list[torch.Tensor] = []

    def __enter__(self):
        self.hook = own_hook(self.head.register_forward_hook, self._look)
        return self

    def _look(self, module, args, logits: torch.Tensor) -> None:
        if logits.numel():
            self.largest.append(logits.amax())

    def __exit__(self, *exception):
        self.hook.remove()

    def noticed(self) -> bool:
        return bool(self.largest) and not (torch.stack(self.largest) < torch.inf).all()


class RewardGuardMixin(RowMetricsMixin, AtomicCheckpointMixin):
    """A mixin to list before TRL's RLOOTrainer or GRPOTrainer. A [`RewardCaller`] calls the rewards.
    `args.reward_timeout`, if it exists, limits each call, in seconds."""

    def __init__(
        self,
        model,
        reward_funcs,
        args=None,
        *,
        train_dataset=None,
        eval_dataset=None,
        reward_processing_classes=None,
        **kwargs,
    ):
        if kwargs.get("environment_factory") is not None:
            raise ValueError("`environment_factory` is not supported: no reward here is handed an environment.")
        self.reward_caller = RewardCaller(
            _with_models(reward_funcs, args),
            weights=getattr(args, "reward_weights", None),
            timeout=getattr(args, "reward_timeout", None),
            processing_classes=reward_processing_classes,
            chat_template_kwargs=getattr(args, "chat_template_kwargs", None),
        )
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            self._check_rewards(dataset, args)
        self._watch: _LogitsWatch | None = None
        super().__init__(  # type: ignore[call-arg]
            model=model,
            reward_funcs=list(self.reward_caller.functions),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.reward_func_names = self.reward_caller.names
        for classifier in self.reward_caller.classifiers:
            if self.is_deepspeed_enabled:
                classifier.model = prepare_deepspeed(classifier.model, self.accelerator)
            else:
                classifier.to(self.accelerator.device)

    def _check_rewards(self, dataset, args) -> None:
        """`ValueError` if a reward cannot be called on the dataset. A stream may not know its columns."""
        columns = getattr(dataset, "column_names", None)
        if columns is None:
            return
        if getattr(args, "remove_unused_columns", False):
            columns = [name for name in columns if name in ("prompt", "image", "images")]
        prompts = dataset["prompt"] if "prompt" in columns and hasattr(dataset, "__len__") else []
        self.reward_caller.check(columns, prompts[0] if len(prompts) else None)

    def _get_train_sampler(self, dataset=None):
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _check_logits(self, prompts) -> None:
        """`ValueError` on every process if the LM's logits in this rollout were not finite on any process. Only the
        first call for a rollout checks them."""
        watch, self._watch = self._watch, None
        if watch is not None and (first := gather_object([prompts[0]] if watch.noticed() else [])):
            raise _not_finite(first[0])

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """The rewards `(all B, functions)`, NaN for None; `RewardError` on every process if one is invalid."""
        self._check_logits(prompts)
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"}
        rewards, errors = [], []
        try:
            rewards = self.reward_caller.each(
                prompts,
                completions,
                completion_ids_list,
                columns,
                trainer_state=self.state,
                log_extra=self._log_completion_extra,
                log_metric=self._log_metric,
            )
        except RewardError as error:
            errors = [str(error)]
        # All processes stop, not only the one whose reward failed: the others would wait for it forever.
        if errors := gather_object(errors):
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
            raise RewardError(errors[0])
        values = [[float("nan") if value is None else value for value in of_one] for of_one in rewards]
        gathered = gather(torch.tensor(values, dtype=torch.float32, device=self.accelerator.device).T.contiguous())
        self._keep_rows(gathered, completion_ids_list)
        return gathered

    def _generate_and_score_completions(self, inputs):
        training, device = self.model.training, self.accelerator.device
        random_state = random_state_of(device)
        head = self.accelerator.unwrap_model(self.model_wrapped).get_output_embeddings()
        try:
            with _LogitsWatch(head) as watch:
                self._watch = watch
                return super()._generate_and_score_completions(inputs)
        except RewardError as error:
            if not training:
                raise
            failure = error
        except RuntimeError as error:
            # Sampling fails if the logits are not finite. The other processes may be in a collective: they are not
            # asked here.
            if watch.noticed():
                raise _not_finite(inputs[0]["prompt"]) from error
            raise
        # All processes have this error. Restore the state before this rollout: a resumed run makes the same rollout
        # and scores it again.
        set_random_state(device, random_state)
        if self.run is not None:
            self.run = {**self.run, REWARD_FAILED: True}
        self._save_checkpoint(self.model, trial=None)
        raise RewardError(
            f"{str(failure).removesuffix('.')}: fix it, and the same command resumes from "
            f"checkpoint-{self.state.global_step}, saved just now."
        ) from failure

    def train(self, *args, **kwargs):
        with all_or_none():
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with all_or_none():
            return super().evaluate(*args, **kwargs)


def _not_finite(prompt) -> ValueError:
    return ValueError(
        f"The LM's logits are NaN or infinite in the batch whose first prompt is {prompt!r}: load it in float32 if it "
        "computes in float16, look for damaged weights, or lower the learning rate if the LM is trained."
    )


def _with_models(reward_funcs, args) -> list:
    """The rewards; a string is the name of a reward model, as in TRL."""
    rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not any(isinstance(reward, str) for reward in rewards):
        return list(rewards)
    settings = {
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        **(getattr(args, "model_init_kwargs", None) or {}),
    }
    return [
        ClassifierReward.from_pretrained(reward, **settings) if isinstance(reward, str) else reward
        for reward in rewards
    ]

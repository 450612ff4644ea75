"""[`PPOTrainer`]: PPO on the language model itself, the RLHF baseline (Ouyang et al. 2022, arXiv 2203.02155)."""

import os
import textwrap

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..decoding.hidden_states import record_body, state_size_of, without_peft
from ..files import make_readable, replacing
from .actor_critic import ActorCriticTrainer
from .config import PPOConfig

VALUE_HEAD_NAME = "value_head.safetensors"


class ValueHead(nn.Module):
    """State value of every token, from the LM's last hidden state before it; zero at first."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` of any float dtype -> `(...)` float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            # float32, unless DeepSpeed or FSDP keeps all weights in another dtype
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()


class PPOTrainer(ActorCriticTrainer):
    """Trains a causal LM by PPO; each token is a step. It uses clipped losses, a value head on the LM's hidden states,
    and a penalty `beta` on the per-token KL divergence to the initial LM.

    Args:
        model: the LM, or its name. With `peft_config`, adapters are trained, and the LM without them is the reference.
            Otherwise all weights are trained, with a second LM as reference if `beta` is not 0.
        reward_funcs, train_dataset, eval_dataset, processing_class, callbacks, peft_config, ...: as for
            [`~trl.RLOOTrainer`].
        args ([`PPOConfig`], *optional*): training settings.

    The LM is saved as TRL saves any model. The value head is saved as `value_head.safetensors` in the same folder.
    """

    _tag_names = ["trl", "trl-proxy", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Training Language Models to Follow Instructions with Human Feedback",
        "id": "2203.02155",
        "citation": textwrap.dedent("""\
            @inproceedings{ouyang2022training,
                title     = {{Training Language Models to Follow Instructions with Human Feedback}},
                author    = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and others},
                booktitle = {Advances in Neural Information Processing Systems 35},
                year      = 2022,
            }"""),  # noqa: E501
    }

    def __init__(self, model, reward_funcs, args: PPOConfig | None = None, **kwargs):
        super().__init__(model=model, reward_funcs=reward_funcs, args=args or PPOConfig(output_dir="ppo"), **kwargs)
        # DeepSpeed needs one dtype for all trained parameters, and keeps a float32 copy of them.
        trained = next(p.dtype for p in self.model.parameters() if p.requires_grad)
        dtype = trained if self.is_deepspeed_enabled else torch.float32
        self._head_owner().value_head = ValueHead(state_size_of(self._head_owner())).to(self.accelerator.device, dtype)
        self._passes: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._aux_loss: torch.Tensor | None = None

    def _head_owner(self) -> nn.Module:
        return without_peft(self.accelerator.unwrap_model(self.model))

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        lm = self.accelerator.unwrap_model(model)
        with record_body(lm) as body:
            log_probs, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        values = None
        if lm is not self.ref_model:
            # A token's state is the hidden state before it.
            hidden = torch.cat([states[:, -logits_to_keep - 1 : -1] for states in body])
            values = self._head_owner().value_head(hidden)
        self._passes.append((log_probs, values))
        return log_probs, entropies, aux_loss

    def _generate_and_score_completions(self, inputs):
        self._passes.clear()
        return super()._generate_and_score_completions(inputs)

    def _collect(self, output):
        # RLOO has run the policy and, with `beta`, the reference over the responses.
        (log_probs, values), *reference = self._passes
        mask = output["completion_mask"].bool()
        batch = {
            "action_mask": mask,
            "action_positions": torch.arange(mask.shape[1], device=mask.device).expand_as(mask),
            "action_log_probs": log_probs * mask,
            "state_values": values * mask,
        }
        if reference:
            log_ratio = (log_probs - reference[0][0]) * mask
            batch["step_rewards"] = -self.beta * log_ratio
            self._add_ratios({"kl": (log_ratio.sum(-1), mask.sum(-1))})
        return batch

    def _evaluate_actions(self, model, inputs):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        self._passes.clear()
        log_probs, entropies, self._aux_loss = self._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        return log_probs, entropies, self._passes.pop()[1]

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.aux_loss_enabled:  # of a mixture of experts: its router's balance, as in TRL's trainers
            aux_loss, self._aux_loss = self._aux_loss, None
            self._add_ratios({"aux_loss": (aux_loss, 1)})
            # Its mean over the micro-batches of an update.
            parts = self.args.gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / parts
        return loss

    # Checkpoints: TRL writes the LM or its adapter; the value head has a separate file

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        head, lm = {}, {}
        for name, value in state_dict.items():
            _, is_head, own_name = name.partition("value_head.")
            if is_head:
                head[own_name] = value.cpu().contiguous()
            else:
                lm[name] = value
        super()._save(output_dir, lm)
        if not self.args.should_save:
            return
        with replacing(os.path.join(output_dir, VALUE_HEAD_NAME)) as temporary:
            save_file(head, temporary, metadata={"format": "pt"})
            make_readable(temporary)

    def _load_value_head(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, VALUE_HEAD_NAME)
        if not os.path.isfile(path):
            raise ValueError(f"{checkpoint} is not a checkpoint of PPOTrainer: {VALUE_HEAD_NAME} is missing.")
        # This works even if FSDP has sharded the head.
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self._head_owner().value_head, load_file(path), options=options)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._load_value_head(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # its checkpoint includes the head
            self._load_value_head(self.state.best_model_checkpoint)

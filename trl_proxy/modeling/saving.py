"""Saves and uploads a trained proxy, and checks that it is loaded over its own LM."""

import os
import tempfile

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from ..core.config import WEIGHTS_NAME, ProxyConfig
from ..files import make_readable, replacing
from .card import proxy_card
from .fingerprint import sha256_of
from .proxies import WeightedProxy


def save_proxy(model, folder: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the active proxy of a `ProxyModelForCausalLM`: `proxy_config.json` and `proxy_model.safetensors`.

    Args:
        state_dict: of the model, if a trainer has gathered it because the model is sharded.

    Raises:
        ValueError: the active proxy is a sum of others.
    """
    if isinstance(model.proxy, WeightedProxy):
        raise ValueError(f"The proxy {model.active_proxy!r} is a sum of others: save those.")
    model.proxy_config.save_pretrained(folder)
    path = os.path.join(folder, WEIGHTS_NAME)
    weights = model.proxy.state_dict()
    if state_dict is not None:
        weights = {name: state_dict[f"proxies.{model.active_proxy}.{name}"] for name in weights}
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", "sha256": sha256_of(weights)})
        make_readable(temporary)


def push_proxy(
    model, repo_id: str, *, private: bool | None, token: bool | str | None, revision: str | None, **commit
) -> str:
    """Implements [`~trl_proxy.ProxyModelForCausalLM.push_to_hub`], with the same arguments and result."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not commit["create_pr"] and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if not api.file_exists(repo_id, "README.md", revision=revision):  # it may have a card from training
            lm_revision = getattr(model.lm.config, "_commit_hash", None)
            card = proxy_card(model.proxy_config, *model.get_nb_trainable_parameters(), revision=lm_revision)
            card.save(os.path.join(folder, "README.md"))
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **commit))


def check_trained_over(lm, saved: ProxyConfig, here: ProxyConfig, source: str | os.PathLike) -> None:
    """`ValueError` if a proxy was trained over an LM with other sizes or embeddings than this one."""
    trained, found = saved.base_model_sha256, here.base_model_sha256
    if None not in (trained, found) and trained != found:
        raise ValueError(
            f"The proxy {source} was trained over {saved.base_model_name_or_path or 'another LM'}, whose sizes or "
            f"embeddings differ from those of {lm.config._name_or_path or 'this LM'}: load that LM, or pass "
            "`check_base_model=False`."
        )

"""The buffer of rollouts that an update learns from."""

import pytest
import torch

from trl_proxy.trainer.replay import ReplayBuffer, concatenate, is_read_by_loss


def rollout(rows: int, width: int, start: float) -> dict[str, torch.Tensor]:
    return {
        "action_mask": torch.ones(rows, width, dtype=torch.bool),
        "rollout_hidden": start + torch.arange(rows * width * 2.0).view(rows, width, 2),
        "rollout_token_log_probs": start + torch.arange(float(rows)),
    }


def test_rows_of_other_lengths_are_padded_with_zeros_behind():
    shorter, longer = torch.ones(1, 2, 3), torch.full((2, 4, 3), 2.0)
    for tensors in ([shorter, longer], [longer, shorter]):
        joined = concatenate(tensors)
        assert joined.shape == (3, 4, 3)
        assert torch.equal(joined, torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1])) for x in tensors]))
    assert concatenate([torch.ones(1, 1), torch.ones(1, 3)]).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert concatenate([torch.tensor([1, 2]), torch.tensor([3])]).tolist() == [1, 2, 3]


def test_the_oldest_rollout_leaves_first():
    buffer = ReplayBuffer(2)
    first, second, third = (rollout(2, width, start) for width, start in ((3, 0.0), (1, 100.0), (2, 200.0)))
    assert all(torch.equal(x, first[name]) for name, x in buffer.add(first).items())
    both = buffer.add(second)
    assert both["rollout_token_log_probs"].tolist() == [0, 1, 100, 101]
    assert both["action_mask"].tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2
    assert buffer.add(third)["rollout_token_log_probs"].tolist() == [100, 101, 200, 201]


def test_what_the_loss_reads():
    assert is_read_by_loss("returns")
    assert is_read_by_loss("rollout_hidden")
    assert not is_read_by_loss("completion_ids")
    assert not is_read_by_loss("advantages")


def test_more_rollouts_than_one_digit_come_back_in_order(tmp_path):
    buffer, loaded = ReplayBuffer(12), ReplayBuffer(12)
    for i in range(12):
        buffer.add(rollout(1, 2, float(i)))
    path = tmp_path / "new" / "folder" / "replay.safetensors"
    buffer.save(str(path))
    placed = []
    loaded.load(
        str(path), lambda name, x: placed.append(name) or x.to(torch.float64 if x.is_floating_point() else x.dtype)
    )
    assert len(loaded.rollouts) == 12
    for ours, theirs in zip(buffer.rollouts, loaded.rollouts, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].double(), theirs[name].double()) for name in ours)
        assert theirs["rollout_hidden"].dtype == torch.float64
    assert set(placed) == set(rollout(1, 1, 0.0))
    buffer.save(str(path))  # the folder is there already


def test_nothing_is_written_before_the_first_rollout(tmp_path):
    ReplayBuffer(3).save(str(tmp_path / "folder" / "replay.safetensors"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        ReplayBuffer(3).load(str(tmp_path / "folder" / "replay.safetensors"), lambda name, x: x)

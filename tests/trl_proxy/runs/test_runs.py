import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_proxy.files import WriteError, remove_leftovers, temporary_path, write_text
from trl_proxy.rewards.checks import RewardError
from trl_proxy.runs.fit import truthful
from trl_proxy.runs.process import Interrupted, lock_folder, run_script


class Unreachable(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (ValueError("`p_t` must be\n  in (0, 1]."), 1, "name: `p_t` must be in (0, 1].\n"),
        (
            FileNotFoundError(2, "No such file", "a.yaml"),
            1,
            "name: a.yaml could not be read or written (No such file).\n",
        ),
        (Unreachable("The server is away."), 1, "name: The server is away.\n"),
        (KeyboardInterrupt(), 130, "name: interrupted; the same command resumes.\n"),
        (Interrupted(signal.SIGTERM, "out"), 143, f"name: {Interrupted(signal.SIGTERM, 'out')}\n"),
    ],
)
def test_a_script_ends_with_one_sentence(error, status, said, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as end:
        run_script("name", main, errors=(Unreachable,), goes_on=True)
    assert end.value.code == status
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script("name", lambda: 1 / 0)


def test_a_script_that_cannot_go_on_does_not_say_so(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run_script("name", main)
    assert capsys.readouterr().err == "name: interrupted.\n"


OVERWRITE, CHECKPOINT = "--overwrite_output_dir", "--resume_from_checkpoint"


@pytest.mark.parametrize("given", [[], [OVERWRITE], [CHECKPOINT], [OVERWRITE, CHECKPOINT]], ids=" ".join)
@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (
            lambda: RewardError("OSError: fix it, and the same command resumes from checkpoint-4."),
            {OVERWRITE, CHECKPOINT},
        ),
        (lambda: Interrupted(signal.SIGTERM, "out"), {OVERWRITE, CHECKPOINT}),
        (lambda: WriteError("Make room, and the same command resumes from what was saved."), {OVERWRITE}),
        (KeyboardInterrupt, {OVERWRITE}),
    ],
    ids=["reward", "signal", "disk", "interrupt"],
)
def test_an_error_says_truly_which_command_resumes(make, left_out, given):
    """The same one, without the flags that would start it anew, or from a checkpoint when there is a newer one."""
    flags = [flag for flag in given if flag in left_out]
    error = make()
    run_args = SimpleNamespace(overwrite_output_dir=OVERWRITE in given)
    args = SimpleNamespace(resume_from_checkpoint="other/checkpoint-8" if CHECKPOINT in given else None)

    def fail():
        with truthful(run_args, args):
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    said = str(raised.value) or "the same command resumes"  # `run_script` says this of an interrupt
    assert f"the same command {'without ' if flags else ''}{' and '.join(flags)}{' ' if flags else ''}resumes" in said


def test_what_a_kill_left_is_deleted_by_the_next_process(tmp_path):
    """Temporary files of two processes have different names; files of others stay."""
    (tmp_path / "mine.tmp").touch()
    path = tmp_path / "run.json"
    first, second = temporary_path(path), temporary_path(path)
    assert first != second
    for left in (first, second):
        Path(left).touch()
    lock_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_lock", "mine.tmp"]
    write_text(path, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_lock", "mine.tmp", "run.json"]
    remove_leftovers(tmp_path)
    assert path.read_text(encoding="utf-8") == "{}"

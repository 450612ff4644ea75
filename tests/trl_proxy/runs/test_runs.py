import signal

import pytest

from trl_proxy.runs.process import Interrupted, run_script


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

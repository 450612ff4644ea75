"""What one process can see of several; processes that fail are in tests/scripts/test_failing_ranks.py."""

import ast
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trl_proxy import ranks

ROOT = Path(__file__).parents[2]
COLLECTIVES = {
    "gather",
    "gather_object",
    "reduce",
    "broadcast",
    "broadcast_object_list",
    "wait_for_everyone",
    "barrier",
}


def called(node: ast.AST) -> set[str]:
    """Names of the functions and methods that are called anywhere in a piece of code."""
    calls = [x.func for x in ast.walk(node) if isinstance(x, ast.Call)]
    return {getattr(x, "attr", getattr(x, "id", "")) for x in calls}


@pytest.mark.fault
def test_no_collective_in_an_exception_handler():
    """An exception is one process's, and the others would not take part. A name stands for all functions of it."""
    files = [path for folder in ("trl_proxy", "baselines") for path in (ROOT / folder).rglob("*.py")]
    nodes = [(path, x) for path in files for x in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    functions = [(x.name, called(x)) for _, x in nodes if isinstance(x, ast.FunctionDef) and x.name[:2] != "__"]
    waiting, found = set(COLLECTIVES), {""}
    while found:
        found = {name for name, calls in functions if calls & waiting} - waiting
        waiting |= found
    assert {"_check_logits", "_save_checkpoint", "_whitened", "fit"} <= waiting
    handlers = [(path, x) for path, x in nodes if isinstance(x, ast.ExceptHandler)]
    assert [(path, x.lineno, called(x) & waiting) for path, x in handlers if called(x) & waiting] == []


@pytest.mark.fault
def test_a_stranger_who_connects_is_no_process_of_the_run():
    watch = object.__new__(ranks._Watch)
    watch.world = 3
    with socket.create_server(("localhost", 0)) as listener, ThreadPoolExecutor() as pool:
        connected = pool.submit(watch._accept, listener, "token")
        ends = [socket.create_connection(listener.getsockname()) for _ in range(4)]
        for end, said in zip(ends, (b"GET / HTTP/1.1\n", b"token 2\n", b"\xff 1\n", b"token 1\n"), strict=True):
            end.sendall(said)
        assert connected.result(20).keys() == {1, 2}
        for end in ends:
            end.close()


def test_one_process_needs_no_watch():
    assert not ranks.watch()
    with pytest.raises(KeyError), ranks.all_or_none():
        raise KeyError
    assert ranks.fail(KeyError())
    ranks.unwatch()

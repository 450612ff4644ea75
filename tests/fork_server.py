"""Runs scripts in processes of their own that start in no time, to be killed: one process imports what they need, and
every script is a fork of it.

    python tests/fork_server.py <socket>        # the server
    python tests/fork_server.py <socket> ...    # in place of `python ...`: the script's output and exit status

A client that gets SIGTERM hands it on; one that is killed leaves its script running, as a launcher does. In a script
`sys.executable` is a file that starts such a client, so the scripts that it runs start in no time too.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import shlex
import signal
import socket
import sys
import threading

# What the scripts import, at the top of their files and later.
IMPORTED = (
    "baselines.best_of_n",
    "gguf",
    "transformers.modeling_gguf_pytorch_utils",
    "trl_proxy.embedded.lm",
    "trl_proxy.rewards.classifier",
    "datasets.io.json",
    "eval.plots.comparison",
    "eval.plots.training",
    "transformers.models.llama.modeling_llama",
    "trl_proxy.runs.train",
)


class Script:
    """A script that a server runs.

    Args:
        server: path of its socket.
        argv: the script and its arguments.
        cwd, env: its working folder and environment.
        files: file descriptors for its input, its output and its errors.

    Attributes:
        pid: of the process, the leader of its own session.
    """

    def __init__(self, server: str, argv: list[str], cwd: str, env: dict[str, str], files: tuple[int, int, int]):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server)
        request = json.dumps({"argv": argv, "cwd": cwd, "env": env}).encode()
        self.socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        self.answers = self.socket.makefile()
        self.pid = int(self.answers.readline())

    def wait(self) -> int:
        """Its exit status, minus the signal that ended it."""
        return int(self.answers.readline())


def serve(path: str) -> None:
    """Listens until it is killed."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # a script need not look at all this when it collects garbage
    launcher = f"{path}.sh"
    with open(launcher, "w", encoding="utf-8") as file:
        client = shlex.join([sys.executable, "-S", "-E", os.path.abspath(__file__), path])
        file.write(f'#!/bin/sh\nexec {client} "$@"\n')
    os.chmod(launcher, 0o755)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps what has ended
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection, launcher)
        connection.close()


def _attend(connection: socket.socket, launcher: str) -> None:
    message, control, *_ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(12))
    if child := os.fork():
        with contextlib.suppress(OSError):  # the client may be gone
            connection.sendall(f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(f"{status}\n".encode())
        os._exit(0)
    connection.close()
    os.setsid()
    for fd, target in zip(array.array("i", control[0][2]), (0, 1, 2)):
        os.dup2(fd, target)
        os.close(fd)
    # The server's own objects know what its files can do.
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, buffering=1, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        for fd, mode in enumerate(("r", "w", "w"))
    )
    request = json.loads(message)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.executable, sys.argv = launcher, request["argv"]
    os._exit(_run_script())


def _run_script() -> int:
    """Runs `sys.argv` as `python` would; its exit status."""
    import runpy

    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _stand_for(server: str, argv: list[str]) -> int:
    script = Script(server, argv, os.getcwd(), dict(os.environ), (0, 1, 2))
    signal.signal(signal.SIGTERM, lambda signum, frame: os.kill(script.pid, signum))
    status = script.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(_stand_for(sys.argv[1], sys.argv[2:]))

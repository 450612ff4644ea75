"""The processes of a training: if one of them fails, all end.

A collective waits for a process that is gone, and a process that waits in a collective runs no signal handlers. So a
thread of each process watches the others. All are connected to the first process, and the end of a process closes its
connection, however it ended.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

logger = logging.get_logger(__name__)

GRACE = 10.0  # seconds that a process has to end by itself after another one has failed
NEWS = 2.0  # seconds within which the news of a failure reaches all
CONNECT = 10.0  # seconds within which all are connected


class _Watch:
    """Connections between the first process and the others. A line is `left`, or `failed <rank>`."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.failed: int | None = None  # the first process that failed
        self.known = threading.Event()
        self.lock = threading.Lock()
        self.open = True
        host, token = os.environ.get("MASTER_ADDR", "localhost"), secrets.token_hex(16)
        listener = _listen(host) if self.rank == 0 else None
        (address,) = broadcast_object_list([listener and (host, listener.getsockname()[1], token)])
        self.peers = self._accept(listener, token) if listener else self._connect(*address)
        for rank, peer in self.peers.items():
            threading.Thread(target=self._read, args=(rank, peer), daemon=True).start()

    def _accept(self, listener: socket.socket, token: str) -> dict[int, socket.socket]:
        """The connections of the other processes. Anyone may connect, but only they know the token."""
        peers: dict[int, socket.socket] = {}
        listener.settimeout(CONNECT)
        with listener:
            while len(peers) < self.world - 1:
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    logger.warning("Not all processes could connect: if one fails, the launcher must end the others.")
                    break
                peer.settimeout(NEWS)
                said, _, rank = _line(peer).partition(" ")
                if secrets.compare_digest(said.encode(), token.encode()):
                    peer.settimeout(None)
                    peers[int(rank)] = peer
                else:
                    peer.close()
        return peers

    def _connect(self, host: str, port: int, token: str) -> dict[int, socket.socket]:
        try:
            peer = socket.create_connection((host, port), timeout=CONNECT)
        except OSError:  # the first process says so
            return {}
        peer.settimeout(None)
        peer.sendall(f"{token} {self.rank}\n".encode())
        return {0: peer}

    def _read(self, rank: int, peer: socket.socket) -> None:
        while (line := _line(peer)) != "left" and self.open:
            if not line:
                return self._note(rank, killed=True)
            self._note(int(line.removeprefix("failed ")))

    def _note(self, rank: int, killed: bool = False) -> None:
        """Keeps which process failed first, tells the others, and ends this one if it does not end by itself."""
        with self.lock:
            if self.failed is not None:
                return
            self.failed = rank
            if self.rank == 0:
                self._tell(f"failed {rank}\n")
        self.known.set()
        if killed and self.rank == (1 if rank == 0 else 0):
            name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
            print(
                f"{name}: process {rank} of {self.world} was killed or crashed, perhaps for lack of memory: all "
                "processes end, and the last checkpoint stays.",
                file=sys.stderr,
                flush=True,
            )
        if rank != self.rank:
            threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        time.sleep(GRACE)
        if self.open:
            end_at_once()

    def _tell(self, line: str) -> None:
        for peer in self.peers.values():
            with suppress(OSError):
                peer.sendall(line.encode())

    def fail(self, by_a_collective: bool) -> bool:
        """Tells the others that this process has failed; whether it was the first to fail."""
        if by_a_collective:  # because another process is gone, perhaps
            self.known.wait(NEWS)
        if self.rank == 0:
            self._note(0)
        elif self.failed is None and self.peers:
            self._tell(f"failed {self.rank}\n")
            self.known.wait(NEWS)
        return self.failed in (None, self.rank)

    def close(self) -> None:
        self.open = False
        self._tell("left\n")
        for peer in self.peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # wakes its thread
        self.drop()

    def drop(self) -> None:
        """Closes the connections here, but not in the process that this one was forked from."""
        for peer in self.peers.values():
            with suppress(OSError):
                os.close(peer.detach())


_current: _Watch | None = None


def _listen(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0))
    except OSError:  # a name for this machine that only others use
        return socket.create_server(("", 0))


def _line(peer: socket.socket) -> str:
    """The next line without its end; empty if the connection ended or nothing came in time."""
    read = b""
    with suppress(OSError):
        while byte := peer.recv(1):
            if byte == b"\n":
                return read.decode(errors="replace")
            read += byte
    return ""


def _forget_in_fork() -> None:
    global _current
    if _current is not None:
        _current.drop()
        _current = None


os.register_at_fork(after_in_child=_forget_in_fork)


def watch() -> bool:
    """Ends this process, from now on, if another process of the run fails. All processes call it at the same time.

    Returns:
        whether the watch began here: not with one process, nor if it had begun before.
    """
    global _current
    if _current is not None or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    _current = _Watch()
    return True


def unwatch() -> None:
    """Ends the watch: this process is done, and its end means nothing to the others."""
    global _current
    ended, _current = _current, None
    if ended is not None:
        ended.close()


def fail(error: BaseException) -> bool:
    """Tells the other processes that this one ends by `error`. They end within [`GRACE`] seconds.

    Returns:
        whether this process is the first to fail, so that its error is the one to be read.
    """
    return _current is None or _current.fail(_is_by_a_collective(error))


def _is_by_a_collective(error: BaseException) -> bool:
    """Whether a collective may have raised this because another process is gone. Gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or type(error) is RuntimeError


def end_at_once() -> NoReturn:
    """Ends this process with status 1, without destructors, which may wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that all processes run together: if one of them fails in it, all end.

    The error of the first process to fail is raised as it is. A collective's error that follows from it ends this
    process without a word.
    """
    if not watch():
        yield
        return
    try:
        yield
    except BaseException as error:
        if not fail(error) and _is_by_a_collective(error):
            end_at_once()
        raise
    finally:
        unwatch()

"""A process that holds a site's secure sums where nothing else lives long enough: Flower's nodes start one per message.

    python -m clients.secure_keeper /run/fedveil/keeper.sock --site site.toml

A SuperNode runs every message in a process of its own, in each of its isolation modes, and Ray hands messages to any of
its workers. The secrets of a session must not be written down, so they stay in this process, beside the node, and the
node's processes ask it through a Unix socket (there are none on Windows). Training stays with the node's process.

Guarantees: only processes of the same user can reach the socket; nothing that crosses it is run or unpickled.
Trust: whoever can run programs as this user sees the site's updates here, as in the node itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from clients.secure_sessions import Caller, SecureSessions, Train, refuse_plainly
from fedml_core import private_files
from fedml_core.errors import ChannelError, ConfigError, FedveilError, RefusalError, ReplyError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame, reply_from_frame, reply_to_frame
from fedml_core.messages import Assignment, Failure, Refusal, Reply
from fedml_core.untrusted import as_text, as_whole
from fedml_core.update import Update
from fedml_core.wire import Frame, from_frame, to_frame

__all__ = ["KeptSessions", "keeping", "main"]

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 36
_KIND, _HEADER = "$kind", "$header"
_INTRODUCE, _ANSWER, _TRAIN = "introduce", "answer", "train"


class KeptSessions:
    """Sessions in a keeper's process, asked through its socket; see `clients.secure_sessions.Sessions`.

    Raises: ChannelError: from both methods, if no keeper answers there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def introduce(self, caller: Caller) -> int:
        """Return the number under which this node takes part."""
        with self._asked(_INTRODUCE, caller) as stream:
            frame = _read(stream)
        if frame.kind == "refusal":
            raise _raised(reply_from_frame(frame).body)
        return as_whole(from_frame(frame)["member"])

    def answer(self, caller: Caller, assignment: Assignment, train: Train) -> Reply:
        """Return the reply to one exchange; training happens here."""
        with self._asked(_ANSWER, caller) as stream:
            _write(stream, assignment_to_frame(assignment))
            frame = _read(stream)
            if frame.kind == _TRAIN:
                _write(stream, reply_to_frame(_reply(assignment, caller.member, _outcome(assignment, train))))
                frame = _read(stream)
            return reply_from_frame(frame)

    @contextlib.contextmanager
    def _asked(self, kind: str, caller: Caller) -> Iterator[_Stream]:
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(self._path))
                with line.makefile("rwb") as stream:
                    _write(stream, to_frame(kind, vars(caller)))
                    yield stream
        except (OSError, EOFError, AttributeError, ValueError) as error:
            raise ChannelError(
                f"no keeper answers at {self._path} ({type(error).__name__}); start python -m clients.secure_keeper "
                f"{self._path}"
            ) from error


@contextlib.contextmanager
def keeping(path: Path, sessions: SecureSessions) -> Iterator[threading.Thread]:
    """Answer at the socket `path` while inside; the thread that does so is yielded. The secrets are gone at the exit.

    Raises: ConfigError: if the socket cannot be made, or another keeper answers there.
    """
    if sys.platform == "win32":
        raise ConfigError("a keeper needs Unix sockets, and there are none on Windows; run the node on another system")
    _make_way(path)
    try:
        # Nobody else may connect, from the first moment on.
        before = os.umask(0o177)
        try:
            server = _Server(str(path), _Handler)
        finally:
            os.umask(before)
    except OSError as error:
        raise ConfigError(f"no socket can be made at {path} ({error.strerror or error}); use a short path") from error
    server.sessions = sessions
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="secure-keeper", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        sessions.close()
        path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep sessions until SIGTERM or Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clients.secure_keeper", description="Hold a site's secure sums.")
    parser.add_argument("socket", type=Path, help="where to answer; its folder should be this user's alone")
    parser.add_argument("--site", type=Path, help="the site.toml; without it, semi-honest sums only")
    parser.add_argument("--minimum-cohort", type=int, default=3, help="without --site: the fewest members of a sum")
    given = parser.parse_args(arguments)
    stopped = threading.Event()
    try:
        sessions = SecureSessions(given.site, minimum_cohort=given.minimum_cohort)
        with keeping(given.socket, sessions):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopped.set())
            sys.stdout.write(f"keeping secure sums at {given.socket}\n")
            sys.stdout.flush()
            stopped.wait()
    except FedveilError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


class _Handler(socketserver.BaseRequestHandler):
    """Answers one question."""

    server: _Server

    def handle(self) -> None:
        """Answer, and break off where that is no question."""
        with self.request.makefile("rwb") as stream:
            self._answer(stream)

    def _answer(self, stream: _Stream) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError, KeyError, FedveilError):
            # Whoever breaks off or asks what is no question has ended its own session; nobody waits for an answer.
            question = _read(stream)
            tree = from_frame(question)
            caller = Caller(
                as_text(tree["run"]), as_text(tree["node"]), as_whole(tree["member"]), tree["active"] is True
            )
            if question.kind == _INTRODUCE:
                _write(stream, self._introduced(caller))
            elif question.kind == _ANSWER:
                assignment = assignment_from_frame(_read(stream))
                reply = self.server.sessions.answer(caller, assignment, lambda one: _ask_to_train(stream, one))
                _write(stream, reply_to_frame(reply))

    def _introduced(self, caller: Caller) -> Frame:
        try:
            return to_frame("introduced", {"member": self.server.sessions.introduce(caller)})
        except RefusalError as error:
            return reply_to_frame(Reply("", 0, caller.member, "", refuse_plainly(error)))


if sys.platform != "win32":

    class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        """A thread for each question; one that waits for training does not hold up the end."""

        daemon_threads = True
        block_on_close = False
        sessions: SecureSessions

        def handle_error(self, request: object, client_address: object) -> None:
            """Log one line; a question must not print anybody's traceback."""
            _log.error("a question could not be answered: %s", type(sys.exception()).__name__)


class _Stream(Protocol):
    """What a frame is read from and written to."""

    def read(self, size: int, /) -> bytes: ...

    def write(self, data: bytes, /) -> object: ...

    def flush(self) -> object: ...


def _ask_to_train(stream: _Stream, assignment: Assignment) -> Update:
    _write(stream, to_frame(_TRAIN, {}))
    try:
        body = reply_from_frame(_read(stream)).body
    except (OSError, EOFError) as error:
        raise ReplyError("client-app", "the process that trains ended before its update came") from error
    if isinstance(body, Update):
        return body
    raise _raised(body)


def _outcome(assignment: Assignment, train: Train) -> Update | Refusal | Failure:
    try:
        return train(assignment)
    except FedveilError as error:
        return refuse_plainly(error)


def _raised(body: object) -> FedveilError:
    if isinstance(body, Refusal):
        return RefusalError(body.rule, body.reason)
    if isinstance(body, Failure):
        return ReplyError(body.rule, body.reason)
    return ReplyError("malformed", "an update or a refusal was expected")


def _reply(assignment: Assignment, member: int, body: Update | Refusal | Failure) -> Reply:
    return Reply(assignment.run, assignment.round, member, assignment.fingerprint, body)


def _write(stream: _Stream, frame: Frame) -> None:
    texts = {_KIND: frame.kind, _HEADER: frame.header}
    coded = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    data = safetensors.numpy.save({**frame.arrays, **coded})
    stream.write(len(data).to_bytes(8, "big"))
    stream.write(data)
    stream.flush()


def _read(stream: _Stream) -> Frame:
    """Return the next frame; EOFError at the end, ValueError if it is none."""
    size = int.from_bytes(_exactly(stream, 8), "big")
    if size > _MOST_BYTES:
        raise ValueError("it is no frame")
    try:
        arrays = safetensors.numpy.load(_exactly(stream, size))
    except SafetensorError as error:
        raise ValueError("it is no frame") from error
    kind, header = arrays.pop(_KIND), arrays.pop(_HEADER)
    return Frame(kind.tobytes().decode(), header.tobytes().decode(), arrays)


def _exactly(stream: _Stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the other side ended")
    return data


def _make_way(path: Path) -> None:
    """Make the folder, and remove the socket of a keeper that is gone."""
    if not path.parent.exists():
        private_files.make_folder(path.parent)
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as line:
        if not path.is_socket() or line.connect_ex(str(path)) == 0:
            raise ConfigError(f"{path} exists, and is in use or no socket; end the other keeper or name another path")
    path.unlink()


if __name__ == "__main__":
    sys.exit(main())

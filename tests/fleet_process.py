"""A client as a process of its own: answers frames, and reports in JSON lines what it did to the machine.

Run by `tests.fleet_cases.processes`. Every file that is opened for writing and every address outside this machine is
reported, by Python's own audit events; so is a signal or an exit that somebody else than the test asks for.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import threading
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_broken: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
        _broken.append(f"wrote {arguments[0]}")
    elif event in ("os.mkdir", "os.rename", "os.kill", "signal.pthread_kill", "subprocess.Popen"):
        _broken.append(f"{event} {arguments[0]}")
    elif event == "socket.connect" and not ipaddress.ip_address(arguments[1][0]).is_loopback:
        _broken.append(f"connected to {arguments[1]}")


def _report(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main(server: str, heartbeat_s: float) -> None:
    """Serve until interrupted."""
    sys.addaudithook(_watch)
    from flwr.supercore import telemetry

    from clients.fleet import FleetClient
    from fedml_core.wire import Frame

    def answer(frame: Frame) -> Frame:
        _report(took=frame.kind)
        if frame.kind == "hang":
            threading.Event().wait()
        return Frame("echo", frame.header, frame.arrays)

    client = FleetClient(server, insecure=True, heartbeat_s=heartbeat_s)
    try:
        client.serve(answer, threading.Event(), lambda line: _report(state=line))
    except KeyboardInterrupt:
        _report(
            interrupted=True,
            threads=[thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
            broken=_broken,
            telemetry=telemetry.FLWR_TELEMETRY_ENABLED,
        )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

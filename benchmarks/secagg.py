"""Measures secure aggregation: python -m benchmarks.secagg --clients 100 --parameters 1000000 --dropouts 5.

One secure sum with a real session for each client, on one core and on all; CPU seconds beside those that its masks
would take at least (the roofline), measured in between. With --flower-python, beside the same work of a client in
Flower's SecAgg+. Instead of it: --virtual, one round of virtual clients in a simulation (dropouts are expected ones);
--masking, masks alone; --shares, Shamir's shares alone; --training, rounds of a CNN in the clear and under secure sums.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import machine, print_line
from benchmarks.secagg_roofline import Roofline, taking_turns
from benchmarks.secagg_simulated import training, virtual
from benchmarks.secagg_sum import SecureSum, take
from benchmarks.simulate import engine_named
from benchmarks.workloads import WORKLOADS
from fedml_core.errors import ConfigError, FedveilError
from fedml_core.secagg import shamir
from fedml_core.secagg.field import SECRET_BYTES
from fedml_core.secagg.masks import add_masks
from strategies.secure import SecAggPlus, SumProtocol

__all__ = ["flower", "masking", "protocol_named", "shares"]

_ROOT = Path(__file__).parents[1]
_PROCESSORS = machine()["processors"]


def masking(parameters: int, neighbours: int, repeat: int) -> dict[str, Any]:
    """Return the CPU seconds of masking one vector against so many neighbours, and the roofline's, taking turns."""
    vector, roofline = np.zeros(parameters, np.uint32), Roofline(parameters)
    masks = [(os.urandom(32), 1 if place % 2 else -1) for place in range(neighbours)]
    ours, least = taking_turns([lambda: add_masks(vector, masks), lambda: roofline.expand(neighbours)], repeat)
    return {
        "neighbours": neighbours,
        "parameters": parameters,
        "masking_s": round(ours, 6),
        "roofline_s": round(least, 6),
        "of_roofline": round(least / ours, 3),
    }


def shares(holders: int, threshold: int, secrets: int, repeat: int) -> dict[str, Any]:
    """Return the CPU seconds of one client's shares of its two secrets, and of opening `secrets` from one set."""
    own = np.frombuffer(os.urandom(2 * SECRET_BYTES), np.uint8).reshape(2, SECRET_BYTES)
    many = np.frombuffer(os.urandom(secrets * SECRET_BYTES), np.uint8).reshape(secrets, SECRET_BYTES)
    points, held = range(1, threshold + 1), shamir.share(many, threshold, holders)[:threshold]
    if not np.array_equal(shamir.reconstruct(points, held), many):
        raise RuntimeError("the secrets that were opened are not those that were shared")
    made, opened = taking_turns(
        [lambda: shamir.share(own, threshold, holders), lambda: shamir.reconstruct(points, held)], repeat
    )
    sizes = {"holders": holders, "threshold": threshold, "secrets": secrets}
    return {**sizes, "share_s": round(made, 6), "reconstruct_s": round(opened, 6)}


def flower(python: str, clients: int, threshold: int, parameters: int) -> dict[str, Any]:
    """Return what Flower's client takes, measured by its own interpreter.

    Raises: ConfigError: if that prints nothing that can be read.
    """
    command = [python, "-m", "benchmarks.peers.run_flower_secagg", "--clients", str(clients)]
    command += ["--threshold", str(threshold), "--parameters", str(parameters)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=_ROOT)
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{python} does not measure Flower: {type(error).__name__}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"{python} does not measure Flower: {last}") from error
    return row


def protocol_named(text: str) -> SecAggPlus:
    """Return the protocol that a run.toml's `protocol = ...` would name, with one attempt.

    Raises: ConfigError: if it is none, or none that is measured here.

    Example:
        >>> protocol_named('{name = "SecAggPlus", active = false}').active
        False
    """
    try:
        value = tomllib.loads(f"protocol = {text}")["protocol"]
    except tomllib.TOMLDecodeError:
        value = text
    protocol = SumProtocol.from_config(value, "--protocol")
    if not isinstance(protocol, SecAggPlus):
        raise ConfigError(f"--protocol must be SecAggPlus to be measured here, got {type(protocol).__name__}")
    return dataclasses.replace(protocol, attempts=1)


def whole(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one secure sum on one core and on all, and of Flower's client before and after."""
    plan = SecureSum(asked.clients, asked.parameters, asked.dropouts, protocol_named(asked.protocol))
    peers, ours = [], []
    for threads in [1] if _PROCESSORS == 1 else [1, _PROCESSORS]:
        ours.append(take(dataclasses.replace(plan, threads=threads)))
        if asked.flower_python:
            peers.append(flower(asked.flower_python, plan.clients, ours[0]["threshold"], plan.parameters))
    row: dict[str, Any] = {**ours[0], "all_cores": ours[-1]} if len(ours) > 1 else ours[0]
    if peers:
        client_s = statistics.median(peer["client_s"] for peer in peers)
        row |= {"flower": peers, "flower_over_ours": round(client_s / ours[0]["client_s"], 2)}
    return row


def _row(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.masking:
        return {"bench": "masking", **masking(asked.parameters, asked.neighbours, asked.repeat)}
    if asked.shares:
        return {"bench": "shares", **shares(asked.holders, asked.threshold, 1000, asked.repeat)}
    if asked.training:
        torch.set_num_threads(1)  # CPU seconds of threads that wait for each other would count, too
        engine = engine_named(asked.engine)
        return {"bench": "training", **training(WORKLOADS["cifar-cnn"], engine, asked.passes, asked.rounds)}
    sizes = {"clients": asked.clients, "parameters": asked.parameters, "dropouts": asked.dropouts}
    said = {**sizes, "protocol": asked.protocol}
    if asked.virtual:
        share = asked.dropouts / asked.clients
        return {
            "bench": "virtual",
            **said,
            **virtual(asked.clients, asked.parameters, share, protocol_named(asked.protocol)),
        }
    return {"bench": "sum", **said, **whole(asked)}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--dropouts", type=int, default=0)
    parser.add_argument("--protocol", default="SecAggPlus", help="a name, or a table as in a run.toml")
    parser.add_argument("--flower-python", help="the Python that Flower is installed in")
    instead = parser.add_mutually_exclusive_group()
    for name in ("virtual", "masking", "shares", "training"):
        instead.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument("--holders", type=int, default=1000)
    parser.add_argument("--threshold", type=int, default=667)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--engine", default="sequential", help="of --training: one without workers of its own")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    for name in ("clients", "parameters", "neighbours", "holders", "repeat", "passes", "rounds"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(asked, name)}")
    try:
        print_line({**_row(asked), **machine()})
    except FedveilError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

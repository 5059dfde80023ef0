"""The whole work of one client in a round of Flower's SecAgg+, by its own client mod's steps.

python -m benchmarks.peers.run_flower_secagg --clients 100 --threshold 67 --parameters 1000000

Run it with the Python that Flower is installed in. The other clients' keys and ciphertexts are made beforehand; the
messages' way through Flower, and training, are not counted. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before Flower is imported: it reports home otherwise.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", OMP_NUM_THREADS="1")

import numpy as np
from flwr.common import ConfigRecord, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes

# A function of the same name hides the module from an ordinary import.
mod: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

_OWN = 1  # node ids are from 1
_CLIPPING, _TARGET, _MODULUS, _MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0


def measure(clients: int, threshold: int, parameters: int) -> tuple[dict[str, float], int]:
    """Return the CPU seconds of each step of one client, and the bytes that it uploads."""
    seconds: dict[str, float] = {}
    state: Any = mod.SecAggPlusState()
    state.nid = _OWN

    def timed(stage: str, step: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = step()
        seconds[stage] = time.process_time() - started
        return result

    setup: Any = {
        Key.SAMPLE_NUMBER: clients,
        Key.SHARE_NUMBER: clients,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: _CLIPPING,
        Key.TARGET_RANGE: _TARGET,
        Key.MOD_RANGE: _MODULUS,
        Key.MAX_WEIGHT: _MAX_WEIGHT,
    }
    sent = [timed("setup", lambda: mod._setup(state, ConfigRecord(setup)))]
    private = {node: (generate_key_pairs(), generate_key_pairs()) for node in range(2, clients + 1)}
    public: Any = {str(_OWN): [state.pk1, state.pk2]}
    for node, ((_, first), (_, second)) in private.items():
        public[str(node)] = [public_key_to_bytes(first), public_key_to_bytes(second)]
    sent.append(timed("share_keys", lambda: mod._share_keys(state, ConfigRecord(public))))
    delivery = _delivery(state, private)
    update = np.random.default_rng(0).standard_normal(parameters).astype(np.float32)
    given = ndarrays_to_parameters([update])
    sent.append(
        timed("collect_masked_vectors", lambda: mod._collect_masked_vectors(state, ConfigRecord(delivery), 500, given))
    )
    unmask: Any = {Key.ACTIVE_NODE_ID_LIST: list(range(1, clients + 1)), Key.DEAD_NODE_ID_LIST: []}
    sent.append(timed("unmask", lambda: mod._unmask(state, ConfigRecord(unmask))))
    return seconds, sum(_size(value) for answer in sent for value in answer.values())


def _delivery(state: Any, private: dict[int, Any]) -> Any:
    """Return the others' ciphertexts for this client, as long as its own for them."""
    own = bytes_to_public_key(state.pk2)
    seed_share, key_share = state.rd_seed_share_dict[_OWN], state.sk1_share_dict[_OWN]
    ciphertexts = [
        encrypt(generate_shared_key(second, own), share_keys_plaintext_concat(node, _OWN, seed_share, key_share))
        for node, (_, (second, _)) in private.items()
    ]
    return {Key.CIPHERTEXT_LIST: ciphertexts, Key.SOURCE_LIST: list(private)}


def _size(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    return sum(_size(one) for one in value) if isinstance(value, list) else 8


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--threshold", type=int, default=67)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=1)
    asked = parser.parse_args()
    if not 2 <= asked.threshold <= asked.clients or asked.parameters < 1 or asked.repeat < 1:
        parser.error("it takes 2 <= threshold <= clients, and at least one parameter and repetition")
    runs = [measure(asked.clients, asked.threshold, asked.parameters) for _ in range(asked.repeat)]
    stages = {stage: round(statistics.median(run[0][stage] for run in runs), 5) for stage in runs[0][0]}
    row = {"client_s": round(sum(stages.values()), 4), "client_stage_s": stages, "upload_bytes": runs[0][1]}
    print(json.dumps({"peer": "flower", "clients": asked.clients, "threshold": asked.threshold, **row}))


if __name__ == "__main__":
    main()

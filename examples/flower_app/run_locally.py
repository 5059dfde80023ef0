"""Run this Flower app in one process: stock ServerApp, stock ClientApp, fedveil's in-process grid."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from digits_app.client_app import app as client_app  # found through the line above
from digits_app.server_app import app as server_app

from simulations import run_flower_apps

NODES = 4

if __name__ == "__main__":
    nodes = [{"partition-id": place, "num-partitions": NODES} for place in range(NODES)]
    run_flower_apps(
        server_app, client_app, clients=nodes, run_config={"num-rounds": 3, "learning-rate": 0.02, "epochs": 2}
    )

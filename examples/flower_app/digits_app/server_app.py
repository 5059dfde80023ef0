"""The server: an ordinary Flower ServerApp that aggregates with fedveil's FedAdam."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from digits_app.task import task
from strategies import FedAdam, FlowerStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and print what came of them."""
    strategy = FlowerStrategy(FedAdam(learning_rate=float(context.run_config["learning-rate"])))
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.build(seed=0).state_dict()),
        num_rounds=int(context.run_config["num-rounds"]),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}")

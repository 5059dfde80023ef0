"""The client: trains with fedveil's trainer inside an ordinary Flower ClientApp."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import TorchTrainer
from digits_app.task import part, task
from fedml_core import Training

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the model after local training, the number of examples and the loss."""
    trainer, module = TorchTrainer(task), task.build(seed=0)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    start = trainer.spec.flatten(module)
    node, config = context.node_config, context.run_config
    update = trainer.train(
        start,
        part(int(node["partition-id"]), int(node["num-partitions"])),
        Training(epochs=int(config["epochs"]), batch_size=16),
        round_number=int(message.content["config"]["server-round"]),
        key=(0, int(node["partition-id"]), int(message.content["config"]["server-round"])),
    )
    trainer.spec.load(start + update.values, module)
    examples = float(update.sums["examples"])
    metrics = MetricRecord({"num-examples": int(examples), "loss": float(update.sums["loss"]) / examples})
    return Message(RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return the model's accuracy on what this node holds."""
    trainer, module = TorchTrainer(task), task.build(seed=0)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    held = part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    sums = trainer.evaluate(trainer.spec.flatten(module), held)
    metrics = MetricRecord(
        {"num-examples": int(sums["examples"]), "accuracy": sums["accuracy"] / sums["examples"]},
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

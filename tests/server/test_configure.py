"""From a run.toml to a plan: names are found, mistakes are blamed on their table, defaults are those of Python."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedml_core.config import EarlyStoppingTable, EvaluationTable, RunConfig, load_run
from fedml_core.errors import ConfigError, StrategyError
from fedml_core.weighting import Uniform
from server.configure import blaming, plan_from
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.sampling import FixedSampling, PoissonSampling
from strategies.averaging import FedAvg, FedProx


def run_of(folder: Path, text: str = "", *overrides: str) -> RunConfig:
    (folder / "run.toml").write_text(f'task = "task.py"\n{text}')
    return load_run(folder / "run.toml", overrides)


def test_a_plan_says_what_the_file_says(tmp_path: Path) -> None:
    text = (
        "seed = 4\nminimum_replies = 2\nround_timeout_s = 9\n"
        '[strategy]\nname = "FedProx"\nmu = 0.1\nweighting = "Uniform"\n'
        '[sampling]\nname = "FixedSampling"\nsize = 3\n'
        "[training]\nsteps = 5\n"
        '[evaluation]\nevery = 3\nserver = false\nclients = { name = "PoissonSampling", rate = 0.5 }\nbatch_size = 8\n'
        '[early_stopping]\nmetric = "clients.accuracy"\npatience = 2\n'
    )
    plan = plan_from(run_of(tmp_path, text))
    assert plan.strategy == FedProx(mu=0.1, weighting=Uniform())
    assert plan.sampling == FixedSampling(3)
    assert plan.training.steps == 5
    assert (plan.seed, plan.minimum_replies, plan.round_timeout_s) == (4, 2, 9)
    assert plan.evaluation == EvaluationPlan(every=3, server=False, clients=PoissonSampling(0.5), batch_size=8)
    assert plan.early_stopping == EarlyStopping("clients.accuracy", 2)


def test_what_the_file_leaves_out_is_what_python_leaves_out(tmp_path: Path) -> None:
    assert plan_from(run_of(tmp_path)) == Plan(FedAvg())


def test_the_tables_have_the_defaults_of_the_classes_they_describe() -> None:
    assert EvaluationTable().model_dump() == dataclasses.asdict(EvaluationPlan())
    assert EarlyStoppingTable().model_dump() == dataclasses.asdict(EarlyStopping())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy=FedAvgg", "strategy: unknown strategy 'FedAvgg'; did you mean 'FedAvg'"),
        ("strategy={name = 'FedProx', mu = -1}", "strategy: mu must be >= 0, got -1"),
        (
            "strategy={name = 'FedAvg', weighting = 'Unifrom'}",
            "strategy: FedAvg.weighting: unknown weighting 'Unifrom'",
        ),
        ("sampling={name = 'FixedSampling', size = 0}", "sampling: size must be >= 1, got 0"),
        ("sampling=Fixed", "sampling: unknown sampling 'Fixed'; did you mean 'FixedSampling'"),
        ("evaluation.clients={name = 'PoissonSampling', rate = 2}", "evaluation.clients: rate must be > 0 and <= 1"),
        ("early_stopping.metric=accuracy", "early_stopping: metric must be server.NAME, "),
    ],
)
def test_a_mistake_is_blamed_on_its_table(tmp_path: Path, override: str, said: str) -> None:
    config = run_of(tmp_path, "", override)
    with pytest.raises(ConfigError) as caught:
        plan_from(config)
    key = override.partition("=")[0]
    assert str(caught.value).startswith(f"{tmp_path / 'run.toml'} with --set {key}: {said}")


def test_what_the_command_line_changed_is_named_where_it_may_be_at_fault_and_nowhere_else(tmp_path: Path) -> None:
    changes = ("strategy.mu=-1", "strategy.name=FedProx", "clients.count=3", "strategy.mu=-2", "rounds=4")
    config, path = run_of(tmp_path, "", *changes), tmp_path / "run.toml"
    with pytest.raises(ConfigError) as caught:
        plan_from(config)
    assert str(caught.value) == f"{path} with --set strategy.mu --set strategy.name: strategy: mu must be >= 0, got -2"
    assert config.source_of("sampling") == config.source_of("clients.partition") == str(path)
    assert config.source_of("sampling", "clients") == f"{path} with --set clients.count"
    assert config.source_of("strategy.mu.deeper") == f"{path} with --set strategy.mu"


def test_blaming_keeps_the_kind_of_the_error(tmp_path: Path) -> None:
    config = run_of(tmp_path, "")
    expected = f"^{re.escape(str(config.path))}: strategy: no$"
    with pytest.raises(StrategyError, match=expected), blaming(config, "strategy"):
        raise StrategyError("no")

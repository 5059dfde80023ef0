"""Configuration files: what they may say, how the command line changes it, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from fedml_core.config import RunConfig, SiteConfig, load_run, load_site
from fedml_core.errors import ConfigError
from fedml_core.training import Training

TASK = 'task = "task.py"\n'
SITE = 'id = 0\ntask = "task.py"\n[secure_aggregation]\n'


def run_of(folder: Path, text: str, *overrides: str) -> RunConfig:
    (folder / "run.toml").write_text(text)
    return load_run(folder / "run.toml", overrides)


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """Return the lines of the error, without the file's path."""
    with pytest.raises(ConfigError) as caught:
        run_of(folder, text, *overrides)
    return [line.replace(f"{folder / 'run.toml'}: ", "", 1) for line in str(caught.value).splitlines()]


def test_a_task_is_all_that_a_run_must_name(tmp_path: Path) -> None:
    config = run_of(tmp_path, TASK)
    assert config.strategy == {"name": "FedAvg"}
    assert config.sampling == {"name": "EveryClient"}
    assert config.clients.partition == {"name": "iid"}
    assert config.training == Training()
    assert config.early_stopping is None


def test_every_table_is_read(tmp_path: Path) -> None:
    text = TASK + (
        "rounds = 7\nseed = 3\nminimum_replies = 2\nround_timeout_s = 1.5\n"
        '[strategy]\nname = "FedProx"\nmu = 0.1\n'
        '[clients]\ncount = 9\nholdout = 0.25\npartition = { name = "dirichlet", alpha = 0.3 }\n'
        '[sampling]\nname = "FixedSampling"\nsize = 4\n'
        "[training]\nepochs = 3\noptimizer_arguments = { momentum = 0.9 }\n"
        '[evaluation]\nevery = 2\nclients = "EveryClient"\n'
        '[early_stopping]\nmetric = "server.accuracy"\n'
        '[simulation]\nengine = "sequential"\non_client_error = "skip"\nfaults = { drop = 0.1 }\n'
        "[server]\nminimum_clients = 3\nwait_s = 60\n"
    )
    config = run_of(tmp_path, text)
    assert (config.rounds, config.seed, config.minimum_replies, config.round_timeout_s) == (7, 3, 2, 1.5)
    assert config.strategy == {"name": "FedProx", "mu": 0.1}
    assert (config.clients.count, config.clients.holdout) == (9, 0.25)
    assert config.clients.partition == {"name": "dirichlet", "alpha": 0.3}
    assert config.training.optimizer_arguments == {"momentum": 0.9}
    assert config.evaluation.clients == {"name": "EveryClient"}
    assert config.early_stopping is not None
    assert config.early_stopping.metric == "server.accuracy"
    assert config.simulation.faults.drop == 0.1
    assert config.simulation.on_client_error == "skip"
    assert config.server.wait_s == 60


def test_a_folder_stands_for_the_run_toml_in_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TASK)
    config = load_run(tmp_path)
    assert config.path == tmp_path / "run.toml"
    assert config.beside("task.py") == tmp_path / "task.py"


def test_an_absolute_path_stays_what_it_is(tmp_path: Path) -> None:
    assert run_of(tmp_path, TASK).beside("/elsewhere/task.py") == Path("/elsewhere/task.py")


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = run_of(tmp_path, TASK)
    with pytest.raises(ValidationError):
        config.rounds = 3


@pytest.mark.parametrize(
    ("change", "table", "value"),
    [
        ("training.learning_rate=0.05", "training", {"learning_rate": 0.05}),
        ("training.learning_rate = 1", "training", {"learning_rate": 1.0}),
        ("training.optimizer=adam", "training", {"optimizer": "adam"}),
        ('training.optimizer="adam"', "training", {"optimizer": "adam"}),
        ("training.optimizer_arguments.momentum=0.9", "training", {"optimizer_arguments": {"momentum": 0.9}}),
        ("training.steps=4", "training", {"steps": 4}),
        ("evaluation.server=false", "evaluation", {"server": False}),
        ("clients.partition={name = 'shards'}", "clients", {"partition": {"name": "shards"}}),
        ("clients.partition=shards", "clients", {"partition": {"name": "shards"}}),
    ],
)
def test_an_override_is_toml_or_else_text(tmp_path: Path, change: str, table: str, value: dict[str, object]) -> None:
    tables = run_of(tmp_path, TASK, change).model_dump()
    assert {key: tables[table][key] for key in value} == value


def test_an_override_takes_the_place_of_what_the_file_says(tmp_path: Path) -> None:
    assert run_of(tmp_path, TASK + "rounds = 5\n", "rounds=6", "rounds=7").rounds == 7


def test_an_override_adds_an_argument_to_a_bare_name(tmp_path: Path) -> None:
    config = run_of(tmp_path, TASK + 'strategy = "FedProx"\n', "strategy.mu=0.1")
    assert config.strategy == {"name": "FedProx", "mu": 0.1}


def test_an_override_cannot_smuggle_in_a_second_key(tmp_path: Path) -> None:
    assert run_of(tmp_path, TASK, "out=1\nrounds = 99").rounds == 10


@pytest.mark.parametrize("text", ["rounds", "=3", "a b=3", ".rounds=3", "rounds.=3"])
def test_what_is_no_assignment_is_refused(tmp_path: Path, text: str) -> None:
    assert mistakes(tmp_path, TASK, text) == [
        f"an override must read key=value, such as training.learning_rate=0.05, got {text!r}"
    ]


def test_an_override_below_a_value_that_is_no_table_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, TASK + "rounds = 3\n", "rounds.x=1") == ["rounds is no table, so rounds.x cannot be set"]


def test_a_wrong_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    assert mistakes(tmp_path, TASK + "rounds = 3\n", "rounds=-1") == [
        "on the command line: rounds must be >= 1, got -1",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = 0", "rounds must be >= 1, got 0"),
        ("rounds = true", "rounds must be a whole number, got true"),
        ("rounds = 2.0", "rounds must be a whole number, got 2.0"),
        ('rounds = "2"', "rounds must be a whole number, got '2'"),
        ("out = 3", "out must be text, got 3"),
        ('out = ""', "out must be text that is not empty, got ''"),
        ("round_timeout_s = 0", "round_timeout_s must be > 0, got 0"),
        ("round_timeout_s = inf", "round_timeout_s must be a finite number, got inf"),
        ("clients = 3", "clients must be a table, got 3"),
        ("clients.holdout = 1", "clients.holdout must be < 1, got 1"),
        ("clients.holdout = nan", "clients.holdout must be a finite number, got nan"),
        ("simulation.faults.late = 1.5", "simulation.faults.late must be <= 1, got 1.5"),
        ('simulation.on_client_error = "no"', "simulation.on_client_error must be 'fail' or 'skip', got 'no'"),
        ("training.learning_rate = 0", "training.learning_rate must be > 0, got 0"),
        (
            "strategy = { mu = 1 }",
            "strategy must be a name, or a table with one such as {name = \"...\"}, got {'mu': 1}",
        ),
        (
            "training = { epochs = 1, steps = 2 }",
            "training: give epochs or steps, not both, got {'epochs': 1, 'steps': 2}",
        ),
        ("round = 3", "unknown key 'round'; did you mean 'rounds' or 'round_timeout_s'?"),
        ("training.epocs = 3", "unknown key 'training.epocs'; did you mean 'epochs' or 'steps'?"),
        ("training.alpha = 3", None),
        ("learning_rate = 0.1", "unknown key 'learning_rate'; it belongs into the table [training]"),
        ("training.rounds = 3", "unknown key 'training.rounds'; it belongs at the top, before any table"),
        ("drop = 0.1", "unknown key 'drop'; it belongs into the table [simulation.faults]"),
        ("simulation.faults.dorp = 0.1", "unknown key 'simulation.faults.dorp'; did you mean 'drop'?"),
        ("early_stopping.patiense = 1", "unknown key 'early_stopping.patiense'; did you mean 'patience'?"),
    ],
)
def test_a_mistake_is_told_with_key_value_and_remedy(tmp_path: Path, text: str, said: str | None) -> None:
    lines = mistakes(tmp_path, f"{TASK}{text}\n")
    if said is None:
        assert lines[0].startswith("unknown key 'training.alpha'; known: batch_size, ")
    else:
        assert lines == [said]


def test_a_long_value_is_cut_short(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, f"{TASK}rounds = '{'x' * 500}'\n")
    assert len(line) < 120
    assert line.endswith("...")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a = \n", ", line 1, column 5: not TOML, "),
        (b"a = 1\nb == 2\n", ", line 2, column 4: not TOML, "),
        (b"a = 'open", ": not TOML, "),
        (b"a = 1\na = 2\n", ", line 2, column "),
        (b"a = '\xff'\n", " is not UTF-8 text (byte 5)"),
        (b"a = " + b"[" * 5000, " nests its values too deep"),
    ],
)
def test_what_is_not_toml_is_told_with_its_place(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TASK, encoding="utf-8-sig")
    assert load_run(tmp_path).task == "task.py"


def test_a_site_says_who_it_is(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'id = 4\nname = "ward-b"\ntask = "task.py"\n[data]\nfolder = "/data"\n[keys]\nauthority = "ca.pem"\n'
    )
    site = load_site(tmp_path / "site.toml")
    assert isinstance(site, SiteConfig)
    assert (site.id, site.name, site.memory) == (4, "ward-b", "memory")
    assert site.data == {"folder": "/data"}
    assert site.keys.authority == "ca.pem"
    assert site.beside(site.keys.site) == tmp_path / "site-keys.json"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('task = "task.py"\n', "id is missing; add it"),
        ('id = -1\ntask = "task.py"\n', "id must be >= 0, got -1"),
        ('id = 0\ntask = "task.py"\n[key]\n', "unknown key 'key'; did you mean 'keys'?"),
        ('id = 0\ntask = "task.py"\ndata = 3\n', "data must be a table, got 3"),
        (
            f'{SITE}operator = "AB12"\n',
            "secure_aggregation.operator must be the 64 hex digits that fedveil keys operator printed, got 'AB12'",
        ),
        (
            f"{SITE}required = true\n",
            "secure_aggregation must name the operator where required = true, or no server could ever be answered, got "
            "{'required': True}",
        ),
        (f"{SITE}minimum_cohort = 1\n", "secure_aggregation.minimum_cohort must be >= 2, got 1"),
        (f"{SITE}minimum_threshold = 1\n", "secure_aggregation.minimum_threshold must be >= 2, got 1"),
        (f"{SITE}corrupt_share = 1.0\n", "secure_aggregation.corrupt_share must be < 1, got 1.0"),
        (f"{SITE}minimum_security_bits = 19\n", "secure_aggregation.minimum_security_bits must be >= 20, got 19"),
        (f"{SITE}maximum_attempts = 0\n", "secure_aggregation.maximum_attempts must be >= 1, got 0"),
        (f"{SITE}allow_semi_honest = 1\n", "secure_aggregation.allow_semi_honest must be true or false, got 1"),
    ],
)
def test_a_mistake_in_a_site_toml_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'site.toml'}: {said}"


def test_a_site_demands_protection_by_default_and_by_its_own_numbers(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('id = 4\ntask = "task.py"\n')
    table = load_site(tmp_path).secure_aggregation
    assert (table.required, table.operator, table.roster, table.allow_semi_honest) == (
        False,
        None,
        "roster.json",
        False,
    )
    assert (table.minimum_cohort, table.minimum_threshold, table.maximum_attempts) == (3, 2, 3)
    assert (table.corrupt_share, table.minimum_security_bits) == (0.1, 60)
    (tmp_path / "site.toml").write_text(f'{SITE}required = true\noperator = "{"ab" * 32}"\nminimum_cohort = 8\n')
    table = load_site(tmp_path).secure_aggregation
    assert (table.required, table.operator, table.minimum_cohort) == (True, "ab" * 32, 8)


def test_every_key_is_described() -> None:
    waiting: list[type[BaseModel]] = [RunConfig, SiteConfig]
    seen = []
    while waiting:
        model = waiting.pop()
        seen.append(model)
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name} has no description"
            options = (info.annotation, *get_args(info.annotation))
            waiting += [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    assert Training in seen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[policy]\naccept = ["secret"]\n',
            "policy.accept.0: 'secret' is no protection; known: none, secure-aggregation, central, distributed, local, "
            "example, joined by + where all must, got 'secret'",
        ),
        (
            '[policy]\naccept = ["none+local"]\n',
            "policy.accept.0: none cannot be joined with a protection, got 'none+local'",
        ),
        ("[policy]\nruns = []\n", "policy must name at least one of runs, or leave runs out, got {'runs': []}"),
        (
            "[policy]\nmaximum_epoch = 1\n",
            "unknown key 'policy.maximum_epoch'; did you mean 'maximum_epochs' or 'maximum_steps' or 'maximum_rounds'?",
        ),
        ("[policy.central]\nmaximum_clip_norm = 0\n", "policy.central.maximum_clip_norm must be > 0, got 0"),
        (
            "[policy.central]\nmaximum_clip_norm = 1.0\n",
            "policy must name central in accept, or [policy.central] would refuse nothing, got "
            "{'central': {'maximum_clip_norm': 1.0}}",
        ),
        ("[policy.metrics]\nstep = -1.0\n", "policy.metrics.step must be > 0, got -1.0"),
        ("[budget]\nepsilon = 0.0\n", "budget.epsilon must be > 0, got 0.0"),
        ("[budget]\ndelta = 1.0\n", "budget.delta must be < 1, got 1.0"),
        ('[budget]\nunit = "patient"\n', "budget.unit must be 'example' or 'client', got 'patient'"),
        ('[ledger]\ndataset = ""\n', "ledger.dataset must be text that is not empty, got ''"),
    ],
)
def test_a_mistake_in_a_policy_a_budget_or_a_ledger_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "site.toml").write_text(f'id = 4\ntask = "task.py"\n{text}')
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path)
    assert str(caught.value).splitlines()[0] == f"{tmp_path / 'site.toml'}: {said}"


def test_a_site_counts_examples_and_a_server_clients_unless_they_say_otherwise(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('id = 4\ntask = "task.py"\n')
    (tmp_path / "run.toml").write_text(TASK)
    site, run = load_site(tmp_path), load_run(tmp_path)
    assert (site.budget.unit, site.budget.limited, site.policy.accept) == ("example", False, ["none"])
    assert (run.budget.unit, run.budget.limited, run.ledger.path) == ("client", False, None)

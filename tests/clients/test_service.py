"""What a site answers a server, what it keeps to itself, and what it refuses to be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.redaction import redacted
from clients.service import SiteService
from fedml_core.config import SiteConfig
from fedml_core.control_variates import ControlVariates
from fedml_core.data import ClientData, Examples
from fedml_core.errors import (
    ChannelError,
    ConfigError,
    FedveilError,
    RefusalError,
    ReplyError,
    RunError,
    SpecMismatchError,
    TaskError,
)
from fedml_core.handshake import (
    FORMAT,
    Goodbye,
    Greeting,
    Hello,
    Introduction,
    NotGreetedError,
    Refused,
    greeting_from_frame,
    greeting_to_frame,
)
from fedml_core.loading import load_task
from fedml_core.message_frames import assignment_to_frame, reply_from_frame
from fedml_core.messages import Assignment, EvaluateWork, Evaluation, Failure, TrainWork, Work
from fedml_core.model import ModelSpec
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import chain
from fedml_core.update import Update
from fedml_core.weighting import ByExamples, Weigh
from fedml_core.wire import Frame

RUN = "0123456789abcdef"
SECRET = "patient 4711"
ROWS = Examples.of(torch.linspace(-1, 1, 24).reshape(12, 2), torch.arange(12) % 2)
SPEC = ModelSpec.of(nn.Linear(2, 2))


def site_data(settings: Mapping[str, Any]) -> ClientData:
    return ClientData(ROWS.take(list(range(8))), ROWS.take([8, 9, 10, 11]))


def task_of(**changes: Any) -> Task:
    task = Task.classification(model=lambda: nn.Linear(2, 2), classes=2, site_data=site_data)
    return dataclasses.replace(task, **changes)


class Site:
    """A service and what it said."""

    def __init__(self, folder: Path, task: Task | None = None, **settings: Any) -> None:
        self.said: list[str] = []
        self.errors: list[Exception] = []
        config = SiteConfig.model_validate({"id": 3, "task": "task.py", "memory": str(folder / "memory"), **settings})
        self.service = SiteService(config, task or task_of(), self.said.append, self.errors.append)

    def greet(self, run: str = RUN, seed: int = 0, spec: ModelSpec = SPEC) -> Greeting:
        return greeting_from_frame(self.service.handle(greeting_to_frame(Hello(run, seed, spec))))

    def tell(self, greeting: Greeting) -> None:
        self.service.handle(greeting_to_frame(greeting))

    def work(self, work: Work, run: str = RUN, round_number: int = 1) -> Any:
        spec = self.service._run.hello.spec if self.service._run else SPEC
        asked = Assignment(run, round_number, spec.fingerprint, torch.zeros(spec.size), work)
        return reply_from_frame(self.service.handle(assignment_to_frame(asked))).body

    def fails(self, work: Work) -> Failure:
        body = self.work(work)
        assert isinstance(body, Failure)
        return body


def train(*transforms: Any) -> TrainWork:
    return TrainWork(Training(batch_size=4), chain(*transforms))


def test_a_greeted_site_introduces_itself_trains_and_evaluates(tmp_path: Path) -> None:
    site = Site(tmp_path, name="ward-a")
    assert site.greet() == Introduction(3, "ward-a", SPEC)
    update = site.work(train(Weigh(ByExamples())))
    assert isinstance(update, Update)
    assert float(update.weight) == 8.0 and bool(update.values.any())
    evaluation = site.work(EvaluateWork())
    assert isinstance(evaluation, Evaluation) and evaluation.sums["examples"] == 4
    assert [line.split(" in ")[0] for line in site.said] == [
        f"greeted as client 3 for run {RUN[:8]}",
        "round 1: trained on 8 examples",
        "round 1: evaluated on 4 examples",
    ]
    assert "loss 0." in site.said[1] and "accuracy" in site.said[2]
    site.tell(Goodbye("the run is done"))
    assert site.service.stop.is_set()
    assert site.service.outcome() == {
        "client": 3,
        "name": "ward-a",
        "run": RUN,
        "trained": 1,
        "evaluated": 1,
        "failed": 0,
        "goodbye": "the run is done",
    }


def test_data_are_loaded_when_first_needed_and_kept(tmp_path: Path) -> None:
    asked: list[Mapping[str, Any]] = []

    def load(settings: Mapping[str, Any]) -> ClientData:
        asked.append(settings)
        return site_data(settings)

    site = Site(tmp_path, task_of(site_data=load), data={"file": "x.csv"})
    site.greet()
    assert asked == []
    for round_number in (1, 2, 3):
        assert isinstance(site.work(train(), round_number=round_number), Update)
    assert asked == [{"file": "x.csv"}]


def test_data_that_could_not_be_loaded_are_tried_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def load(settings: Mapping[str, Any]) -> ClientData:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("the disk is not mounted")
        return site_data(settings)

    site = Site(tmp_path, task_of(site_data=load))
    site.greet()
    assert site.fails(train()).rule == "task"
    assert isinstance(site.work(train()), Update)


def test_the_seed_of_the_run_makes_the_model_and_another_run_another(tmp_path: Path) -> None:
    built: list[torch.Tensor] = []

    def model() -> nn.Module:
        module = nn.Linear(2, 2)
        built.append(module.weight.detach().clone())
        return module

    site = Site(tmp_path, task_of(model=model))
    for run, seed in (("a", 1), ("a", 1), ("b", 1), ("c", 2)):
        site.greet(run, seed)
    assert len(built) == 3, "the same run, greeted again by a server that was restarted, keeps its trainer"
    assert torch.equal(built[0], built[1]) and not torch.equal(built[0], built[2])


def test_a_memory_lies_in_the_sites_own_folder_by_run_and_client(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.greet()
    variates = ControlVariates(2)
    work = TrainWork(Training(batch_size=4), chain(variates), {"0": variates.told(variates.init(SPEC))})
    assert isinstance(site.work(work), Update)
    files = {path.relative_to(tmp_path / "memory") for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {Path(RUN) / "client-3.fedveil", Path("ledger.sqlite"), Path("ledger.sqlite.head")}


@pytest.mark.parametrize("run", ["../../etc", "a/b", "", "a" * 65, "a\n", "."])
def test_a_run_whose_name_could_leave_the_memory_folder_is_refused(tmp_path: Path, run: str) -> None:
    site = Site(tmp_path)
    assert isinstance(site.greet(run), Refused)
    with pytest.raises(ChannelError, match="not one that this version understands"):
        site.service.outcome()


def test_another_model_is_told_to_both_sides_in_the_same_words(tmp_path: Path) -> None:
    site = Site(tmp_path)
    theirs = ModelSpec.of(nn.Linear(2, 3))
    introduction = site.greet(spec=theirs)
    assert isinstance(introduction, Introduction) and introduction.spec == SPEC
    assert site.service.stop.is_set()
    with pytest.raises(SpecMismatchError) as mine:
        site.service.outcome()
    with pytest.raises(SpecMismatchError) as servers:
        theirs.require_equal(introduction.spec)
    assert str(mine.value) == str(servers.value)
    assert SPEC.fingerprint in str(mine.value) and theirs.fingerprint in str(mine.value)
    assert mine.value.exit_code == 2


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    site = Site(tmp_path)
    hello = greeting_to_frame(Hello(RUN, 0, SPEC))
    answer = site.service.handle(Frame("hello", hello.header.replace(f'"format":{FORMAT}', '"format":7')))
    assert isinstance(greeting_from_frame(answer), Refused)
    with pytest.raises(ConfigError, match=f"speaks format 7 and this side format {FORMAT}; install the same version"):
        site.service.outcome()
    assert site.service.stop.is_set()


def test_a_model_that_cannot_be_built_ends_the_site_and_keeps_its_words_at_home(tmp_path: Path) -> None:
    def model() -> nn.Module:
        raise ValueError(SECRET)

    site = Site(tmp_path, task_of(model=model))
    answer = site.greet()
    assert answer == Refused("TaskError from ValueError; the site's own log says more")
    with pytest.raises(TaskError, match=SECRET):
        site.service.outcome()


def test_work_before_a_greeting_or_of_another_run_is_not_done(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with pytest.raises(NotGreetedError, match="before it greeted"):
        site.work(train())
    site.greet("one")
    with pytest.raises(NotGreetedError, match="of a run for which it did not greet"):
        site.work(train(), run="another")
    assert site.service.facts["failed"] == 0


def test_a_final_refusal_ends_the_site_with_the_servers_reason(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.greet()
    site.tell(Refused("its key is enrolled for client 4"))
    assert site.service.stop.is_set()
    with pytest.raises(ConfigError, match="the server refuses this client: its key is enrolled for client 4"):
        site.service.outcome()


def test_a_site_that_must_wait_waits_and_fails_only_if_it_was_never_taken_in(tmp_path: Path) -> None:
    waiting, taken = Site(tmp_path), Site(tmp_path)
    for site in (waiting, taken):
        site.greet()
        site.tell(Refused("number 3 is taken", final=False))
        assert not site.service.stop.is_set()
        assert site.said[-1] == "the server does not take this client in yet: number 3 is taken"
    taken.greet()
    for site in (waiting, taken):
        site.tell(Goodbye("done"))
    assert taken.service.outcome()["goodbye"] == "done"
    with pytest.raises(RunError, match="never took this site in: number 3 is taken"):
        waiting.service.outcome()


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site_data": raising(OSError(SECRET))}, "TaskError from OSError; the site's own log says more"),
        ({"site_data": raising(ConfigError(SECRET))}, "ConfigError; the site's own log says more"),
        ({"site_data": lambda settings: SECRET}, "TaskError; the site's own log says more"),
        ({"loss": raising(LookupError(SECRET))}, "TaskError from LookupError; the site's own log says more"),
    ],
)
def test_what_the_users_code_says_stays_at_home(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    site = Site(tmp_path, task_of(**changes))
    site.greet()
    assert site.fails(train()).reason == reason
    assert site.said[-1].startswith("round 1: ")
    assert SECRET in site.said[-1] or "ClientData, got str" in site.said[-1]
    assert len(site.errors) == 1 and isinstance(site.errors[0], FedveilError)
    assert site.service.facts["failed"] == 1


USERS_TASK = f"""
import torch
from torch import nn
from fedml_core import ClientData, Examples, ReplyError, Task

def site(settings):
    raise ReplyError("rule", "{SECRET}")

task = Task.classification(model=lambda: nn.Linear(2, 2), classes=2, site_data=site)
"""


def test_an_error_of_ours_that_the_users_code_raised_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(USERS_TASK)
    site = Site(tmp_path, load_task("task.py", tmp_path))
    site.greet()
    assert site.fails(train()) == Failure("rule", "ReplyError; the site's own log says more")
    assert SECRET in site.said[-1]


def test_our_own_words_pass(tmp_path: Path) -> None:
    site = Site(tmp_path, task_of(site_data=lambda settings: ClientData(ROWS)))
    site.greet()
    assert site.fails(EvaluateWork()) == Failure("no-test-data", "client 3 keeps no examples aside to evaluate on")
    assert redacted(RefusalError("floor", "noise 0.3 is below 0.8")) == "noise 0.3 is below 0.8"
    assert redacted(ReplyError("diverged", "it diverged")) == "it diverged"


def test_a_transform_that_is_not_installed_here_is_named_to_both_sides(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.greet()
    asked = assignment_to_frame(Assignment(RUN, 2, SPEC.fingerprint, torch.zeros(SPEC.size), train(Weigh())))
    assert '"name":"Weigh"' in asked.header
    unknown = Frame(asked.kind, asked.header.replace('"name":"Weigh"', '"name":"RunThis"'), asked.arrays)
    reply = reply_from_frame(site.service.handle(unknown))
    assert isinstance(reply.body, Failure)
    assert (reply.client, reply.round, reply.run, reply.body.rule) == (3, 2, RUN, "assignment")
    assert "unknown transform 'RunThis'" in reply.body.reason
    assert "unknown transform 'RunThis'" in site.said[-1]


@pytest.mark.parametrize(
    "frame", [Frame("train", "{}"), Frame("train", "["), Frame("dance", "{}"), Frame("hello", "[]")]
)
def test_a_frame_that_means_nothing_is_answered_by_a_class_or_a_refusal_and_told_to_the_operator(
    tmp_path: Path, frame: Frame
) -> None:
    site = Site(tmp_path)
    site.greet()
    if frame.kind == "train":
        with pytest.raises((ValueError, KeyError)):
            site.service.handle(frame)
        assert site.said[-1].startswith("a frame could not be answered: ")
    else:
        assert isinstance(greeting_from_frame(site.service.handle(frame)), Refused)
        with pytest.raises(ChannelError, match="is it fedveil"):
            site.service.outcome()


def test_a_failure_that_nobody_foresaw_is_told_to_the_operator_and_raised(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.greet()
    site.service._read = raising(MemoryError("no room"))
    with pytest.raises(MemoryError):
        site.work(train())
    assert site.said[-1] == "a frame could not be answered: MemoryError: no room"
    assert site.service.facts["failed"] == 1


def test_a_task_without_site_data_is_one_line_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the task task.py has no site_data, from which a site's examples come"):
        Site(tmp_path, task_of(site_data=None))


def test_a_device_that_is_not_there_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="abacus"):
        Site(tmp_path, device="abacus")

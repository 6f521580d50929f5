"""The run's folder: run.existing, one launcher at a time, orphans, secrets that stay out of files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from penstock.config import ActorSection, Config, DataSection, DatasetSection, RedisSection, RunSection
from penstock.config.load import load_config
from penstock.config.shown import masked, secret_settings
from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.ledger import DropRecord, Record, RunRecord, StepRecord, WeightsRecord, encode_record
from penstock.contracts.vocabulary import DropReason
from penstock.errors import ConfigError
from penstock.records.processes import read_known
from penstock.runtime.process import ProcessIdentity
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import commands, job_environment, tuned_environment
from penstock_launch.slurm.known import known_job
from penstock_launch.supervise.process_trees import ProcessTrees
from tests.patience import ANSWER_SECONDS


def make_config(root: Path, **changes: object) -> Config:
    sections: dict[str, object] = {
        "run": RunSection(name="r", root=str(root)),
        "actor": ActorSection(path="model"),
        "data": DataSection(train=DatasetSection(path="train.jsonl")),
    }
    return Config.model_validate(sections | changes)


def folder_with(root: Path, existing: str) -> RunFolder:
    return RunFolder(RunSection.model_validate({"name": "r", "root": str(root), "existing": existing}))


def test_a_new_run_is_no_earlier_one(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "refuse")
    with folder.locked():
        assert folder.prepare(print) is False
    assert folder.logs.is_dir()


def test_resume_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "r" / "steps").mkdir(parents=True)
    folder = folder_with(tmp_path, "resume")
    with folder.locked():
        assert folder.prepare(print) is True
    assert (tmp_path / "r" / "steps").is_dir()


def test_refuse_names_the_folder_and_the_keys(tmp_path: Path) -> None:
    (tmp_path / "r" / "steps").mkdir(parents=True)
    folder = folder_with(tmp_path, "refuse")
    with folder.locked(), pytest.raises(ConfigError, match=r"run\.existing is refuse and .*/r holds an earlier run"):
        folder.prepare(print)


def test_replace_deletes_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "r" / "steps").mkdir(parents=True)
    (tmp_path / "r" / "steps" / "1.pack").write_bytes(b"x")
    (tmp_path / "r" / "config.yaml").write_text("a: 1")
    (tmp_path / "r" / "final").mkdir()
    folder, events = folder_with(tmp_path, "replace"), list[str]()
    with folder.locked():
        assert folder.prepare(events.append) is False
    [said] = events
    assert said.startswith(f"run.existing is replace: deleting the earlier run in {folder.path} ")
    assert "0 checkpoints, 1 recorded steps, 1 final models" in said
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "logs"]


RUN = RunRecord("digest", 2, 2, 2, 0)
START = WeightsRecord(PolicyIdentity(0, "00"), 0)
STEP = StepRecord(0, (0, 1), "00000000.1.pack", "digest")
AFTER = WeightsRecord(PolicyIdentity(1, "01"), 1)


def tried(root: Path, *records: Record, exit_code: int | None = 3) -> Path:
    """The folder of a run whose journal has these records. exit_code: of its last launch; None: it was killed."""
    path = root / "r"
    for name in ("steps", "checkpoints/00000000.1", "queue", "logs"):
        (path / name).mkdir(parents=True)
    for name in ("config.yaml", "evals.jsonl", "logs/trainer.log", "queue/appendonly.aof"):
        (path / name).write_text("a: 1")
    (path / "steps" / "ledger.jsonl").write_bytes(b"".join(encode_record(each) + b"\n" for each in records))
    if exit_code is not None:
        (path / "summary.json").write_text(json.dumps({"steps": 0, "exit": {"code": exit_code, "reason": "x"}}))
    return path


@pytest.mark.parametrize(
    "records", [(), (RUN, START), (RUN, START, DropRecord(0, DropReason.POISON)), (RUN, START, STEP)]
)
def test_a_try_that_failed_before_its_first_step_is_begun_anew(tmp_path: Path, records: tuple[Record, ...]) -> None:
    path = tried(tmp_path, *records)
    folder, events = folder_with(tmp_path, "resume"), list[str]()
    with folder.locked():
        assert folder.prepare(events.append) is False
    assert folder.begins_anew
    assert "begins anew" in events[0]
    assert sorted(each.name for each in path.iterdir()) == [".lock", "config.yaml", "logs"]
    assert (path / "logs" / "trainer.log").exists()


@pytest.mark.parametrize(
    ("records", "exit_code", "also"),
    [
        ((RUN, START, STEP, AFTER), 3, ""),
        ((RUN, START), None, ""),
        ((RUN, START), 0, ""),
        ((RUN, START), 3, "checkpoints/00000050.1"),
        ((RUN, START), 3, "final"),
    ],
    ids=["a step", "killed", "finished", "checkpoint", "final model"],
)
def test_what_a_run_can_go_on_from_is_kept(
    tmp_path: Path, records: tuple[Record, ...], exit_code: int | None, also: str
) -> None:
    path = tried(tmp_path, *records, exit_code=exit_code)
    (path / also).mkdir(exist_ok=True)
    folder = folder_with(tmp_path, "resume")
    with folder.locked():
        assert folder.prepare(print) is True
    assert not folder.begins_anew
    assert {"steps", "checkpoints", "queue", "evals.jsonl"} <= {each.name for each in path.iterdir()}


def test_a_journal_that_cannot_be_read_is_left_to_the_trainer(tmp_path: Path) -> None:
    path = tried(tmp_path)
    (path / "steps" / "ledger.jsonl").write_text("damaged\n")
    folder = folder_with(tmp_path, "resume")
    with folder.locked():
        assert folder.prepare(print) is True
    assert (path / "steps" / "ledger.jsonl").read_text() == "damaged\n"


def test_replace_does_not_delete_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("precious")
    folder = folder_with(tmp_path, "replace")
    with folder.locked(), pytest.raises(ConfigError, match="does not look like the folder of a run"):
        folder.prepare(print)
    assert (tmp_path / "r" / "thesis.tex").read_text() == "precious"


def test_a_second_launcher_of_the_same_run_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "resume")
    with (
        folder.locked(),
        pytest.raises(ConfigError, match="'r' is running already"),
        folder_with(tmp_path, "resume").locked(),
    ):
        pass
    with folder.locked():
        pass


def test_a_lock_that_ends_in_time_is_waited_for(tmp_path: Path) -> None:
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(flush=True); time.sleep(0.7)"
    )
    (tmp_path / "r").mkdir()
    command = [sys.executable, "-S", "-c", holder, str(tmp_path / "r" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with folder_with(tmp_path, "resume").locked(wait_seconds=ANSWER_SECONDS):
            assert process.wait(ANSWER_SECONDS) == 0


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root"), folder_with(tmp_path / "file", "resume").locked():
        pass


def test_a_file_in_the_place_of_the_root_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    folder = folder_with(tmp_path / "runs", "resume")
    assert (folder.read_queue(), read_known(folder.path, "r"), known_job(folder)) == (None, [], None)


def test_an_orphan_of_an_earlier_launch_is_found_and_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as orphan:
        identity = ProcessIdentity.of(orphan.pid)
        assert identity is not None
        (tmp_path / "r").mkdir()
        ProcessTrees(tmp_path / "r", "r").sample({"rollout": identity})
        # This process stands for the launcher that has ended.
        path = tmp_path / "r" / "processes.json"
        document = json.loads(path.read_text())
        document["processes"] = [each for each in document["processes"] if each["service"] != "launcher"]
        path.write_text(json.dumps(document))
        assert folder_with(tmp_path, "resume").end_orphans() == [f"rollout (pid {orphan.pid})"]
        assert not identity.alive


def test_a_pid_that_was_used_again_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as other:
        (tmp_path / "r").mkdir()
        identity = ProcessIdentity.of(other.pid)
        assert identity is not None
        trees = ProcessTrees(tmp_path / "r", "r")
        trees.sample({"rollout": identity})
        path = tmp_path / "r" / "processes.json"
        path.write_text(path.read_text().replace(identity.started, "ticks:7").replace('"launcher"', '"gone"'))
        known = [each for each in read_known(tmp_path / "r", "r") if each.service == "rollout"]
        assert [each.identity.alive for each in known] == [False]
        assert identity.alive
        other.kill()


def test_records_of_another_machine_or_run_mean_nothing(tmp_path: Path) -> None:
    trees = ProcessTrees(tmp_path, "r")
    trees.sample({})
    assert read_known(tmp_path, "r")
    assert read_known(tmp_path, "other") == []
    path = tmp_path / "processes.json"
    path.write_text(path.read_text().replace('"machine":"', '"machine":"elsewhere '))
    assert read_known(tmp_path, "r") == []


def test_peak_memory_is_kept_by_process(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    with subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True) as child:
        identity = ProcessIdentity.of(child.pid)
        assert identity is not None
        trees = ProcessTrees(tmp_path, "r")
        while not any(name.startswith("rollout/") for name in trees.peak_rss_bytes):
            trees.sample({"rollout": identity})
        for member in trees.survivors("rollout"):
            member.send(9)
    assert trees.peak_rss_bytes["rollout"] > 10**6
    parts = [size for name, size in trees.peak_rss_bytes.items() if name != "total"]
    assert trees.peak_rss_bytes["total"] <= sum(parts)
    assert "launcher" in trees.peak_rss_bytes


def test_the_written_configuration_holds_no_secret_and_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        token=SecretStr("tok3n"),
        redis=RedisSection(url="redis://user:pa55@db:6379/0", password=SecretStr("pa55")),
        rollout={"engine": {"url": "http://me:pa55@engine:80"}},
    )
    folder = RunFolder(config.run)
    with folder.locked():
        folder.prepare(print)
        folder.write_config(config)
    text = folder.config_path.read_text()
    assert "tok3n" not in text
    assert "pa55" not in text
    environment = tuned_environment({}, secret_settings(config, config.redis))
    again = load_config(["--config", str(folder.config_path)], environment)
    assert again == config


def test_shown_secrets_are_masked(tmp_path: Path) -> None:
    config = make_config(tmp_path, token=SecretStr("tok3n"), redis=RedisSection(url="redis://:pa55@db:6379/0"))
    text = yaml.safe_dump(masked(config))
    assert "tok3n" not in text
    assert "pa55" not in text
    assert "db:6379" in text


def test_secrets_in_urls_and_in_arguments_of_the_engine_are_masked(tmp_path: Path) -> None:
    arguments = ["--api-key", "-k3y", "--admin-api-key=k3y", "--tokenizer-mode", "auto", "--max-total-tokens=9"]
    engine = {"url": "http://me:pa55@engine:80", "extra_args": arguments}
    config = make_config(tmp_path, rollout={"engine": engine}, redis=RedisSection(url="redis://db?password=pa55&db=1"))
    text = yaml.safe_dump(masked(config))
    assert "k3y" not in text
    assert "pa55" not in text
    for part in ("me:", "engine:80", "db=1", "--tokenizer-mode", "auto", "--max-total-tokens=9"):
        assert part in text


def test_settings_of_the_environment_do_not_reach_the_services_twice(tmp_path: Path) -> None:
    environ = {"PENSTOCK_ACTOR__GROUP_SIZE": "4", "HOME": "/home/u", "OMP_NUM_THREADS": "3"}
    config = make_config(tmp_path, redis=RedisSection(url="redis://h"))
    environment = tuned_environment(environ, secret_settings(config, config.redis))
    assert "PENSTOCK_ACTOR__GROUP_SIZE" not in environment
    assert environment["HOME"] == "/home/u"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["PENSTOCK_REDIS__URL"] == "redis://h"
    assert job_environment(config, environ) == {
        "HOME": "/home/u",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "passive",
        "PENSTOCK_REDIS__URL": "redis://h",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_a_process_on_a_gpu_has_threads_and_gives_freed_memory_back() -> None:
    on_cpu, on_gpu = tuned_environment({}, {}), tuned_environment({}, {}, gpu_threads=12)
    assert (on_cpu["OMP_NUM_THREADS"], on_gpu["OMP_NUM_THREADS"]) == ("1", "12")
    assert {name for name in on_cpu if name not in on_gpu} == {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"}
    assert tuned_environment({"OMP_NUM_THREADS": "3"}, {}, gpu_threads=12)["OMP_NUM_THREADS"] == "3"


def test_further_servers_take_the_next_ports(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, rollout={"num_servers": 2, "port": 7000, "engine": {"port": 7100}}, reward={"num_services": 2}
    )
    services = {each.name: each.arguments[5:] for each in commands(config, RunFolder(config.run), config.redis, {})}
    assert services == {
        "rollout-0": (),
        "rollout-1": ("--rollout.port", "7001", "--rollout.engine.port", "7101"),
        "trainer": (),
        "reward-0": (),
        "reward-1": (),
    }


def test_agent_services_are_started_only_if_episodes_are_made(tmp_path: Path) -> None:
    agent = {"num_services": 2, "port": 7300}
    config = make_config(tmp_path, agent=agent)
    assert ServiceKind.AGENT not in config.num_services
    assert [each.name for each in commands(config, RunFolder(config.run), config.redis, {})] == [
        *("rollout", "trainer", "reward"),
    ]
    config = make_config(tmp_path, agent={**agent, "environment": "my_envs:Guess"})
    found = commands(config, RunFolder(config.run), config.redis, {"PENSTOCK_AGENT__PORT": "1", "KEY": "of a tool"})
    assert [each.name for each in found] == ["rollout", "trainer", "agent-0", "agent-1", "reward"]
    first, second = found[2:4]
    assert first.arguments[1:3] == ("-m", "penstock_agent")
    assert (first.arguments[5:], second.arguments[5:]) == ((), ("--agent.port", "7301"))
    assert first.environment["KEY"] == "of a tool"
    assert "PENSTOCK_AGENT__PORT" not in first.environment
    assert "tokenizer" in first.hint


def test_several_ranks_are_started_by_torchrun(tmp_path: Path) -> None:
    config = make_config(tmp_path, trainer={"num_ranks": 2})
    services = {each.name: each.arguments for each in commands(config, RunFolder(config.run), config.redis, {})}
    assert services["trainer"][1:4] == ("-m", "penstock_trainer.torchrun", "--config")

"""The job script: the requests of each component, what a site may change, and errors if something cannot fit."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import job_environment
from penstock_launch.slurm.render import render
from penstock_launch.slurm.shares import ServiceShare, idle_gpus, section_of, share_of
from penstock_launch.slurm.site import SlurmJob, srun_words
from penstock_launch.slurm.submit import for_cluster, launch_slurm


def make_config(root: Path, **sections: Any) -> Config:
    document: dict[str, Any] = {
        "run": {"name": "r", "root": str(root)},
        "actor": {"path": "model"},
        "data": {"train": {"path": "train.jsonl"}},
        **sections,
    }
    return Config.model_validate(document)


def components(script: str) -> list[dict[str, str]]:
    """The #SBATCH options of each component; a flag has an empty value."""
    found: list[dict[str, str]] = [{}]
    for line in script.splitlines():
        if line == "#SBATCH hetjob":
            found.append({})
        elif line.startswith("#SBATCH "):
            name, _, value = shlex.split(line.removeprefix("#SBATCH "))[0].partition("=")
            found[-1][name] = value
    return found


def test_each_component_asks_for_what_its_section_says(tmp_path: Path) -> None:
    slurm = {
        "partition": "batch",
        "account": "lab",
        "qos": "high",
        "time_limit": "8:00:00",
        "sbatch": ["--exclusive"],
        "services": {"partition": "cpu", "cpus_per_node": 8, "memory_per_node": "32G"},
        "rollout": {"nodes": 2, "gpus_per_node": 4, "gpu_type": "a100", "sbatch": ["--constraint=nvlink"]},
        "trainer": {"nodes": 4, "gpus_per_node": 8},
    }
    config = make_config(tmp_path, rollout={"num_servers": 4}, trainer={"num_ranks": 32}, slurm=slurm)
    services, rollout, trainer = components(render(config, tmp_path))
    assert (services["--partition"], services["--cpus-per-task"], services["--mem"]) == ("cpu", "8", "32G")
    assert "--gres" not in services
    assert (rollout["--partition"], rollout["--nodes"], rollout["--gres"]) == ("batch", "2", "gpu:a100:4")
    assert rollout["--constraint"] == "nvlink"
    assert (trainer["--nodes"], trainer["--gres"]) == ("4", "gpu:8")
    for component in (services, rollout, trainer):
        assert (component["--account"], component["--qos"], component["--time"]) == ("lab", "high", "8:00:00")
        assert {"--requeue", "--exclusive"} <= component.keys()
        assert component["--ntasks-per-node"] == "1"


def test_the_job_as_a_whole_is_described_in_its_first_component(tmp_path: Path) -> None:
    root = tmp_path / "100% mine"
    script = render(make_config(root), tmp_path)
    first, *others = components(script)
    assert first["--job-name"] == "penstock-r"
    assert first["--chdir"] == str(tmp_path)
    assert first["--output"] == str(root / "r" / "logs" / "slurm.log").replace("%", "%%")
    assert first["--open-mode"] == "append"
    assert first["--signal"] == "B:USR1@300"
    assert not any("--output" in each or "--signal" in each for each in others)
    last = shlex.split(script.splitlines()[-1])
    assert (last[0], last[2:4]) == ("exec", ["-m", "penstock_launch.slurm.job"])
    assert last[-1] == str(root / "r" / "config.yaml")


def test_without_requeue_or_signal_the_script_asks_for_neither(tmp_path: Path) -> None:
    first, *_ = components(
        render(
            make_config(tmp_path, slurm={"requeue": False, "signal_seconds": 0, "setup": ["module load x"]}), tmp_path
        )
    )
    assert "--signal" not in first
    assert "--no-requeue" in first


def test_setup_comes_before_the_launcher(tmp_path: Path) -> None:
    lines = render(
        make_config(tmp_path, slurm={"setup": ["module load cuda", "ulimit -n 65536"]}), tmp_path
    ).splitlines()
    assert lines.index("module load cuda") < lines.index("ulimit -n 65536") < len(lines) - 1


def test_a_site_may_have_its_own_template(tmp_path: Path) -> None:
    template = tmp_path / "site.sh"
    parts = "\n#SBATCH hetjob\n".join(["@@{services}", "@@{rollout}", "@@{trainer}"])
    text = f"#!/bin/sh\n{parts}\n# @@{{run}}: ours ${{HOME%%x}}\n"
    template.write_text(text + "@@{setup}\nexec @@{launcher}\n")
    script = render(make_config(tmp_path, slurm={"template": str(template)}), tmp_path)
    assert "# r: ours ${HOME%%x}" in script
    assert len(components(script)) == 3
    template.write_text(text)
    with pytest.raises(ConfigError, match=r"slurm\.template: .*expected each of @@\{launcher\}"):
        render(make_config(tmp_path, slurm={"template": str(template)}), tmp_path)
    with pytest.raises(ConfigError, match=r"slurm\.template: .*cannot be read"):
        render(make_config(tmp_path, slurm={"template": str(tmp_path / "nowhere.sh")}), tmp_path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"trainer": {"num_ranks": 3}, "slurm": {"trainer": {"nodes": 2}}}, "trainer.num_ranks is 3"),
        ({"trainer": {"num_ranks": 8}, "slurm": {"trainer": {"gpus_per_node": 4}}}, "slurm.trainer.gpus_per_node is 4"),
        (
            {"rollout": {"num_servers": 3}, "slurm": {"rollout": {"gpus_per_node": 2}}},
            "slurm.rollout.gpus_per_node is 2",
        ),
        (
            {
                "rollout": {"num_servers": 4, "engine": {"tensor_parallel_size": 2}},
                "slurm": {"rollout": {"nodes": 2, "gpus_per_node": 3}},
            },
            "slurm.rollout.gpus_per_node is 3 and a node has 2 servers, each with 2 GPUs by "
            "rollout.engine.tensor_parallel_size and rollout.engine.gpus_per_server: expected at least 4",
        ),
        (
            {"rollout": {"engine": {"tensor_parallel_size": 2}}},
            "slurm.rollout.gpus_per_node is 0 and a node has 1",
        ),
        ({"rollout": {"gpus": [0]}}, "rollout.gpus is 0, and Slurm chooses the GPUs of each process"),
        ({"trainer": {"take_turns": True}}, "trainer.take_turns is on, and Slurm gives trainer and servers GPUs"),
        ({"trainer": {"gpus": [0, 1]}}, "trainer.gpus is 0, 1, and Slurm chooses the GPUs of each process"),
        ({"rollout": {"num_servers": 1}, "slurm": {"rollout": {"nodes": 2}}}, "rollout.num_servers is 1"),
        ({"reward": {"num_services": 5}}, "slurm.services.cpus_per_node is 4"),
        (
            {"reward": {"num_services": 3}, "agent": {"environment": "e:E", "num_services": 2}},
            "slurm.services.cpus_per_node is 4 and agent.num_services 2 and reward.num_services 3 on 1 nodes: expected "
            "at least one for each of the 5 services of a node",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        render(make_config(tmp_path, **sections), tmp_path)


def test_services_of_a_node_share_it_evenly_and_keep_the_options_of_a_container(tmp_path: Path) -> None:
    slurm = {
        "srun": ["--container-image=/images/all.sqsh"],
        "rollout": {
            "nodes": 2,
            "cpus_per_node": 32,
            "gpus_per_node": 8,
            "srun": ["--container-image=/images/sglang.sqsh"],
        },
    }
    engine = {"tensor_parallel_size": 4}
    config = make_config(tmp_path, rollout={"num_servers": 4, "engine": engine}, slurm=slurm)
    words = srun_words(
        ServiceKind.ROLLOUT, section_of(config, "rollout"), share_of(config, ServiceKind.ROLLOUT), "rollout-0"
    )
    assert {"--het-group=1", "--nodes=1", "--cpus-per-task=16", "--gres=gpu:4", "--exact"} <= set(words)
    assert words[-1] == "--container-image=/images/sglang.sqsh"
    words = srun_words(
        ServiceKind.REWARD, section_of(config, "services"), share_of(config, ServiceKind.REWARD), "reward"
    )
    assert words[-1] == "--container-image=/images/all.sqsh"
    assert "--het-group=0" in words


def test_agent_and_reward_services_share_the_cpus_of_their_nodes(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "reward": {"num_services": 2},
        "agent": {"environment": "my_envs:Guess", "num_services": 4},
        "slurm": {"services": {"nodes": 2, "cpus_per_node": 12}},
    }
    config = make_config(tmp_path, **sections)
    share = ServiceShare(1, 4, 0)
    assert (share_of(config, ServiceKind.AGENT), share_of(config, ServiceKind.REWARD)) == (share, share)
    words = srun_words(ServiceKind.AGENT, section_of(config, "services"), share, "agent-0")
    assert {"--het-group=0", "--job-name=agent-0", "--nodes=1", "--cpus-per-task=4", "--exact"} <= set(words)
    assert not any("gres" in word for word in words)
    without = make_config(tmp_path, **sections | {"agent": {"num_services": 4}})
    assert share_of(without, ServiceKind.REWARD) == ServiceShare(1, 12, 0)


def test_a_service_of_a_job_listens_where_other_nodes_reach_it(tmp_path: Path) -> None:
    config = for_cluster(make_config(tmp_path, slurm={"listen_host": "10.0.0.1"}, agent={"environment": "e:E"}))
    assert {each.host for each in (config.agent, config.reward, config.rollout, config.trainer)} == {"10.0.0.1"}
    assert for_cluster(make_config(tmp_path, agent={"host": "10.0.0.9"})).agent.host == "10.0.0.9"


def test_a_server_asks_for_the_gpus_that_its_engine_uses(tmp_path: Path) -> None:
    slurm = {"rollout": {"cpus_per_node": 32, "gpus_per_node": 8}, "trainer": {"cpus_per_node": 32, "gpus_per_node": 8}}

    def shares(engine: dict[str, Any], **trainer: Any) -> tuple[ServiceShare, ServiceShare]:
        config = make_config(tmp_path, rollout={"num_servers": 2, "engine": engine}, trainer=trainer, slurm=slurm)
        return share_of(config, ServiceKind.ROLLOUT), share_of(config, ServiceKind.TRAINER)

    rollout, trainer = shares({"tensor_parallel_size": 4}, num_ranks=8)
    assert (rollout.gpus, rollout.gpu_threads) == (4, 4)  # 16 CPUs for each server
    assert (trainer.gpus, trainer.gpu_threads) == (8, 4)
    assert shares({})[0].gpus == 1
    assert shares({"gpus_per_server": 2, "extra_args": ["--pp-size", "2"]})[0].gpus == 2
    assert shares({"device": "cpu"}, device="cpu", num_ranks=16) == (ServiceShare(1, 16, 0), ServiceShare(1, 32, 8))


def test_gpus_that_no_process_uses_are_named(tmp_path: Path) -> None:
    slurm = {"rollout": {"nodes": 2, "gpus_per_node": 8}, "trainer": {"gpus_per_node": 8}}
    engine = {"tensor_parallel_size": 2}
    rollout = {"num_servers": 4, "engine": engine}
    assert idle_gpus(make_config(tmp_path, rollout=rollout, trainer={"num_ranks": 8}, slurm=slurm)) == [
        "slurm.rollout.gpus_per_node is 8, of which the processes of a node use 4"
    ]
    assert idle_gpus(make_config(tmp_path, rollout={**rollout, "num_servers": 8}, slurm=slurm)) == [
        "slurm.trainer.gpus_per_node is 8, of which the processes of a node use 1"
    ]
    assert idle_gpus(make_config(tmp_path)) == []


def test_services_on_gpus_have_threads_and_give_freed_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_launch.slurm.scheduler.node_address", lambda node: node)
    environ = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n", "SLURM_JOB_NODELIST_HET_GROUP_2": "n"}
    config = make_config(tmp_path, slurm={"rollout": {"cpus_per_node": 8, "gpus_per_node": 1}})
    steps: list[Any] = list(SlurmJob("0.0.0.0", environ).services(config, RunFolder(config.run), config.redis, environ))
    tuned = {step.name: step._environment for step in steps}
    assert tuned["rollout"]["OMP_NUM_THREADS"] == "8"
    assert tuned["trainer"]["OMP_NUM_THREADS"] == "1"
    assert "MALLOC_MMAP_MAX_" in tuned["trainer"]
    assert "MALLOC_MMAP_MAX_" not in tuned["rollout"]
    assert "MALLOC_MMAP_MAX_" not in job_environment(config, {})  # what a job has set, all its services inherit


def test_services_on_several_nodes_listen_where_others_reach_them(tmp_path: Path) -> None:
    config = for_cluster(make_config(tmp_path, reward={"host": "10.0.0.7"}))
    assert (config.rollout.host, config.trainer.host, config.reward.host) == ("0.0.0.0", "0.0.0.0", "10.0.0.7")
    assert config.weights.folder == str(tmp_path / "r" / "weights")  # never the memory of one host


def test_rendering_only_changes_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path / "runs")
    lines = launch_slurm(config, {}, render_only=True)
    assert lines[0] == "#!/bin/bash"
    assert list(tmp_path.iterdir()) == []


def test_an_option_must_be_one_line_that_looks_like_one(tmp_path: Path) -> None:
    for option in ("exclusive", "--comment=a\n--uid=0"):
        with pytest.raises(ValueError, match="slurm"):
            make_config(tmp_path, slurm={"sbatch": [option]})


def test_the_example_of_a_cluster_fits_under_a_run(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    files = [root / "examples" / "gsm8k" / "config.yaml", root / "deploy" / "slurm" / "cluster.yaml"]
    config = load_config([word for path in files for word in ("--config", str(path))], {})
    assert [each["--partition"] for each in components(render(config, tmp_path))] == ["cpu", "gpu", "gpu"]


def test_the_template_that_a_site_sees_is_the_built_in_one() -> None:
    root = Path(__file__).parents[3]
    shown = root / "deploy" / "slurm" / "job.sh"
    assert shown.read_bytes() == (root / "deploy" / "launch" / "penstock_launch" / "slurm" / "job.sh").read_bytes()

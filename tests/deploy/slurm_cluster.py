"""A real Slurm of four nodes on this host: munge, a controller and four slurmd, on loopback.

Nodes cpu1 and cpu2 form the partition cpu; gpu1 and gpu2, with two fake GPUs each, the partition gpu. All files are in
one folder. A Slurm that is installed on the host is neither read nor changed.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from penstock.runtime.process import tied_command

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("cpu1", "cpu2", "gpu1", "gpu2")
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
CONFIGURATION = """
ClusterName=penstock-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,bf_continue
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MinJobAge=600
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
NodeName=cpu1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=cpu2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
NodeName=gpu1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=gpu2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[4]} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=cpu Nodes=cpu[1-2] Default=YES MaxTime=1-0 State=UP
PartitionName=gpu Nodes=gpu[1-2] MaxTime=1-0 State=UP
"""
# Any two device files will do: a step then gets the numbers of its own in CUDA_VISIBLE_DEVICES.
GPUS = "NodeName=gpu[1-2] Name=gpu Count=2 File=/dev/zero,/dev/null\n"


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "needs root, which slurmd runs as"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)" if missing else ""


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS])


def until(condition: Callable[[], object], what: str, timeout_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:g} s: {what}"
        time.sleep(0.1)


class SlurmCluster:
    """The daemons, which do not outlive this process, and the commands that call them."""

    def __init__(self, folder: Path) -> None:
        """`folder`: with a short path, since the path of a socket must be short."""
        self.folder = folder
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._write_configuration()
        key, socket_path, log, seed = (f"{self.folder}/munge.{suffix}" for suffix in ("key", "sock", "log", "seed"))
        self._spawn(
            "munged",
            *("--foreground", "--force", "--num-threads=2", f"--pid-file={self.folder}/munge.pid"),
            *(f"--key-file={key}", f"--socket={socket_path}", f"--log-file={log}", f"--seed-file={seed}"),
        )
        until(Path(socket_path).exists, "munge answers")
        self._spawn("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        until(self._answers, "the controller answers")
        self.clear()

    def clear(self) -> None:
        """Cancel all jobs, and restart nodes that were killed, until every node is idle."""
        self._cancel_all()
        for node in NODES:
            if node not in self._daemons:
                (self.folder / f"spool-{node}").mkdir(exist_ok=True)
                self._spawn("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node, name=node)
        until(self._all_idle, "all nodes idle")

    def kill_node(self, node: str) -> None:
        """Fail like a power cut: the node's daemon, and all that it runs, end at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in self._steps(node):
            _kill(process)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        if self._answers():
            self._cancel_all()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in NODES:
            for process in self._steps(node):
                _kill(process)

    def run(self, *command: str) -> str:
        """The output of a Slurm command."""
        done = self._try(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def shown(self, job_id: str) -> dict[str, str]:
        """The first component of a job, as `scontrol show job` prints it."""
        text = self.run("scontrol", "show", "job", job_id, "--oneliner").splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job_id: str, *states: str, timeout_seconds: float = 150.0) -> str:
        """Wait until the state of a job is one of `states`; returns it."""
        until(lambda: self.shown(job_id)["JobState"] in states, f"job {job_id} is {states}", timeout_seconds)
        return self.shown(job_id)["JobState"]

    def start_now(self, job_id: str) -> None:
        """Start a requeued job now. Slurm would wait for two minutes first, in case the reason persists."""
        until(lambda: set(self._states(job_id)) == {"PENDING"}, f"all of job {job_id} is queued again", 150)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def _states(self, job_id: str) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%T", f"--jobs={job_id}").split()

    def nodes_of(self, component: str) -> str:
        """The nodes of a running component, such as 12+2."""
        lines = self.run("squeue", "--noheader", "--format=%i %N").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)[component].strip()

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that fails."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        text = CONFIGURATION.format(folder=self.folder, ports=free_ports(1 + len(NODES)))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(GPUS)
        found = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        assert found is not None
        # Since 23.02 it must be set that no cgroups are used; before, it follows from the process tracking.
        plugin = "disabled" if (int(found[1]), int(found[2])) >= (23, 2) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _cancel_all(self) -> None:
        self.run("scancel", "--user=root")
        until(lambda: not self.run("squeue", "--noheader").strip(), "all jobs gone", 30)

    def _steps(self, node: str) -> list[psutil.Process]:
        """The processes on a node: the tasks, and the parents that started them."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                if (environ.get("SLURM_CONF"), environ.get("SLURMD_NODENAME")) != (
                    self.environment["SLURM_CONF"],
                    node,
                ):
                    continue
                above = [each for each in process.parents() if each.name().startswith("slurmstepd")]
            except psutil.Error:
                continue
            found |= {each.pid: each for each in [*above, process]}
        return list(found.values())

    def _answers(self) -> bool:
        return self._try("scontrol", "ping").returncode == 0

    def _all_idle(self) -> bool:
        return self._try("sinfo", "--noheader", "--Node", "--format=%t").stdout.split() == ["idle"] * len(NODES)

    def _spawn(self, program: str, *options: str, name: str = "") -> None:
        found = shutil.which(program, path=search_path())
        assert found is not None
        self._daemons[name or program] = subprocess.Popen(
            tied_command([found, *options]),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _try(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(10)
    except psutil.Error:
        return

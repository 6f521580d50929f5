"""The limits of control groups, of both versions, in a container's view and in the host's."""

from pathlib import Path

from penstock_launch.doctor.cgroup import Limits, read_limits


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_a_host_without_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits()
    files = {"proc/self/cgroup": "0::/user.slice", "sys/fs/cgroup/user.slice/memory.max": "max"}
    files["sys/fs/cgroup/user.slice/cpu.max"] = "max 100000"
    assert read_limits(write(tmp_path, files)) == Limits()


def test_a_container_of_version_2_sees_its_group_as_the_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(4 * 2**30)}
    files |= {"sys/fs/cgroup/cpu.max": "150000 100000", "sys/fs/cgroup/pids.max": "4096"}
    assert read_limits(write(tmp_path, files)) == Limits(4 * 2**30, 1.5, 4096)


def test_the_lowest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    tree = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "0::/slurm/job_7/step_0", f"{tree}/slurm/job_7/memory.max": str(2**31)}
    files |= {f"{tree}/slurm/job_7/step_0/memory.max": "max", f"{tree}/slurm/memory.max": str(2**40)}
    files |= {f"{tree}/slurm/job_7/cpu.max": "800000 100000", f"{tree}/memory.max": str(2**41)}
    assert read_limits(write(tmp_path, files)) == Limits(2**31, 8.0, None)


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    tree = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "8:pids:/docker/ab\n4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/"}
    files |= {f"{tree}/memory/memory.limit_in_bytes": str(2**32), f"{tree}/pids/docker/ab/pids.max": "max"}
    files |= {f"{tree}/cpu,cpuacct/cpu.cfs_quota_us": "200000", f"{tree}/cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert read_limits(write(tmp_path, files)) == Limits(2**32, 2.0, None)


def test_version_1_says_none_by_numbers(tmp_path: Path) -> None:
    tree = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "4:memory:/\n1:cpu:/", f"{tree}/memory/memory.limit_in_bytes": "9223372036854771712"}
    files |= {f"{tree}/cpu/cpu.cfs_quota_us": "-1", f"{tree}/cpu/cpu.cfs_period_us": "100000"}
    assert read_limits(write(tmp_path, files)) == Limits()

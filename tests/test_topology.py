"""The nodes that follow from what ranks know of their hosts, and the facts of this host."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcoll._topology import detect, hardware, nics, usable_cpus

A, B, C = b"a", b"b", b"c"


def cpus(*numbers, quota=0xFFFFFFFF):
    """What `usable_cpus` returns on a rank that may use these CPUs."""
    return quota.to_bytes(4, "little") + sum(1 << number for number in numbers).to_bytes(16, "little")


@pytest.mark.parametrize(
    ("identities", "ranks_per_node", "nodes", "hosts"),
    [
        ([A], None, ((0,),), 1),
        ([A, A, A], None, ((0, 1, 2),), 1),
        ([A, B], None, ((0,), (1,)), 2),
        ([B, A, B, A], None, ((0, 2), (1, 3)), 2),
        ([A, B, B, C, A], None, ((0, 4), (1, 2), (3,)), 3),
        ([A] * 6, 2, ((0, 1), (2, 3), (4, 5)), 1),
        ([A] * 5, 3, ((0, 1, 2), (3, 4)), 1),
        ([A] * 3, 8, ((0, 1, 2),), 1),
        ([A, B, A, B, A], 2, ((0, 2), (1, 3), (4,)), 2),
    ],
)
def test_nodes(identities, ranks_per_node, nodes, hosts):
    for rank in range(len(identities)):
        found = detect(rank, identities, ranks_per_node)
        assert found.nodes == nodes
        assert found.hosts == hosts
        assert found.node_sizes == tuple(map(len, nodes))
        assert (found.rank, found.size) == (rank, len(identities))
        assert nodes[found.node][found.local_rank] == rank


def test_hosts():
    found = [detect(rank, [B, A, B, B, A], ranks_per_node=1) for rank in range(5)]
    assert [one.host_rank for one in found] == [0, 0, 1, 2, 1]
    assert {one.host_sizes for one in found} == {(3, 2)}


def test_gpus():
    names = ["GPU-1", "GPU-2", "GPU-1"]
    found = [detect(rank, [A] * 3, gpus=names) for rank in range(3)]
    assert [one.ranks_on_my_gpu for one in found] == [(0, 2), (1,), (0, 2)]
    assert found[1].gpus == ("GPU-1", "GPU-2", "GPU-1")
    without = detect(0, [A] * 3)
    assert (without.gpus, without.ranks_on_my_gpu) == (None, ())
    with pytest.raises(ValueError, match="detect: 3 ranks, but 2 names of GPUs"):
        detect(0, [A] * 3, gpus=names[:2])


def test_nics(tmp_path):
    assert nics(tmp_path) == []
    for name in ("infiniband/mlx5_1", "infiniband/mlx5_0", "cxi/cxi0", "net/eth0"):
        (tmp_path / "sys/class" / name).mkdir(parents=True)
    assert nics(tmp_path) == ["cxi0", "mlx5_0", "mlx5_1"]
    assert hardware(tmp_path)["nics"] == nics(tmp_path)


@given(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=40), st.none() | st.integers(1, 9), st.data())
def test_nodes_are_a_partition_that_all_ranks_agree_on(identities, ranks_per_node, data):
    rank = data.draw(st.integers(0, len(identities) - 1))
    found, first = detect(rank, identities, ranks_per_node), detect(0, identities, ranks_per_node)
    assert found.nodes == first.nodes
    assert sorted(other for node in found.nodes for other in node) == list(range(len(identities)))
    assert [node[0] for node in found.nodes] == sorted(node[0] for node in found.nodes)
    for node in found.nodes:
        assert len({identities[other] for other in node}) == 1
        assert list(node) == sorted(node)
        assert len(node) <= (ranks_per_node or len(identities))
    assert found.members == found.nodes[found.node]
    for node, owner in zip(found.nodes, found.owners, strict=True):
        assert owner == (node[found.local_rank] if found.local_rank < len(node) else -1)


@pytest.mark.parametrize(
    ("identities", "cores", "expected", "oversubscribed"),
    [
        ([A] * 4, 4, 4, False),
        ([A] * 5, 4, 4, True),
        ([A, A, B, B], 2, 2, False),
        ([A] * 2, [cpus(0), cpus(1)], 2, False),  # each rank bound to a CPU of its own
        ([A] * 2, [cpus(3), cpus(3)], 1, True),
        ([A] * 3, [cpus(*range(64), quota=2)] * 3, 2, True),
        ([A] * 2, [cpus(*range(64), quota=2)] * 2, 2, False),
        ([A, A, B], [cpus(0, 1), cpus(0, 1), cpus(7)], 1, False),
        ([A, B, B], [cpus(0, 1), cpus(7), cpus(7)], 1, True),
    ],
)
def test_cores(identities, cores, expected, oversubscribed):
    found = detect(0, identities, None, cores)
    assert (found.cores, found.oversubscribed) == (expected, oversubscribed)


def test_virtual_nodes_share_the_cores_of_their_host():
    assert detect(0, [A] * 4, 2, 3).oversubscribed
    assert not detect(0, [A] * 4, 2, 4).oversubscribed


@pytest.mark.parametrize(
    ("rank", "ranks_per_node", "cores", "message"),
    [
        (2, None, 1, "no rank 2 among 2"),
        (-1, None, 1, "no rank -1"),
        (0, 0, 1, "ranks_per_node should be 1 or more, got 0"),
        (0, None, [cpus(0)], "2 ranks, but usable_cpus of 1"),
    ],
)
def test_refused(rank, ranks_per_node, cores, message):
    with pytest.raises(ValueError, match=message):
        detect(rank, [A, A], ranks_per_node, cores)


def test_a_topology_cannot_be_changed_and_shows_itself():
    found = detect(1, [A, A, B])
    with pytest.raises(AttributeError):
        found.rank = 0
    assert repr(found) == "<Topology: rank 1 of 3, node 0 of 2 (sizes 2, 1), 2 hosts of 1 cores>"


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_usable_cpus_are_the_affinity(tmp_path):
    expected = len(os.sched_getaffinity(0))
    assert detect(0, [A], None, [usable_cpus(tmp_path)]).cores == expected


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "100000 100000\n"},
        {"sys/fs/cgroup/cpu.max": "5000 100000\n"},
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "90000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
    ],
    ids=["limit", "less than one", "of a parent", "version 1"],
)
def test_a_quota_limits_the_cores(tmp_path, files):
    write(tmp_path, files)
    assert detect(0, [A], None, [usable_cpus(tmp_path)]).cores == 1
    assert hardware(tmp_path)["usable_cpus"] == 1


@pytest.mark.parametrize("text", ["max 100000\n", "6400000 100000\n"])
def test_a_wide_quota_limits_nothing(tmp_path, text):
    write(tmp_path, {"sys/fs/cgroup/cpu.max": text})
    assert detect(0, [A], None, [usable_cpus(tmp_path)]).cores == min(len(os.sched_getaffinity(0)), 64)


CPU = "sys/devices/system/cpu"
MACHINE = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU of 2 GHz\nflags\t\t: fpu avx2 sse avx512f\n\nprocessor\t: 1\n",
    "proc/meminfo": "MemFree: 1 kB\nMemTotal:       2048 kB\n",
    f"{CPU}/online": "0-3,8\n",
    f"{CPU}/cpu0/topology/thread_siblings_list": "0,2\n",
    f"{CPU}/cpu1/topology/thread_siblings_list": "1,3\n",
    f"{CPU}/cpu2/topology/thread_siblings_list": "0,2\n",
    f"{CPU}/cpu0/cache/index0/size": "48K\n",
    f"{CPU}/cpu0/cache/index3/size": "32M\n",
    "sys/devices/system/node/online": "0-1\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 5\n",
    "proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 6\n",
}


def test_hardware_is_read_from_proc_and_sys(tmp_path):
    write(tmp_path, MACHINE)
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = hardware(tmp_path)
    shm = os.statvfs(tmp_path / "dev/shm")
    assert found.pop("shm_free_bytes") > 0
    assert found == {
        "cpu_model": "A CPU of 2 GHz",
        "cpus": 5,
        "usable_cpus": len(os.sched_getaffinity(0)),
        "physical_cores": 2,
        "numa_nodes": 2,
        "cpu_features": ["avx2", "avx512f"],
        "cache_bytes": 32 << 20,
        "memory_bytes": 2 << 20,
        "shm_bytes": shm.f_frsize * shm.f_blocks,
        "gpus": ["NVIDIA H200", "NVIDIA H200"],
        "gpu_driver": "580.95.05",
        "nics": None,
    }


def test_what_is_not_told_is_none(tmp_path):
    found = hardware(tmp_path)
    assert found.pop("usable_cpus") == len(os.sched_getaffinity(0))
    assert set(found.values()) == {None}


def test_hardware_of_this_host():
    found = hardware()
    assert found["memory_bytes"] >= 1 << 20
    assert found["usable_cpus"] <= len(os.sched_getaffinity(0)) <= found["cpus"]

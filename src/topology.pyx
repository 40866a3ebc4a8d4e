# cython: language_level=3
"""Where the ranks are: which share a node, and what this host has. The first part is pure: equal in, equal out."""

import os
import re
import struct
from pathlib import Path

cdef object QUOTA = struct.Struct("<I")
cdef tuple NICS = ("infiniband", "cxi")  # folders of /sys/class


cdef class Topology:
    """The nodes of a communicator, seen from one rank. What depends on the rank: `rank`, `node`, `local_rank`,
    `members`, `owners`, `host_rank`, `ranks_on_my_gpu`; all else is equal on all ranks.

    Attributes
    ----------
    rank, size
        Of the communicator.
    nodes
        World ranks by node, ordered by the first rank of each node; ranks of a node share memory.
    node, local_rank
        Which of `nodes` holds this rank, and where.
    members
        World ranks of this rank's node.
    owners
        World ranks at this rank's place in each node; -1 for a node that is too small to have one.
    node_sizes
        How many ranks each node has.
    hosts
        How many hosts there are; fewer than nodes if ``ranks_per_node`` splits hosts.
    host_sizes
        How many ranks each host has, ordered by the first rank of each.
    host_rank
        Which of the ranks of its host this one is.
    gpus
        The GPU of every rank, or None.
    ranks_on_my_gpu
        World ranks that share the GPU of this one, itself included; empty without GPUs.
    cores
        The CPUs that the ranks of a host may use together; the least of any host.
    oversubscribed
        Whether some host has more ranks than such CPUs.
    """

    cdef readonly int rank, size, node, local_rank, hosts, host_rank, cores
    cdef readonly tuple nodes, members, owners, node_sizes, host_sizes, gpus, ranks_on_my_gpu
    cdef readonly bint oversubscribed
    cdef tuple identities

    def __repr__(self):
        return (
            f"<Topology: rank {self.rank} of {self.size}, node {self.node} of {len(self.nodes)} (sizes "
            f"{', '.join(map(str, self.node_sizes))}), {self.hosts} hosts of {self.cores} cores>"
        )


def detect(rank, identities, ranks_per_node=None, cores=1, gpus=None):
    """Return the topology that follows from facts which all ranks have exchanged.

    Parameters
    ----------
    rank
        This rank.
    identities
        `nvcoll._bootstrap.host_identity` of every rank: equal where ranks are on one host.
    ranks_per_node
        Split the ranks of each host, in rank order, into nodes of so many; the last may have fewer. None: do not.
    cores
        CPUs that the ranks of a host may use: a number, or `usable_cpus` of every rank.
    gpus
        A name for the GPU of every rank that no other GPU anywhere has, such as its UUID; None: there are none.

    Returns
    -------
    Topology

    Raises
    ------
    ValueError
        `rank` is none of those with an identity, `ranks_per_node` is below 1, or `cores` or `gpus` has another length.
    """
    if not 0 <= rank < len(identities):
        raise ValueError(f"detect: there is no rank {rank} among {len(identities)}")
    if ranks_per_node is not None and ranks_per_node < 1:
        raise ValueError(f"detect: ranks_per_node should be 1 or more, got {ranks_per_node}")
    if gpus is not None and len(gpus) != len(identities):
        raise ValueError(f"detect: {len(identities)} ranks, but {len(gpus)} names of GPUs")
    hosts = _alike(identities)
    nodes = [tuple(part) for ranks in hosts for part in _split(ranks, ranks_per_node or len(ranks))]
    by_host = [_cores_of(ranks, cores, len(identities)) for ranks in hosts]
    return _describe(rank, identities, hosts, nodes, by_host, gpus)


def part(Topology whole, rank, ranks):
    """Return the topology of some of the ranks of another one, on the same nodes.

    Parameters
    ----------
    whole
        The topology of all of them.
    rank
        This rank, among the fewer.
    ranks
        Of each of the fewer, its rank in `whole`.

    Returns
    -------
    Topology
    """
    numbers = {member: number for number, node in enumerate(whole.nodes) for member in node}
    identities = [whole.identities[member] for member in ranks]
    hosts, nodes = _alike(identities), [tuple(node) for node in _alike([numbers[member] for member in ranks])]
    gpus = None if whole.gpus is None else [whole.gpus[member] for member in ranks]
    return _describe(rank, identities, hosts, nodes, [whole.cores] * len(hosts), gpus)


def _alike(values):
    """Return the ranks that have each of the values, in the order in which these come first."""
    found = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return list(found.values())


def _describe(rank, identities, hosts, nodes, by_host, gpus):
    cdef Topology self = Topology.__new__(Topology)
    self.identities = tuple(identities)
    self.rank, self.size, self.hosts = rank, len(identities), len(hosts)
    self.nodes = tuple(sorted(nodes))
    self.node_sizes = tuple(len(node) for node in self.nodes)
    self.node = next(number for number, node in enumerate(self.nodes) if rank in node)
    self.members = self.nodes[self.node]
    self.local_rank = self.members.index(rank)
    self.owners = tuple(node[self.local_rank] if self.local_rank < len(node) else -1 for node in self.nodes)
    self.host_sizes = tuple(len(ranks) for ranks in hosts)
    self.host_rank = next(ranks.index(rank) for ranks in hosts if rank in ranks)
    self.gpus = None if gpus is None else tuple(gpus)
    self.ranks_on_my_gpu = () if gpus is None else tuple(r for r, gpu in enumerate(gpus) if gpu == gpus[rank])
    self.cores = min(by_host)
    self.oversubscribed = any(len(ranks) > available for ranks, available in zip(hosts, by_host))
    return self


def _split(ranks, length):
    return [ranks[first:first + length] for first in range(0, len(ranks), length)]


def _cores_of(ranks, cores, size):
    """Return how many CPUs the ranks of one host may use together: launchers may bind each rank to CPUs of its own."""
    if isinstance(cores, int):
        return cores
    if len(cores) != size:
        raise ValueError(f"detect: {size} ranks, but usable_cpus of {len(cores)}")
    together, quota = 0, 0
    for rank in ranks:
        quota = max(quota, QUOTA.unpack_from(cores[rank])[0])
        together |= int.from_bytes(cores[rank][QUOTA.size:], "little")
    return max(1, min(quota, together.bit_count()))


def usable_cpus(root="/"):
    """Return which CPUs this process may use, as bytes for `detect`: its control group's quota, and a bit a CPU."""
    mask = sum(1 << cpu for cpu in os.sched_getaffinity(0))
    quota = _quota(Path(root))
    return QUOTA.pack(0xFFFFFFFF if quota is None else quota) + mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def nics(root="/"):
    """Return the names of the network adapters that NVSHMEM can use: InfiniBand, RoCE and EFA, and Slingshot."""
    return sorted(entry.name for kind in NICS for entry in (Path(root) / "sys/class" / kind).glob("*"))


def hardware(root="/"):
    """Return what ``nvcoll info`` tells of this host, from ``/proc`` and ``/sys``; None stands for what they lack.

    Parameters
    ----------
    root
        The directory that stands for ``/``.

    Returns
    -------
    dict
        cpu_model; cpus (online), usable_cpus (by affinity and quota), physical_cores, numa_nodes; cpu_features (vector
        extensions); cache_bytes (the largest cache of CPU 0); memory_bytes, shm_bytes, shm_free_bytes; gpus (models),
        gpu_driver; nics (adapters that remote memory can be reached through).
    """
    root = Path(root)
    shm = _file_system(root / "dev/shm")
    return {
        "cpu_model": _cpuinfo(root, "model name"),
        "cpus": _cpu_count(root, "sys/devices/system/cpu/online"),
        "usable_cpus": _cores_of([0], [usable_cpus(root)], 1),
        "physical_cores": _physical_cores(root),
        "numa_nodes": _cpu_count(root, "sys/devices/system/node/online"),
        "cpu_features": _features(root),
        "cache_bytes": _largest_cache(root),
        "memory_bytes": _memory(root),
        "shm_bytes": None if shm is None else shm.f_frsize * shm.f_blocks,
        "shm_free_bytes": None if shm is None else shm.f_frsize * shm.f_bavail,
        "gpus": _gpus(root),
        "gpu_driver": _matched(root / "proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+\.[\d.]+)\s"),
        "nics": nics(root) or None,
    }


def _text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _matched(path, pattern):
    found = re.search(pattern, _text(path) or "", re.MULTILINE)
    return None if found is None else found[1].strip()


def _cpuinfo(root, field):
    return _matched(root / "proc/cpuinfo", rf"^{field}\s*:\s*(.*)$")


def _cpu_count(root, name):
    """Count a list such as 0-3,8."""
    text = _text(root / name)
    if text is None or not text.strip():
        return None
    ends = [part.partition("-") for part in text.strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def _physical_cores(root):
    siblings = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({_text(path) for path in siblings}) or None


def _features(root):
    flags = _cpuinfo(root, "(?:flags|Features)")
    if flags is None:
        return None
    known = "sse4_2 avx avx2 avx512f avx512_bf16 avx512_fp16 f16c asimd sve sve2 bf16".split()
    return [name for name in known if name in flags.split()]


def _largest_cache(root):
    sizes = [_text(path) for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KM])\s*", size) for size in sizes if size is not None]
    return max((int(size[1]) << {"K": 10, "M": 20}[size[2]] for size in found if size is not None), default=None)


def _memory(root):
    kibibytes = _matched(root / "proc/meminfo", r"^MemTotal:\s*(\d+) kB$")
    return None if kibibytes is None else int(kibibytes) << 10


def _file_system(path):
    try:
        return os.statvfs(path)
    except OSError:
        return None


def _gpus(root):
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    return [_matched(path, r"^Model:\s*(.*)$") for path in files] or None


def _quota(root):
    """Return how many CPUs the control groups allow, at least 1, or None if they set no limit."""
    top = root / "sys/fs/cgroup"
    mine = top / (_matched(root / "proc/self/cgroup", r"^0::/(.*)$") or "")
    groups = [group for group in (mine, *mine.parents) if group.is_relative_to(top)]
    limits = [(_text(group / "cpu.max") or "max 1").split()[:2] for group in groups]
    limits.append([_text(top / f"cpu/cpu.cfs_{name}_us") or "-1" for name in ("quota", "period")])  # version 1
    allowed = [-(-int(quota) // int(period)) for quota, period in limits if quota != "max" and int(quota) > 0]
    return max(1, min(allowed)) if allowed else None

"""What the hardware gives: a launch of nothing, an exchange of nothing, and a copy between two GPUs."""

import ctypes
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from nvcoll._plan import DevicePlan
from nvcoll.backends import driver as nvidia
from nvcoll.cli.bench.gpu.clock import CALLS, ExchangingRanks
from nvcoll.cli.bench.gpu.stage import Stage
from nvcoll.jit_cuda import overlaps

EMPTY = b".version 6.5\n.target sm_75\n.address_size 64\n.visible .entry empty()\n{\n  ret;\n}\n\0"
EXCHANGE = """
.version 7.8
.target {target}
.address_size 64
.visible .entry exchange(.param .u64 mine, .param .u64 theirs)
{{
  .reg .u64 here, there, number, failed, turn, seen, polls;
  .reg .pred gave_up, missing, again;
  ld.param.u64 here, [mine];
  ld.param.u64 there, [theirs];
  {overlap}
  ld.global.v2.u64 {{number, failed}}, [here+128];
  add.u64 number, number, 1;
  and.b64 turn, number, 1;
  shl.b64 turn, turn, 6;
  add.u64 there, there, turn;
  st.relaxed.sys.global.u64 [there], number;
  st.global.u64 [here+128], number;
  setp.ne.u64 gave_up, failed, 0;
  @gave_up ret;
  add.u64 turn, here, turn;
  mov.u64 polls, 0;
look:
  ld.relaxed.sys.global.u64 seen, [turn];
  add.u64 polls, polls, 1;
  setp.ne.u64 missing, seen, number;
  setp.lt.and.u64 again, polls, {most}, missing;
  @again bra look;
  @missing st.global.u64 [here+136], number;
  st.global.u64 [here+192], seen;
  st.relaxed.sys.global.u64 [turn], 0;
  ret;
}}
"""
"""A kernel that counts its calls, stores the number where another rank looks, and waits for that of the same rank.

Two words take turns, for the other rank may be a call ahead; who has seen a number clears it and stores it elsewhere,
as calls do. The parameters are the first fields of a plan. A call that has waited too long says so behind its own
number, and later ones do not wait.
"""
GAVE_UP, WORDS = 17, 32  # the word that says so, and all words
OVERLAP = "griddepcontrol.wait; griddepcontrol.launch_dependents;"
MOST_POLLS = 10_000_000  # some seconds, should the other rank have died
BATCHES = 20
COPY_BYTES, COPIES = 256 << 20, 10


def bare_launch(stage: Stage) -> float:
    """Return the seconds of the host for a launch of an empty kernel by the driver: median over batches of calls.

    It is called through ctypes, whose share is about half a microsecond.

    Raises
    ------
    RuntimeError
        The driver refused.
    """
    driver = nvidia.library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _succeed(driver, "cuModuleLoadData", ctypes.byref(module), EMPTY)
    _succeed(driver, "cuModuleGetFunction", ctypes.byref(function), module, b"empty")
    one = ctypes.c_uint(1)
    arguments = (function, *[one] * 6, ctypes.c_uint(0), ctypes.c_void_p(stage.handle), None, None)
    launch = driver.cuLaunchKernel
    batches = []
    for _ in range(BATCHES):
        _succeed(driver, "cuLaunchKernel", *arguments)
        start = time.perf_counter()
        for _ in range(CALLS):
            launch(*arguments)
        batches.append((time.perf_counter() - start) / CALLS)
        stage.synchronize()
    _succeed(driver, "cuModuleUnload", module)
    return statistics.median(batches)


def _succeed(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def least_call(stage: Stage, ranks: ExchangingRanks, gpus: Sequence[Mapping[str, Any]]) -> float | None:
    """Measure kernels that exchange a word with another rank, in a CUDA graph; collective.

    A call that waits for another rank, and ends before the next one begins, takes no less. Ranks do it in pairs; one
    that is left over does it with itself.

    Parameters
    ----------
    stage
        This rank's.
    ranks
        All ranks.
    gpus
        `Stage.facts` of all ranks.

    Returns
    -------
    float or None
        Seconds of a call, slowest rank; None where a rank cannot store to the other one's memory, shares its GPU, or
        has not heard of the other one for too long.
    """
    comm = stage.comm
    if comm.size == 1 or len({gpu["uuid"] for gpu in gpus}) < comm.size:
        return None
    world = comm._world
    words = comm.zeros(WORDS, "int64")
    other = comm.rank ^ 1
    theirs = world.planner.area.counterpart(words.address, other if other < comm.size else comm.rank)
    seconds = None
    if all(ranks.exchange(theirs != 0 and not world.planner.remote)):
        with world.device:
            early = world.planner.overlap and overlaps(world.device.arch)
            module = nvidia.load_module(_exchange(early).encode() + b"\0")
            plan = DevicePlan(world.planner.state, module.function("exchange"), {}, 1, 1, module, overlap=early)
        graph = stage.capture(partial(plan.run, words.address, theirs, stage.handle), CALLS)
        ranks.barrier()
        replays = stage.replay(graph, BATCHES)
        if not any(ranks.exchange(int(words.copy_to()[GAVE_UP]))):
            seconds = max(ranks.exchange(statistics.median(replays))) / CALLS
    words.free()
    return seconds


def _exchange(early: bool) -> str:
    """Return the text of the kernel, which may be brought in while the one before it runs."""
    target, overlap = ("sm_90", OVERLAP) if early else ("sm_75", "")
    return EXCHANGE.format(target=target, overlap=overlap, most=MOST_POLLS)


def copy_bandwidth(stage: Stage, gpus: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Measure copies between this GPU and another rank's, both ways at once.

    Parameters
    ----------
    stage
        This rank's.
    gpus
        `Stage.facts` of all ranks, this one's first.

    Returns
    -------
    tuple of float and str
        GB/s (1e9 bytes) of the slower way, and between which GPUs; None and why there is none.
    """
    torch = stage.torch
    here = {
        str(torch.cuda.get_device_properties(ordinal).uuid): ordinal for ordinal in range(torch.cuda.device_count())
    }
    others = [gpu["uuid"] for gpu in gpus if gpu["uuid"] != gpus[0]["uuid"]]
    if not others:
        return None, "all ranks share one GPU"
    seen = [here[uuid] for uuid in others if uuid in here]
    if not seen:
        return None, "rank 0 sees no GPU of another rank"
    mine, other = stage.device, torch.device("cuda", seen[0])
    ways = [_Way(torch, mine, other), _Way(torch, other, mine)]
    for way in ways:
        way.copy()
    for device in (mine, other):
        torch.cuda.synchronize(device)
    for way in ways:
        way.start()
    for _ in range(COPIES):
        for way in ways:
            way.copy()
    for way in ways:
        way.stop()
    slowest = max(way.seconds() for way in ways)
    torch.cuda.set_device(mine)
    return COPY_BYTES * COPIES / slowest / 1e9, f"GPUs {mine.index} and {other.index}"


class _Way:
    """Copies from one GPU to another, on streams of their own: torch makes both GPUs' current streams wait."""

    def __init__(self, torch: Any, source: Any, target: Any) -> None:
        self.torch = torch
        self.source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=source)
        self.target = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=target)
        self.streams = torch.cuda.Stream(source), torch.cuda.Stream(target)
        for device in (source, target):  # the zeros were written on other streams
            torch.cuda.synchronize(device)

        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self.begin.record(self.streams[0])

    def stop(self) -> None:
        self.end.record(self.streams[0])

    def copy(self) -> None:
        with self.torch.cuda.stream(self.streams[1]), self.torch.cuda.stream(self.streams[0]):
            self.target.copy_(self.source, non_blocking=True)

    def seconds(self) -> float:
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) * 1e-3

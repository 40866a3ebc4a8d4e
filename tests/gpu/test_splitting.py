"""Communicators made from others on GPUs: side by side, in graphs, of ranks near and far, and their ends."""

import time

import numpy as np
import pytest

import nvcoll
from nvcoll import Request, world_cuda
from nvcoll.backends import driver
from nvcoll.planning import candidates
from tests.gpu.test_graphs import Graph
from tests.gpu.test_processes import ENV, ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Each communicator takes 128 MiB."""
    monkeypatch.setenv("NVCOLL_HEAP", "1G")


def expected(values, ranks, times):
    """What in-place sums of equal values give: those of int32, which wrap around."""
    return (values.astype(np.int64) * pow(ranks, times, 1 << 32)).astype(np.uint32).view(np.int32)


@pytest.mark.usefixtures("compiled")
class TestEmulated:
    @pytest.mark.parametrize("algorithm", candidates())
    def test_parts_side_by_side(self, algorithm):
        """Odd and even ranks of two nodes each call their own, and now and then all together."""

        def main(comm):
            part = comm.Split(comm.rank % 2, -comm.rank)
            x, y = comm.array(start := np.arange(1, 5001, dtype=np.int32)), part.array(start)
            reasons = {one.name: one.reason for one in part.explain("allreduce", x.nbytes, np.int32).candidates}
            if reasons[algorithm] is not None:
                return None
            for turn in range(40):
                part.Allreduce(x, algorithm=algorithm)
                if turn % 8 == 0:
                    comm.Allreduce(y)
            part.Barrier()
            return part.size, start, x.copy_to(), y.copy_to()

        found = nvcoll.emulate(7, [3, 4], device=0).run(main)
        assert any(found)
        for one in filter(None, found):
            size, start, x, y = one
            np.testing.assert_array_equal(x, expected(start, size, 40))
            np.testing.assert_array_equal(y, expected(start, 7, 5))

    def test_graphs_of_several_communicators(self):
        def main(comm):
            pair, dup = comm.Split(comm.rank // 2), comm.Dup()
            three = (comm, pair, dup)
            data = [comm.array(np.arange(1, 301, dtype=np.int32)) for _ in three]
            for one, x in zip(three, data, strict=True):
                one.Allreduce(x)
            comm.Barrier()
            with comm._world.device:
                graph = Graph(comm.stream, lambda: [one.Allreduce(x) for one, x in zip(three, data, strict=True)])
                comm.Barrier()
                for turn in range(300):
                    graph.replay()
                    if turn % 50 == 0:
                        dup.Allreduce(data[2])
                        driver.stream_synchronize(comm.stream)
            return [x.copy_to() for x in data]

        start = np.arange(1, 301, dtype=np.int32)
        for found in nvcoll.emulate(4, device=0).run(main):
            for x, ranks, times in zip(found, (4, 2, 4), (301, 301, 307), strict=True):
                np.testing.assert_array_equal(x, expected(start, ranks, times))

    def test_freed_memory_is_used_again(self):
        def main(comm):
            places = set()
            for _ in range(12):  # more than fit into the heap together
                part = comm.Split(comm.rank % 2)
                x = part.array(np.ones(1000, np.int32))
                part.Allreduce(x)
                places.add(x.__cuda_array_interface__["data"][0])
                assert x.copy_to().tolist() == [2] * 1000
                part.Free()
                assert x.freed
            return len(places)

        assert nvcoll.emulate(4, device=0).run(main) == [1] * 4

    def test_free_completes_requests(self):
        def main(comm):
            part, x = comm.Dup(), comm.array(np.full(1 << 20, comm.rank + 1, np.int32))
            requests = [part.Iallreduce(x) for _ in range(5)]
            part.Free()
            return Request.Waitall(requests), set(x.copy_to().tolist())

        assert nvcoll.emulate(3, device=0).run(main) == [(True, {6 * 3**4})] * 3

    def test_parts_come_and_go_beside_a_call_that_waits(self, monkeypatch):
        """What waits for all that runs on the GPU would wait for a kernel that waits for these very ranks."""
        monkeypatch.setenv("NVCOLL_TIMEOUT", "8")

        def main(comm):
            x, part = comm.array(np.ones(1000, np.int32)), comm.Split(comm.rank // 2)
            for one in (comm, part):
                one.Allreduce(x)
            comm.Barrier()
            if comm.rank == 2:
                comm.Allreduce(x)
            for _ in range(5 * (comm.rank < 2)):
                dup = part.Dup()
                dup.Allreduce(y := dup.array(np.ones(10, np.int32)))
                assert y.copy_to().tolist() == [2] * 10
                dup.Free()
            if comm.rank < 2:
                comm.Allreduce(x)
            return x.copy_to()[0]

        assert nvcoll.emulate(3, device=0).run(main) == [6 + 6 + 3] * 3

    def test_kernels_are_loaded_beside_a_part_that_waits(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_TIMEOUT", "8")
        world_cuda._shared_kernels.cache_clear()
        types = ["int32", "float32", "uint8", "float16", "int64"]

        def main(comm):
            part, random = comm.Split(comm.rank // 2), np.random.default_rng(comm.rank)
            data = [part.array(np.ones(100, kind)) for kind in types]
            found = []
            for turn in range(60):
                if comm.rank == 3:
                    time.sleep(random.uniform(0, 0.005))
                x = data[turn // 12 if comm.rank < 2 else 0]
                part.Allreduce(x, op=nvcoll.MAX if turn % 2 else nvcoll.MIN)
                found.append(int(x.copy_to()[-1]))
            return set(found)

        assert nvcoll.emulate(4, device=0).run(main) == [{1}] * 4

    def test_parts_with_different_kernels_side_by_side(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_TIMEOUT", "8")

        def main(comm):
            part, random = comm.Split(comm.rank % 2), np.random.default_rng(comm.rank)
            small = comm.rank % 2
            x = part.array(np.ones(1 << 16, np.float32) if small else np.ones(8 << 20, np.int8))
            for _ in range(100):
                time.sleep(random.uniform(0, 0.001))
                part.Allreduce(x, op=nvcoll.MAX, algorithm="one_shot" if small else None)
            return int(x.copy_to().max())

        assert nvcoll.emulate(8, device=0).run(main) == [1] * 8

    def test_after_a_run_a_part_is_of_no_use(self):
        part = nvcoll.emulate(2, device=0).run(lambda comm: comm.Dup())[0]
        for call in (part.Free, part.Barrier, part.Dup):
            with pytest.raises(nvcoll.StateError):
                call()

    def test_a_rank_that_does_not_come(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_TIMEOUT", "2")

        def main(comm):
            part = comm.Split(comm.rank // 2)
            x, told = comm.array(np.ones(100, np.float32)), None
            part.Allreduce(x)
            comm.Barrier()
            if comm.rank != 3:
                part.Allreduce(x)
            if comm.rank == 2:
                with pytest.raises(nvcoll.TimeoutError) as caught:
                    part.Barrier()
                told = str(caught.value)
            return told

        told = nvcoll.emulate(4, device=0).run(main)
        assert told[:2] == [None, None]
        assert "on the GPU of rank 0 of emulated rank 2.Split(1)" in told[2]
        assert "did not arrive: rank 1." in told[2]


EVERYTHING = """
import sys
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
from tests.gpu.kernels import FAR_PAIRS, PAIRS
from nvcoll.ops import OPS
from tests.oracle import assert_reduced, random_data

# Ranks (1, 3, ...) come into a part in which no rank has the number that NVSHMEM knows it by.
parts = [comm, comm.Dup(), comm.Split(comm.rank % 2, -comm.rank), comm.Split_type(nvcoll.COMM_TYPE_SHARED)]
parts.append(parts[2].Dup())
pairs = (FAR_PAIRS if comm._world.planner.remote else PAIRS)[: int(sys.argv[1])]
calls = 0
for datatype, op in pairs:
    for count in map(int, sys.argv[2:]):
        for part in parts:
            names = [one.name for one in part.explain("allreduce", 8, datatype).candidates if one.reason is None]
            for name in names if part.size > 1 else [None]:
                seeds = [[calls, rank] for rank in range(part.size)]
                given = [random_data(np.random.default_rng(seed), datatype, op, count) for seed in seeds]
                owner = parts[calls % len(parts)]  # memory of one is symmetric to another where both have it
                x = (owner if owner is comm or owner is part else part).array(given[part.rank], datatype)
                part.Allreduce(x, op=OPS[op], algorithm=name)
                assert_reduced(x.copy_to(), given, op, datatype)
                calls += 1
        comm.Barrier()
remote = [part._world.planner.remote for part in parts]
while len(parts) > 1:
    parts.pop(1).Free()
print("right", calls > 10, remote)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
class TestProcesses:
    @pytest.mark.parametrize(("ranks", "counts"), [(2, (5, 1021, 65537)), (4, (5, 20_011))])
    def test_parts_of_ranks_that_reach_each_other(self, run_ranks, ranks, counts):
        env = ENV | {"PYTHONPATH": ROOT, "NVCOLL_HEAP": "1G"}
        told = run_ranks(EVERYTHING, ranks, 2, *counts, timeout=115, env=env)
        assert told.stdout == [f"right True {[False] * 5}\n"] * ranks

    @pytest.mark.usefixtures("compiled_far")
    def test_parts_of_ranks_of_which_some_are_far(self, run_ranks):
        env = ENV | {"PYTHONPATH": ROOT, "NVCOLL_HEAP": "1G", "NVCOLL_RANKS_PER_NODE": "2"}
        told = run_ranks(EVERYTHING, 4, 1, 5, 20_011, timeout=115, env=env)
        assert told.stdout == [f"right True {[True, True, True, False, True]}\n"] * 4

    def test_two_communicators_on_two_streams(self, run_ranks, two_gpus):
        """Each may fill the GPU, so they go one after the other: whatever the streams, they end."""
        program = """
        import numpy as np, nvcoll
        from nvcoll import COMM_WORLD as comm
        from nvcoll.backends import driver
        dup = comm.Dup()
        x, y = (one.full(8 << 20, comm.rank + 1, "int32") for one in (comm, dup))
        sums = [one.zeros(8 << 20, "int32") for one in (comm, dup)]
        with comm._world.device:
            first, second = driver.stream_create(), driver.stream_create()
        for turn in range(300):
            comm.Allreduce(x, sums[0], stream=first)
            dup.Allreduce(y, sums[1], stream=second)
            if turn % 100 == 99:
                dup.Barrier()
        print(*{int(z) for one in sums for z in np.unique(one.copy_to())})
        """
        told = run_ranks(program, 2, timeout=60, env=ENV | {"NVCOLL_HEAP": "1G"})
        assert told.stdout == ["3\n"] * 2

    @pytest.mark.parametrize("each", [None, "1"], ids=["near", "far"])
    def test_memory_passes_from_one_to_another(self, run_ranks, request, each):
        """As soon as a communicator is freed, or a buffer dropped in the middle of a call of another one."""
        if each:
            request.getfixturevalue("compiled_far")
        program = """
        import numpy as np, nvcoll
        from nvcoll import COMM_WORLD as comm
        marks = comm.full(1 << 20, 77, "int32")
        for turn in range(30):
            part = comm.Split(0, -comm.rank)
            for name in ("nvrar/low_latency", "nvrar/simple", None):
                x = comm.full(1 << 20, 1, "int32")
                part.Allreduce(x, algorithm=name)
            del x
            y = part.full(1 << 20, 5, "int32")
            z = comm.full(1 << 20, 6, "int32")
            part.Allreduce(y)
            part.Free()
            w = comm.full(32 << 20, 9, "int32")
            comm.Allreduce(z)
            assert set(np.unique(w.copy_to())) == {9} and set(np.unique(z.copy_to())) == {6 * comm.size}
            w.free()
        print(*np.unique(marks.copy_to()))
        """
        env = ENV | {"NVCOLL_HEAP": "1G"} | ({"NVCOLL_RANKS_PER_NODE": each} if each else {})
        assert run_ranks(program, 2, timeout=100, env=env).stdout == ["77\n"] * 2

    def test_a_part_that_failed_is_freed(self, run_ranks):
        program = """
        import numpy as np, nvcoll
        from nvcoll import COMM_WORLD as comm
        part = comm.Dup()
        x = comm.full(1000, 1, "int32")
        part.Allreduce(x)
        comm.Barrier()
        if comm.rank == 0:
            part.Allreduce(x)
        try:
            part.Free()
        except nvcoll.TimeoutError as error:
            print("Free" in str(error), "of COMM_WORLD.Dup()" in str(error))
        y = comm.full(1000, 1, "int32")
        comm.Allreduce(y)
        print(*np.unique(y.copy_to()))
        """
        ranks = run_ranks(program, 2, timeout=60, env=ENV | {"NVCOLL_HEAP": "1G", "NVCOLL_TIMEOUT": "4"})
        assert ranks.stdout == ["True True\n2\n", "2\n"]

    def test_none_are_made_while_a_graph_is_captured(self, run_ranks):
        pytest.importorskip("torch")
        program = """
        import torch, nvcoll
        from nvcoll import COMM_WORLD as comm
        torch.cuda.set_device(comm._world.device.ordinal)
        dup, x = comm.Dup(), torch.ones(1000, device="cuda")
        dup.Allreduce(x.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in (comm.Dup, comm.Split, dup.Free):
                try:
                    call()
                except nvcoll.StateError as error:
                    print("captures a graph" in str(error))
            dup.Allreduce(x)
        graph.replay()
        torch.cuda.synchronize()
        print(int(x[0]))
        del graph
        dup.Free()
        """
        ranks = run_ranks(program, 2, timeout=60, env=ENV | {"NVCOLL_HEAP": "1G"})
        assert ranks.stdout == ["True\nTrue\nTrue\n2\n"] * 2

    @pytest.mark.parametrize("free", [True, False])
    def test_several_lives(self, run_ranks, free):
        program = f"""
        import numpy as np, nvcoll
        from nvcoll.backends import driver
        comm, kept, free = nvcoll.COMM_WORLD, [], []
        for life in range(3):
            comm.Barrier()
            with comm._world.device:
                free.append(driver.memory_info()[0])
            part = comm.Split(0, -comm.rank)
            x = part.full(1000, comm.rank + life)
            kept += [x, part]
            part.Allreduce(x)
            print(float(x.copy_to()[-1]))
            if {free}:
                part.Free()
            nvcoll.Finalize()
            assert x.freed and not part
        assert min(free) > free[0] - (128 << 20), free
        """
        told = run_ranks(program, 2, timeout=100, env=ENV | {"NVCOLL_HEAP": "1G"})
        assert [text.split() for text in told.stdout] == [["1.0", "3.0", "5.0"]] * 2

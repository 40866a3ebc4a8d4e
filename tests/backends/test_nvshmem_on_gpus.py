"""NVSHMEM's memory on GPUs."""

import pytest

REAL = """
import ctypes, os, sys
from nvcoll import _bootstrap, _topology, settings
from nvcoll.backends import driver
from nvcoll.backends.nvshmem import SymmetricMemory

values = settings.read()
exchange = _bootstrap.connect(values)
topology = _topology.detect(exchange.rank, exchange.allgather(_bootstrap.host_identity()))
cpus = os.sched_getaffinity(0)
for life in range(int(sys.argv[1])):
    memory = SymmetricMemory(exchange, topology, values)
    assert os.sched_getaffinity(0) == cpus
    with memory.device:
        mine = memory.address(memory.place)
        driver.memset(mine, 100 + exchange.rank, memory.extent)
        exchange.allgather(b"")
        seen = ctypes.create_string_buffer(2)
        for place in memory.members:  # every rank writes its number at its place in the heap of every other
            there = memory.address(place)
            assert there, f"rank {place} is out of reach"
            driver.copy(ctypes.addressof(seen), there + memory.extent - 1, 1)
            assert seen.raw[0] == 100 + place, (life, place, seen.raw)
            driver.copy(there + 64 * exchange.rank, mine + 4096, 1)
        exchange.allgather(b"")
        for place in memory.members:
            driver.copy(ctypes.addressof(seen), mine + 64 * place, 2)
            assert seen.raw == bytes([100 + place, 100 + exchange.rank]), (life, place, seen.raw)
        exchange.allgather(b"")
    shared = _topology.detect(0, [b""] * exchange.size, gpus=memory.gpus).ranks_on_my_gpu
    memory.close()
print(memory.extent, len(shared), driver.count())
exchange.close()
"""


@pytest.mark.gpu
@pytest.mark.slow
class TestReal:
    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_peers_write_to_each_other(self, run_ranks, n):
        ranks = run_ranks(REAL, n, 2, timeout=100, env={"NVCOLL_HEAP": "64M", "NVCOLL_TIMEOUT": "60"})
        for text in ranks.stdout:
            extent, shared, gpus = map(int, text.split()[-3:])
            assert extent == 64 << 20
            assert shared == -(-n // gpus)
        assert "no IB" not in ranks.stderr

    @pytest.mark.mpi
    def test_under_mpi(self, run_ranks):
        run_ranks(REAL, 2, 1, timeout=100, env={"NVCOLL_HEAP": "64M"}, launcher="mpiexec")

    def test_a_quarter_by_default(self, run_ranks):
        from nvcoll.backends import driver

        [text] = run_ranks(REAL, 1, 1, timeout=100).stdout
        assert int(text.split()[-3]) == driver.Device(0).nbytes // 4 // (2 << 20) * (2 << 20)

    def test_a_rank_that_dies_keeps_nobody(self, run_ranks):
        program = REAL.replace("    memory.close()", "    os._exit(3) if exchange.rank else memory.close()")
        ranks = run_ranks(program, 2, 1, timeout=100, env={"NVCOLL_HEAP": "64M"}, check=False)
        assert ranks.returncode != 0

    def test_beside_torch(self, run_ranks):
        pytest.importorskip("torch")
        program = (
            "import torch\nbefore = torch.ones(1000, device='cuda')\n"
            + REAL
            + "assert float((before + torch.ones(1000, device='cuda')).sum()) == 2000\n"
        )
        run_ranks(program, 2, 2, timeout=100, env={"NVCOLL_HEAP": "64M"})

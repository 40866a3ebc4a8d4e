"""How ranks start NVSHMEM, from what they tell each other."""

import dataclasses

import pytest

from nvcoll.backends.agreement import Facts, plan, size_of, uneven
from nvcoll.errors import AllocationError, BootstrapError

GIB = 1 << 30
RANK = Facts("GPU-0", 80 * GIB, 79 * GIB, "3.8.0", "/lib/nvshmem.so", 0, None, on_host=False, wired=False)


def rank(gpu, **changes):
    return dataclasses.replace(RANK, gpu=f"GPU-{gpu}", **changes)


class TestExtent:
    def test_a_quarter_of_a_gpu(self):
        assert plan([rank(0), rank(1)], [2], None).extent == 20 * GIB

    def test_the_ranks_of_a_gpu_share_the_quarter_and_the_least_is_everybodys(self):
        everyone = [rank(0), rank(1), rank(1), rank(0), rank(0), rank(1)]
        assert plan(everyone, [6], None).extent == 20 * GIB // 3 // (2 << 20) * (2 << 20)
        assert plan([rank(0), rank(1, total=16 * GIB, free=16 * GIB)], [2], None).extent == 4 * GIB

    def test_not_more_than_the_user_allows_nvshmem(self):
        assert plan([rank(0, limit=GIB + 5), rank(1)], [2], None).extent == GIB

    def test_the_users(self):
        assert plan([rank(0, limit=GIB)], [1], 5 * GIB + 1).extent == 5 * GIB

    def test_no_room(self):
        everyone = [rank(0), rank(0), rank(1, free=7 * GIB), rank(1)]
        text = (
            r"^NVSHMEM: the heaps of 2 ranks take 8589934592 bytes of the GPU of rank 2, 7516192768 are free; free some"
            " or lower NVCOLL_HEAP$"
        )
        with pytest.raises(AllocationError, match=text):
            plan(everyone, [4], 4 * GIB)
        on_host = [dataclasses.replace(facts, on_host=True) for facts in everyone]
        assert plan(on_host, [3], 4 * GIB).extent == 4 * GIB


class TestVariables:
    def test_alone_on_a_host_without_adapters(self):
        assert plan([rank(0), rank(1)], [2], GIB).variables == {
            "NVSHMEM_SYMMETRIC_SIZE": str(GIB + (2 << 20)),
            "NVSHMEM_MAX_MEMORY_PER_GPU": str(128 * GIB),
            "NVSHMEM_DISABLE_NVLS": "1",
            "NVSHMEM_REMOTE_TRANSPORT": "none",
        }

    @pytest.mark.parametrize(("wired", "hosts"), [(True, [2]), (False, [1, 1]), (True, [1, 1])])
    def test_where_a_network_may_be_needed_nvshmem_chooses(self, wired, hosts):
        assert "NVSHMEM_REMOTE_TRANSPORT" not in plan([rank(0), rank(1, wired=wired)], hosts, GIB).variables

    def test_large_heaps_get_address_space(self):
        everyone = [rank(0, total=500 * GIB, free=500 * GIB)]
        assert plan(everyone, [1], 100 * GIB).variables["NVSHMEM_MAX_MEMORY_PER_GPU"] == str(200 * GIB)


class TestRefusals:
    def test_versions_that_differ(self):
        everyone = [rank(0), rank(1), rank(2, library="3.4.5", library_path="/old.so")]
        with pytest.raises(BootstrapError) as caught:
            plan(everyone, [3], GIB)
        assert str(caught.value) == (
            "NVSHMEM: all ranks need one version, found 3.4.5 on rank 2 (/old.so), 3.8.0 on rank 0 (/lib/nvshmem.so); "
            "install one everywhere"
        )

    def test_begun_on_some_ranks_only(self):
        with pytest.raises(BootstrapError, match=r"it runs on rank 1 already and not on rank 0; start it on all"):
            plan([rank(0), rank(1, stage=2)], [2], GIB)

    def test_gpus_with_different_numbers_of_ranks(self):
        everyone = [rank(0), rank(1), rank(0)]
        with pytest.raises(BootstrapError, match=r"of ranks on every GPU of a host, got 2, 1; start as many"):
            plan(everyone, [3], GIB)
        assert plan([dataclasses.replace(facts, stage=2) for facts in everyone], [3], GIB).stage == 2  # it runs
        assert plan(everyone, [1, 1, 1], GIB).stage == 0  # hosts that share a GPU, each alone with it

    def test_hosts_of_different_sizes(self):
        text = "NVSHMEM needs the same number of ranks on every host, got 2, 1; start as many on each"
        assert uneven([2, 1]) == text
        assert uneven([3]) is uneven([2, 2]) is None
        everyone = [rank(0), rank(1), rank(2)]
        with pytest.raises(BootstrapError) as caught:
            plan(everyone, [2, 1], GIB)
        assert str(caught.value) == text
        running = [dataclasses.replace(facts, stage=2) for facts in everyone]
        assert plan(running, [2, 1], GIB).stage == 2  # whoever started it managed to


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        ("1024", 1024),
        ("256M", 256 << 20),
        ("1.5g", 3 << 29),
        ("2T", 2 << 40),
        ("much", None),
        ("G", None),
        ("1e999", None),
        ("", None),
    ],
)
def test_sizes_as_nvshmem_writes_them(text, size):
    assert size_of(text) == size

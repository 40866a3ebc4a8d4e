"""Every schedule becomes machine code that needs nothing of Numba; the tests that follow find it in the cache."""

import pytest

from nvcoll import jit, settings
from nvcoll.algorithms import ALGORITHMS
from nvcoll.planning import candidates

SCHEDULES = [*candidates(), *(f"{name}/simple" for name, one in ALGORITHMS.items() if one.verb != "allreduce")]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_compiles(name):
    compiler = jit.Compiler(settings.read().cache_dir)
    address = compiler.schedule(*name.split("/"))  # raises if the code needs more than memcpy and the like
    assert address
    assert compiler.schedule(*name.split("/")) == address
    assert list(settings.read().cache_dir.glob(f"{name.replace('/', '-')}-*.o"))

"""What the benchmark on GPUs asks of torch, as far as torch can answer without a GPU."""

import inspect

import numpy as np
import pytest

from nvcoll.cli.bench.gpu import stage
from nvcoll.errors import ArgumentError
from nvcoll.ops import DATATYPES

torch = pytest.importorskip("torch")

# Two ranks of nvcoll find each other's torch, whatever started them.
STORE = """
import sys
import torch
from nvcoll import COMM_WORLD as comm
from nvcoll.cli.bench.gpu.clock import ExchangingRanks
from nvcoll.cli.bench.gpu.peers import ProcessGroup

group = ProcessGroup(ExchangingRanks(comm), None)
tensor = torch.full((3,), comm.rank + 1.0)
group.distributed.all_reduce(tensor)
assert tensor.tolist() == [3.0] * 3, tensor
group.closers.append(lambda: print("closed", comm.rank))
group.close()
"""


@pytest.mark.parametrize("datatype", DATATYPES.values(), ids=list(DATATYPES))
def test_bytes_go_to_tensors_and_back(datatype):
    given = np.arange(-3, 4).astype(datatype.dtype)
    tensor = torch.zeros(given.size, dtype=getattr(torch, datatype.name))
    stage.to_device(given, tensor)
    if datatype.name != "bfloat16":
        assert np.array_equal(tensor.numpy(), given)
    else:
        assert tensor.tolist() == given.tolist()
    found = np.zeros_like(given)
    stage.to_host(tensor[1:], found[1:])
    assert np.array_equal(found[1:], given[1:])
    assert found[0] == 0


def test_process_group_over_our_exchange(run_ranks):
    ranks = run_ranks(STORE, 2, timeout=60)
    assert ranks.stdout == ["closed 0\n", "closed 1\n"]


def test_a_torch_without_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this one has CUDA")
    with pytest.raises(ArgumentError, match="needs a torch built for CUDA"):
        stage.load_torch()


def test_what_we_call_is_there():
    operators = torch.ops.symm_mem
    arguments = [argument.name for argument in operators.one_shot_all_reduce_out.default._schema.arguments]
    assert arguments == ["input", "reduce_op", "group_name", "out"]
    arguments = [argument.name for argument in operators.two_shot_all_reduce_.default._schema.arguments]
    assert arguments == ["input", "reduce_op", "group_name"]
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph).parameters
    assert {"wait_for_workers", "is_master"} <= set(
        torch.distributed.TCPStore.__init__.__doc__.replace(":", " ").split()
    )
    from torch.distributed import _symmetric_memory as symmetric

    assert list(inspect.signature(symmetric.rendezvous).parameters) == ["tensor", "group"]

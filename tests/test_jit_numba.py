"""What Numba is told by its own variables, and processors that lack something: errors, before Numba ends a process."""

import platform
import sys

import pytest

PROGRAM = """
import numpy as np, sys, nvcoll
x = np.ones(5, sys.argv[1])
try:
    nvcoll.emulate(2).run(lambda comm: comm.Allreduce(x.copy()))
except nvcoll.Error as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "NUMBA_DEBUGINFO", "NUMBA_ENABLE_PROFILING"])
def test_what_keeps_numba_from_making_kernels(run_command, tmp_path, variable):
    env = {"NVCOLL_CACHE_DIR": str(tmp_path), variable: "1"}
    status, output = run_command([sys.executable, "-c", PROGRAM, "float32"], env=env)
    assert status == 0, output
    assert output.startswith(
        f"ArgumentError {variable} is set, expected it unset while nvcoll compiles its kernels; run"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86 processors")
@pytest.mark.parametrize("datatype", ["float16", "float32"])
def test_processors_that_do_not_convert_halves(run_command, tmp_path, datatype):
    env = {"NVCOLL_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "x86-64"}
    status, output = run_command([sys.executable, "-c", PROGRAM, datatype], env=env)
    assert status == 0, output
    if datatype == "float16":
        assert output.startswith(
            "DatatypeError float16 needs instructions (F16C) which this processor lacks, or NUMBA_"
        )
    else:
        assert output == ""

"""What the tests of the examples share."""

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example():
    """Import an example by name: ``load_example("cgls")``; its neighbours are found, the environment is as before."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
            spec.loader.exec_module(module)
        return module

    return load

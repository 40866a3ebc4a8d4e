"""A communicator that another thread finalizes while this one prepares a call."""

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF


@pytest.mark.parametrize("call", [COMM_SELF.Barrier, lambda: COMM_SELF.Allreduce(np.ones(3))])
def test_finalized_while_a_call_is_planned(monkeypatch, call):
    """The call ends, and nothing of the world that is gone finds its way to the next one."""
    nvcoll.Finalize()
    planner = COMM_SELF._world.planner
    plan = planner.plan

    def plan_too_late(*given):
        made = plan(*given)
        nvcoll.Finalize()
        return made

    monkeypatch.setattr(planner, "plan", plan_too_late)
    with pytest.raises(nvcoll.StateError, match="this communicator was freed or finalized"):
        call()
    assert not COMM_SELF.alive
    call()

"""Communicators as objects: what they are called, what they are equal to and like, and what a copy is."""

import copy
import pickle

import numpy as np
import pytest

import nvcoll
from nvcoll import (
    COMM_NULL,
    COMM_SELF,
    COMM_TYPE_SHARED,
    CONGRUENT,
    IDENT,
    SIMILAR,
    UNDEFINED,
    UNEQUAL,
)
from nvcoll.errors import ArgumentError, StateError
from tests.test_splitting import refusal


class TestNames:
    def test_each_has_a_name_of_its_own(self):
        """It is the same on all ranks, whatever colors they gave before."""

        def main(comm):
            parts = [comm.Dup(), comm.Dup(), comm.Split(0 if comm.rank else UNDEFINED), comm.Split(0), comm.Dup()]
            refusal(comm.Dup if comm.rank else comm.Split)
            parts += [parts[1].Dup(), parts[1].Split(1), comm.Split_type(COMM_TYPE_SHARED), comm.Split(2)]
            return [part.name.removeprefix(comm.name) for part in parts]

        names = [".Dup()", ".Dup()#2", ".Split(0)", ".Split(0)#2", ".Dup()#3"]
        names += [".Dup()#4", ".Dup()#2.Split(1)", ".Split_type()", ".Split(2)#3"]
        found = nvcoll.emulate(3).run(main)
        assert found[1:] == [names] * 2
        assert found[0] == [*names[:2], "COMM_NULL", *names[3:]]

    @pytest.mark.parametrize("arguments", [(), (COMM_SELF,)])
    def test_the_class_is_not_called(self, arguments):
        class Mine(nvcoll.Intracomm):
            pass

        for kind in (nvcoll.Comm, nvcoll.Intracomm, Mine):
            with pytest.raises(ArgumentError, match=f"^{kind.__name__}: called by a program, .*; take the one that"):
                kind(*arguments)

    def test_a_clone_is_a_duplicate(self):
        def main(comm):
            two = comm.Dup() if comm.rank else comm.Clone(), comm.Clone()
            assert {comm.Compare(one) for one in two} == {CONGRUENT}
            two[1].Allreduce(x := np.ones(3))
            return [one.name.removeprefix(comm.name) for one in two], x.tolist()

        assert nvcoll.emulate(3).run(main) == [([".Dup()", ".Dup()#2"], [3.0] * 3)] * 3

    def test_names_begin_anew_with_the_world(self):
        names = []
        for _ in range(2):
            COMM_SELF._close()
            names += [COMM_SELF.Dup().name, COMM_SELF.Dup().name]
        assert names == ["COMM_SELF.Dup()", "COMM_SELF.Dup()#2"] * 2

    def test_a_name_may_be_given(self):
        def main(comm):
            part, same = comm.Dup(), comm.Dup()
            part.name = "tensor"
            same.Set_name("data")
            comm.Set_name(f"mine {comm.rank}")
            made = [part.Dup().name, part.Split(2).name, comm.Dup().name, part.Get_name(), comm.name]
            told = refusal(part.Allreduce, np.ones(3 + part.rank)), refusal(same.empty, 3 + same.rank)
            part.Free()
            return made, *told, refusal(lambda: part.rank)

        for rank, (made, (_, call), (_, text), (_, freed)) in enumerate(nvcoll.emulate(2).run(main)):
            mine = f"mine {rank}"
            assert made == ["tensor.Dup()#3", "tensor.Split(2)", f"{mine}.Dup()#4", "tensor", mine]
            assert call.startswith(f"Allreduce (call 1 on rank {rank} of tensor): ")
            assert text.startswith("empty of data: ")
            assert freed.startswith("tensor was freed")

    def test_what_is_no_name_and_what_can_have_none(self):
        freed = COMM_SELF.Dup()
        freed.Free()
        assert refusal(COMM_SELF.Set_name, 3) == (
            ArgumentError,
            "Set_name: name is of type int, expected str; pass str() of it",
        )
        for comm in (COMM_NULL, freed):
            assert refusal(comm.Set_name, "new")[0] is StateError
            assert comm.name != "new"


class TestCompare:
    def test_ranks_and_their_order(self):
        def main(comm):
            same, back, odd = comm.Dup(), comm.Split(0, -comm.rank), comm.Split(comm.rank % 2)
            others = [comm, same, back, odd, back.Split(0, -back.rank), odd.Split(0), back.Dup(), COMM_SELF]
            return [comm.Compare(one) for one in others], [back.Compare(one) for one in others]

        for told, back in nvcoll.emulate(3).run(main):
            assert told == [IDENT, CONGRUENT, SIMILAR, UNEQUAL, CONGRUENT, UNEQUAL, SIMILAR, UNEQUAL]
            assert back == [SIMILAR, SIMILAR, IDENT, UNEQUAL, SIMILAR, UNEQUAL, CONGRUENT, UNEQUAL]

    def test_a_process_alone(self):
        found = nvcoll.emulate(2).run(lambda comm: comm.Split(comm.rank).Compare(COMM_SELF))
        assert found == [CONGRUENT] * 2
        assert COMM_SELF.Compare(COMM_SELF.Dup()) == CONGRUENT
        assert nvcoll.Comm.Compare(COMM_SELF, COMM_SELF) == IDENT

    def test_values_are_mpi4py_s(self):
        mpi = pytest.importorskip("mpi4py.MPI")
        for name in ("IDENT", "CONGRUENT", "SIMILAR", "UNEQUAL"):
            assert getattr(nvcoll, name) == getattr(mpi, name)
        assert refusal(COMM_SELF.Compare, mpi.COMM_SELF) == (
            ArgumentError,
            "Compare: comm is of type Intracomm, expected nvcoll.Comm; to compare what is mpi4py's, take its own",
        )

    def test_what_there_is_no_more(self):
        for pair in ((COMM_SELF, COMM_NULL), (COMM_NULL, COMM_SELF), (COMM_NULL, COMM_NULL)):
            assert refusal(pair[0].Compare, pair[1])[0] is StateError


def test_no_communicator_is_mpi4py_s():
    mpi = pytest.importorskip("mpi4py.MPI")
    freed = COMM_SELF.Dup()
    freed.Free()
    for none in (COMM_NULL, freed):
        assert none == mpi.COMM_NULL == none == mpi.Comm()
        assert none not in (mpi.COMM_SELF, mpi.REQUEST_NULL, None, 0, "")
        assert (none == np.ones(2)) is False
    assert COMM_SELF != mpi.COMM_NULL != COMM_SELF != mpi.COMM_SELF


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_a_copy_is_the_communicator_itself(again):
    """So what it is kept in may be copied; also before it is used, and after its end."""

    def main(comm):
        part = comm.Dup()
        kept = again({"comm": comm, "parts": [part, COMM_NULL, COMM_SELF]})
        part.Free()
        return kept["comm"] is comm, kept["parts"] == [part, COMM_NULL, COMM_SELF], again(part) is part

    assert nvcoll.emulate(2).run(main) == [(True, True, True)] * 2
    assert again(nvcoll.COMM_WORLD) is nvcoll.COMM_WORLD


@pytest.mark.parametrize("comm", [COMM_SELF, COMM_NULL])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_cannot_be_pickled(comm, protocol):
    kind, text = refusal(pickle.dumps, [comm], protocol)
    assert kind is ArgumentError
    assert text == (
        f"pickle: {comm.name} is a communicator of this process, expected data; leave it out of what is pickled, "
        "and take nvcoll.COMM_WORLD, or make the same one, in the process that gets the rest"
    )

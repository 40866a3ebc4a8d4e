"""Collectives with mpi4py's API on symmetric memory."""

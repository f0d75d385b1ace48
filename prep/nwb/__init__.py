"""Reads NWB files (HDF5) with h5py alone: what is in them, and what each object becomes.

In: the path of a file and a recipe. Out: a SessionPlan (prep/plan.py).
"""

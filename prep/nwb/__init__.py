"""Reads NWB files (HDF5, and NWB-Zarr v2 and v3): what is in them, and what each object becomes.

In: the path of a file and a recipe. Out: a SessionPlan (prep/plan.py).
"""

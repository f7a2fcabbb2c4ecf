"""
The core in a world of its own: fake servers, a fake network and a clock that a seed drives.

Nothing here opens a socket, reads a clock or draws from the global random numbers, so a run is its
seed: `python -m tests.simulation --seed N` plays it again, step for step.
"""

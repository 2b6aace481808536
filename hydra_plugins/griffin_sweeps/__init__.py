"""How sweeps are run: Hydra takes sweepers and launchers from below `hydra_plugins` only.

These modules are read at every start of Hydra, so they import what is slow where it is used.
"""

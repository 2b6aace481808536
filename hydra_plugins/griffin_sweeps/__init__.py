"""How sweeps are run: Hydra takes sweepers and launchers from below `hydra_plugins` only.

Hydra reads every module here at each start of any program of its own, but for those whose names begin with an
underscore; `pipelines.composition` registers these.
"""

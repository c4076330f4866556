"""Parallelism: the device mesh, sharding rules, expert dispatch, context parallelism and pipelines.

`rules` maps logical axes to mesh axes, `sharding` applies them while tracing, `placement` places a run's arrays.
`dispatch`, `context` and `pipeline` hold the collectives; `processes` joins several hosts.
"""

"""The result of every method: which sample, at which step, moved which query, seen from which state.

An `Influence` is read from a folder (`open_influence`) or held in memory; methods write it, shard
by shard, with an `InfluenceWriter`.
"""

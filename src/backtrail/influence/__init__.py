"""Influence, the result of every method: an array [query, observed_at, step, slot].

Methods write an `Influence` shard by shard with an `InfluenceWriter`. It is opened from a folder
with `open_influence`, or held in memory.
"""

"""Optional speed: everything in here leaves results unchanged up to rounding.

`context.accelerated` is the one way in, `switch.acceleration` the one switch.
"""

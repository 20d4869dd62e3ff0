"""Who may import whom in the package, from the lowest layer to the highest."""

# Who may import whom, from the lowest layer to the highest: a folder imports itself and what is in
# its set. `accel` only makes things faster, so it knows nothing of what it speeds up.
GROUND = {
    "errors",
    "arguments",
    "hooks",
    "exclusive",
    "extras",
    "tree",
    "accel",
    "sampling",
    "stats",
}
TASK = GROUND | {"task"}
STEP = TASK | {"queries", "step"}
SWEEP = STEP | {"optim", "curvature", "persample", "sweep"}
RESULT = {"errors", "arguments", "extras", "stats", "influence"}
METHODS = SWEEP | RESULT | {"run", "methods"}
EVERYTHING = METHODS | {"record", "apply", "plot", "view", "cli"}
MAY_IMPORT = {
    "errors": {"errors"},
    "arguments": {"errors", "arguments"},
    "hooks": {"hooks"},
    "exclusive": {"exclusive"},
    "extras": {"errors", "extras"},
    "tree": {"errors", "tree"},
    "accel": {"errors", "arguments", "accel"},
    "sampling": {"sampling"},
    "stats": {"errors", "stats"},
    "task": TASK,
    "queries": TASK | {"queries"},
    "step": STEP,
    "optim": STEP | {"optim"},
    "curvature": STEP | {"curvature"},
    "persample": STEP | {"persample"},
    "sweep": SWEEP,
    "run": STEP | {"run"},
    "record": STEP | {"curvature", "run", "record"},
    "influence": RESULT,
    "methods": METHODS,
    "apply": METHODS | {"apply"},
    "plot": RESULT | {"plot"},
    "view": EVERYTHING - {"cli"},
    # The command line is outermost, and its demo shows how users import.
    "cli": EVERYTHING | {"__init__"},
    # The public names, imported lazily.
    "__init__": EVERYTHING - {"view", "cli"},
}

"""The mathematics of time: steps, plans and sweeps as pure functions of plain data."""

"""One optimizer step as a function from state to state."""

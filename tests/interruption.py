"""What a test raises where the process might have been killed."""


class Interrupted(Exception):
    """Stops the code under test in the middle, as a kill would."""

"""Optional dependencies: imported when first needed."""

from importlib import import_module
from types import ModuleType

from backtrail.errors import MissingExtra


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; if it is missing, the error says how to install it.

    >>> need("json", "demo").dumps([1])
    '[1]'
    >>> need("no_such_module", "demo")
    Traceback (most recent call last):
    backtrail.errors.sentences.MissingExtra: Module 'no_such_module' is not installed, and this ...

    Args:
        module: Name of the module to import.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(module, extra) from error

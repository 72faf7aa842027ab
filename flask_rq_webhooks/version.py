"""The version of this package, defined in this place only."""

__version__ = "1.0.0.dev0"

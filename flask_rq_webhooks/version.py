"""The one place that knows the version of this package."""

__version__ = "1.0.0.dev0"

"""What people and API clients see: the only Flask views of the package."""

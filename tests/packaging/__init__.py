"""What a user gets: the wheel in an environment of its own, the sdist unpacked. Run by ``make installed``."""

"""Why a recipe has no inference folder."""


class NoFolderError(ValueError):
    """A recipe that cannot be rebuilt from a folder, and why, in one line."""

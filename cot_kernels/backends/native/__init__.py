"""The CPU backend that is compiled where the package is built: see :mod:`.backend` and the headers beside it."""

"""`python -m lightning_integration`: see `lightning_integration.cli`."""

from .cli import main

if __name__ == "__main__":
    main()

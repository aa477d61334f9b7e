"""Does complement objective training help, and at what cost? ``python -m study`` finds out; see docs/evidence.md."""

"""Why a row has no time: what was raised, or that time ran out, and when it does."""

from __future__ import annotations

# On a GPU nothing is started after so long: a run ought to end within ten minutes, and its last measurement goes on.
GPU_MINUTES = 9.0
LATE = "out of time"


def message_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]

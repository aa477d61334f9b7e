"""How fast a GPU runs and what holds it back: that of a run's start and of its end say whether it was throttled."""

from __future__ import annotations

import subprocess

import torch

# Of nvidia-smi. The last one is a mask of reasons: 0x4 is the power limit, 0x20, 0x40 and 0x80 are heat and power.
FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "watts_limit": "power.limit",
    "celsius": "temperature.gpu",
    "throttled": "clocks_throttle_reasons.active",
}
_BYTES, _CALLS = 256 << 20, 1000  # some tenths of a second of work


def state(device: torch.device) -> dict[str, float | str]:
    """At work, for at rest clocks are low. What the machine does not tell is left out; of a CPU that is all."""
    if device.type != "cuda":
        return {}
    identity = f"--id=GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', '')}"
    found: dict[str, float | str] = {}
    try:
        busy = torch.empty(_BYTES, dtype=torch.uint8, device=device)
        for _ in range(_CALLS):
            busy.zero_()
        # One after the other: of a field that a driver does not know, nvidia-smi refuses the whole query.
        for name, field in FIELDS.items():
            command = ("nvidia-smi", identity, f"--query-gpu={field}", "--format=csv,noheader,nounits")
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if said[:1].isdecimal():
                found[name] = said if said.startswith("0x") else float(said)
        torch.cuda.synchronize(device)
    except (OSError, ValueError, torch.OutOfMemoryError):  # no nvidia-smi, as on an AMD GPU, or no room
        pass
    return found

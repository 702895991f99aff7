"""Names of encodings for messages and reports."""

from __future__ import annotations

from pipeline.records import Encoding

_KNOBS = {"k": "k", "p": "p", "sample_size": "sample size"}


def encoding_name(encoding: Encoding) -> str:
    """Return kind and size: `sampled 25`, `top-k 50`, `full`."""
    knob = next((getattr(encoding, name) for name in _KNOBS if hasattr(encoding, name)), None)
    return encoding.kind if knob is None else f"{encoding.kind} {knob:g}"


def encoding_text(encoding: Encoding) -> str:
    """Return kind and all settings: `top-k, k 50, temperatures (1.0, 2.0, 4.0)`."""
    knobs = {**_KNOBS, "temperature": "temperature", "temperatures": "temperatures"}
    found = [f"{label} {getattr(encoding, name)}" for name, label in knobs.items() if hasattr(encoding, name)]
    return ", ".join([encoding.kind, *found])

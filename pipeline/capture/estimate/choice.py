"""Choice of an encoding for `--target-noise` or `--budget`, and the YAML file for its capture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.cache.storage.commit import write_text
from pipeline.capture.estimate.table import human
from pipeline.config import EstimateConfig, parse_bytes
from pipeline.errors import MisuseError
from pipeline.records import Encoding, Estimate, Full, Sampled
from pipeline.softlabels.names import encoding_name


def choose(found: Estimate, config: EstimateConfig) -> Encoding | None:
    """Return the encoding that satisfies `--target-noise` or `--budget`, or None without the flags.

    Only unbiased encodings are considered, because more data does not reduce a bias.

    Raises:
        MisuseError: no compared encoding satisfies the flag; the message names the nearest one.
    """
    if config.target_noise is None and config.budget is None:
        return None
    known = [
        (line.fidelity.noise_share, line)
        for line in found.encodings
        if isinstance(line.encoding, Sampled | Full) and line.fidelity is not None
    ]
    if not known:
        raise MisuseError(
            "--target-noise, --budget: the teacher has no output matrix in memory, so that the noise cannot be estimated"
        )
    if config.target_noise is not None:
        fitting = [line for noise, line in known if noise <= config.target_noise]
        if not fitting:
            noise, best = min(known, key=lambda pair: pair[0])
            raise MisuseError(
                f"--target-noise {config.target_noise:g}: the least noise of those compared is {noise:.4f} ({encoding_name(best.encoding)}); ask for more"
            )
        return min(fitting, key=lambda line: line.bytes_per_position).encoding
    budget = parse_bytes("--budget", config.budget or "")
    affordable = [(noise, line) for noise, line in known if line.total_bytes <= budget]
    if not affordable:
        least = min((line for _, line in known), key=lambda line: line.total_bytes)
        raise MisuseError(
            f"--budget {config.budget}: the smallest of those compared takes {human(least.total_bytes)} ({encoding_name(least.encoding)}); allow more, or cache fewer rows"
        )
    return min(affordable, key=lambda pair: pair[0])[1].encoding


def write_config(config: EstimateConfig, found: Estimate) -> None:
    """Write a YAML file with a complete `cache-logits` stage."""
    import yaml

    assert found.chosen is not None
    defaults = {f.name: f.default for f in dataclasses.fields(type(config.data))}
    data = {
        f.name: getattr(config.data, f.name)
        for f in dataclasses.fields(config.data)
        if getattr(config.data, f.name) != defaults[f.name]
    }
    capture = {
        name: getattr(config, name)
        for name in ("teacher", "teacher_revision", "attn_implementation", "device_map", "quantization", "batch_tokens")
        if getattr(config, name) is not None
    }
    if config.trust_remote_code:
        capture["trust_remote_code"] = True
    encoding = found.chosen
    knobs = {"k": "top_k", "p": "top_p", "sample_size": "sample_size"}
    capture.update(dtype=config.dtype, encoding=encoding.kind, output="runs/cache")
    capture.update({key: getattr(encoding, name) for name, key in knobs.items() if hasattr(encoding, name)})
    if not isinstance(encoding, Full):
        capture["temperature"] = list(getattr(encoding, "temperatures", [getattr(encoding, "temperature", 1.0)]))
    content = {
        "task": config.task,
        "data": {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
        "cache-logits": capture,
    }
    write_text(Path(config.write_config or ""), yaml.safe_dump(content, sort_keys=False))

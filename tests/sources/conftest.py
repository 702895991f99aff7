"""Everything that `datasets` writes goes to a folder of the test run."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def arrow_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder

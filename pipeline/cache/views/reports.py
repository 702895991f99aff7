"""Reports stored next to a finished cache: the dataset card and the kept-mass figures."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache.format.manifest import dump, parse
from pipeline.cache.reading.reader import Cache
from pipeline.cache.storage.commit import write_text
from pipeline.cache.views.card import make_card
from pipeline.cache.views.mass import draw, kept_masses
from pipeline.records import Fidelity, SourceContents


def write_reports(cache: Cache, folder: Path, *, license: str | None = None, location: str = "DIR") -> None:
    """Write a cache's card, `README.md`, and its kept-mass reports if it has any, to a folder.

    Args:
        folder: the cache's own directory, or another.
        license: the licence, by its name on the hub.
        location: the URL or directory where readers will find the cache.

    Raises:
        CacheError: the folder cannot be written.
        IntegrityError: a row group or a report of the cache is damaged.
    """
    kept = cache.root / "reports" / "fidelity.json"
    fidelity = parse(Fidelity, kept) if kept.is_file() else None
    counted = cache.root / "reports" / "contents.json"
    contents = parse(SourceContents, counted) if counted.is_file() else None
    masses = kept_masses(cache)
    picture = False
    if masses is not None:
        write_text(folder / "reports" / "kept-mass.json", dump(masses))
        picture = draw(masses, folder / "reports" / "kept-mass.png")
    card = make_card(
        cache.manifest, fidelity, license=license, location=location, masses=masses, picture=picture, contents=contents
    )
    write_text(folder / "README.md", card)

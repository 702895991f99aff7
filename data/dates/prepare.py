"""Make the data and the untrained teacher of the encoder-decoder demo.

Run it with `python -m data.dates.prepare`.

A source is a date in a common written form with words around it, and the target is the same date in
ISO 8601. The order of a numeric day and month is ambiguous; in seven of ten such rows the day comes
first. The teacher is a small T5 with random weights and a tokenizer of single characters.
"""

from __future__ import annotations

import csv
import datetime
import random
from collections.abc import Iterator
from pathlib import Path

import click

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 4000, 200, 400
DAY_FIRST = 0.7
AROUND = ("due {}", "on {}", "{}", "seen {} again", "from {} on", "paid {}", "not before {}")


def written(day: datetime.date, rng: random.Random) -> str:
    """Return the date in one of eight forms."""
    ordinal = {1: "st", 21: "st", 31: "st", 2: "nd", 22: "nd", 3: "rd", 23: "rd"}.get(day.day, "th")
    month, short = day.strftime("%B"), day.strftime("%b")
    first, second = (day.day, day.month) if rng.random() < DAY_FIRST else (day.month, day.day)
    return rng.choice(
        [
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"the {day.day}{ordinal} of {month} {day.year}",
            f"{day.day}-{short}-{day.year % 100:02}",
            f"{short} {day.day} '{day.year % 100:02}",
            f"{first}/{second}/{day.year}",
            f"{first:02}.{second:02}.{day.year % 100:02}",
            day.strftime("%A %d %b %Y"),
        ]
    )


def rows(count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield `count` pairs of dates from 2000 to 2049."""
    for _ in range(count):
        day = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(18_000))
        yield {"source": rng.choice(AROUND).format(written(day, rng)), "target": day.isoformat()}


def write_model(path: Path) -> None:
    """Save a randomly initialised T5 of 1.0 million parameters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, set_seed

    letters = " '()*+,-./0123456789:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    set_seed(0)
    config = AutoConfig.for_model(
        "t5", vocab_size=len(vocabulary), d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/dates"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits and the model of the encoder-decoder demo."""
    rng = random.Random(0)
    output.mkdir(parents=True, exist_ok=True)
    for name, count in {"train": NUM_TRAIN, "validation": NUM_VALIDATION, "test": NUM_TEST}.items():
        # CSV, since the JSON reader parses text that looks like a date as a timestamp.
        with (output / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["source", "target"])
            writer.writeheader()
            writer.writerows(rows(count, rng))
    write_model(output / "t5")


if __name__ == "__main__":
    main()

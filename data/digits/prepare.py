"""Make the data and the untrained models of the image demo: `python -m data.digits.prepare`.

The images are scikit-learn's copy of the test set of the optical recognition of handwritten digits
(Alpaydin and Kaynak, 1998): 1,797 digits of 8 x 8 pixels. Of the 997 training images, 150 keep
their label. Teacher and students are small ResNets with random weights.
"""

from __future__ import annotations

import csv
import random
import shutil
from pathlib import Path

import click
import numpy as np

NUM_LABELLED, NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 150, 997, 200, 600
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_split(folder: Path, images: np.ndarray, labels: np.ndarray, *, labelled: int) -> None:
    """Write one split as image files and a metadata file with their labels.

    Args:
        images: (n, 8, 8), 0 to 16.
        labels: (n,) 0 to 9.
        labelled: how many of the first images keep their label.
    """
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            pixels = np.round(image / 16 * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:04}.png")
            writer.writerow([f"{i:04}.png", NAMES[label] if i < labelled else ""])


def write_models(output: Path) -> None:
    """Save ResNets of 700,000 (teacher) and 80,000 (student) parameters for 32 x 32 pixels."""
    from transformers import AutoConfig, AutoModelForImageClassification, set_seed
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for name, widths, depth in (("resnet", [32, 64, 128], 2), ("small", [16, 32, 64], 1)):
        set_seed(0)
        config = AutoConfig.for_model(
            "resnet", embedding_size=widths[0], hidden_sizes=widths, depths=[depth] * 3, layer_type="basic", num_labels=len(NAMES)
        )  # fmt: skip
        AutoModelForImageClassification.from_config(config).save_pretrained(output / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(output / name)


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/digits"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits and the models of the image demo."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.images)))
    random.Random(0).shuffle(order)
    images, labels = digits.images[order], digits.target[order]
    start = 0
    for name, count, labelled in (
        ("train", NUM_TRAIN, NUM_LABELLED),
        ("validation", NUM_VALIDATION, NUM_VALIDATION),
        ("test", NUM_TEST, NUM_TEST),
    ):
        part = slice(start, start + count)
        write_split(output / "images" / name, images[part], labels[part], labelled=labelled)
        start += count
    write_models(output)


if __name__ == "__main__":
    main()

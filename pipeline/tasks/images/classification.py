"""Image classification: N = 1 position per row; V is the number of labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedTokenizerBase

from pipeline.errors import BadRowError, MisuseError, ModelError
from pipeline.records import (
    BadRow,
    Columns,
    Example,
    Inputs,
    OtherTokenizers,
    Predictions,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.defaults import TaskDefaults
from pipeline.tasks.images.pixels import decode, in_threads, pixel_values
from pipeline.tasks.images.views import draw_view
from pipeline.tasks.one_label import class_metrics, num_labels, right_answers
from pipeline.tasks.protocol import refuse_settings_of_language_models, token_block

_USAGE = """```python
from transformers import pipeline

classify = pipeline("{tag}", model="{folder}")
print(classify("image.png"))
```
"""
_NO_TOKENS = np.zeros(0, dtype=np.int32)
#: The split whose images are divided into views.
_TRAIN = "train"


@dataclass(frozen=True, slots=True)
class ImageClassification(TaskDefaults):
    """Classification of images; see `Task`."""

    name: str = "image-classification"
    reads: Inputs = "images"
    auto_class: Any = AutoModelForImageClassification
    hub_category: str = "image-classification"
    usage: str = _USAGE
    takes_token_types: bool = False
    stores_text: bool = False
    other_tokenizers: OtherTokenizers = "images"
    default_max_length: int = 1
    default_batch_tokens: int = 64
    main_metric: str = "accuracy"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only images."""
        if columns.image is None:
            raise MisuseError(
                f"--task {self.name} reads images: name their column with --image-column (folders of images have the column image)"
            )
        refuse_settings_of_language_models(self.name, tokenization, "images")

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of labels.

        Raises:
            ModelError: the model does not read images with 3 channels, or is no classifier.
        """
        config: Any = model.config
        channels = getattr(config, "num_channels", 3)
        if channels != 3:
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected a model of images with 3 channels, found {channels}; images are read as RGB"
            )
        return num_labels(model)

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Make one row per view of each image of the split `train`, and one per image elsewhere.

        Each image is decoded, so that a damaged one is found here.
        """

        def rows(item: Example | BadRow) -> list[TokenizedExample | BadRow]:
            return [item] if isinstance(item, BadRow) else _rows(item, split, settings)

        for found in in_threads(rows, examples):
            yield from found

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return `pixel_values`, (B, C, H, W) float32, and no mask."""
        block = token_block(rows)
        assert block.images is not None
        return {"pixel_values": pixel_values(block.images, block.views, processor)}, None

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (B, V) logits.

        Raises:
            ModelError: the model expects images of another size.
        """
        pixels = inputs["pixel_values"]
        dtype: Any = getattr(model, "dtype", pixels.dtype)  # a student in training casts its inputs itself
        try:
            logits: Tensor = model(pixel_values=pixels.to(dtype)).logits
        except ValueError as error:  # raised by models with a fixed image size
            config: Any = model.config
            raise ModelError(
                f"{config.name_or_path or 'the model'}: does not take the {pixels.shape[-2]} x {pixels.shape[-1]} pixels that its image processor makes: {error}; "
                "correct its preprocessor_config.json"
            ) from None
        return logits

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return accuracy, macro-F1, loss and calibration over the labelled rows."""
        return class_metrics(predictions, num_classes)

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) correct answers and (R,) labelled rows; the ratio of totals is accuracy."""
        return right_answers(predictions)


def _rows(example: Example, split: str, settings: Tokenization) -> list[TokenizedExample | BadRow]:
    """Return the rows of an image: the whole image, or its views."""
    assert example.image is not None
    try:
        image = decode(example.image.data)
    except BadRowError as error:
        return [
            BadRow(split, example.source_row, f"{example.image.file or example.image.path or 'the image'}: {error}")
        ]
    views = settings.views
    if views is None:
        parts: list[np.ndarray | None] = [None]
    elif split != _TRAIN:
        parts = [_NO_TOKENS]
    else:
        places = [(split, example.source_row, number) for number in range(views.rows_of_an_image(split))]
        parts = [draw_view(image.width, image.height, views, place=place) for place in places]
    return [
        TokenizedExample(
            source_row=example.source_row,
            piece=number,
            input_ids=_NO_TOKENS,
            label=example.label,
            image=example.image,
            view=part,
            kept=example.kept,
        )
        for number, part in enumerate(parts)
    ]

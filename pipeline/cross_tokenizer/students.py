"""`softlabel init-student`: create a student with the teacher's or another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache import Cache
from pipeline.config import InitStudentConfig
from pipeline.config.training import trained_size
from pipeline.cross_tokenizer.embeddings import new_vocabulary
from pipeline.cross_tokenizer.train import train_on_cache
from pipeline.errors import MisuseError, ModelError
from pipeline.models import load_tokenizer, tokenizer_info
from pipeline.models.initialize import NewStudent, Shape, check_request, make_student
from pipeline.models.vocabulary import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def run(config: InitStudentConfig) -> NewStudent:
    """Create a student of the given shape or layers; the default is evenly spaced layers."""
    shape = None
    if config.num_layers is not None:
        shape = Shape(config.num_layers, config.hidden_size or 0, config.num_heads or 0)
    return _make(
        config.teacher,
        config.output,
        layers=config.layer or None,
        config=shape,
        tokenizer=config.tokenizer,
        cache=config.cache,
        seed=config.seed,
    )


def init_student(
    teacher: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    layers: Sequence[int] | None = None,
    config: Shape | PreTrainedConfig | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    cache: str | Path | Cache | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Path:
    """Write a student as an ordinary model directory, with the teacher's or another tokenizer.

    With another tokenizer, embedding and head have its size. If layers are copied, a token that the
    teacher also has keeps its row; the row of a new token is the mean of the rows of the teacher's
    tokens that spell its bytes.

    Args:
        teacher: a hub name, a path or a live model.
        layers: numbers of the teacher's layers to copy, from 0; embeddings and head are copied
            too. Default, if `config` is None as well: a third of the layers, evenly spaced.
        config: a shape, or a whole config (whose `architectures` names the class), for a student
            with random weights.
        tokenizer: the student's tokenizer: a hub name, a directory, a tokenizer, or "train:SIZE" to
            train a byte-level BPE of SIZE tokens on the text of `cache`. Default: the teacher's. A
            tokenizer object given with a live teacher and no `teacher_tokenizer` is taken as the
            teacher's.
        cache: the cache whose split `train` a tokenizer is trained on.
        teacher_tokenizer: the tokenizer of a live teacher. Default: `tokenizer`, or the cache's.
        seed: seed of random weights.

    Returns:
        The directory of the student.

    Raises:
        MisuseError: both `layers` and `config` are given; the teacher does not have a layer; the
            width is not divisible by the heads; SIZE is not a number or too small; `cache` is given
            without "train:SIZE", or the other way round.
        ModelError: the teacher or the tokenizer cannot be loaded, or no layers are found.
        CacheError: the cache does not exist or holds no text.
    """
    made = _make(
        teacher,
        output,
        layers=layers,
        config=config,
        tokenizer=tokenizer,
        cache=cache,
        teacher_tokenizer=teacher_tokenizer,
        seed=seed,
    )
    return made.path


def _make(
    teacher: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    layers: Sequence[int] | None,
    config: Shape | PreTrainedConfig | None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    cache: str | Path | Cache | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int,
) -> NewStudent:
    size = trained_size(tokenizer) if isinstance(tokenizer, str) else None
    if (size is None) != (cache is None):
        raise MisuseError("init_student: tokenizer='train:SIZE' and cache=... go together")
    if tokenizer is not None:
        check_request(teacher, output, layers=layers, config=config)  # a tokenizer may take long to train
    opened = cache if isinstance(cache, Cache) or cache is None else Cache.open(cache)
    theirs = teacher_tokenizer
    if theirs is None and isinstance(teacher, str | Path):
        theirs = load_tokenizer(str(teacher)) if tokenizer is not None else None
    elif theirs is None and tokenizer is not None and not isinstance(tokenizer, str | Path):
        theirs, tokenizer = tokenizer, None
    elif theirs is None and opened is not None:
        theirs = opened.tokenizer
    vocabulary = None
    if tokenizer is not None:
        if theirs is None:
            raise MisuseError(
                "init_student: a live teacher needs its teacher_tokenizer=... beside a tokenizer=... by name"
            )
        found: PreTrainedTokenizerBase
        if opened is not None and size is not None:
            same = tokenizer_info(theirs).sha256 == opened.manifest.contract.tokenizer.sha256
            found = train_on_cache(opened, theirs if same else opened.tokenizer, size)
        else:
            found = _load(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        if tokenizer_info(found).sha256 == tokenizer_info(theirs).sha256:
            theirs = found  # with its own chat template
        else:
            vocabulary = new_vocabulary(theirs, found, with_rows=config is None)
    return make_student(
        teacher, output, layers=layers, config=config, tokenizer=theirs, vocabulary=vocabulary, seed=seed
    )


def _load(name: str) -> PreTrainedTokenizerBase:
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"--tokenizer {name}: expected a directory with a tokenizer (tokenizer.json, or the files of its kind), found none of them there"
        )
    return load_tokenizer(name)

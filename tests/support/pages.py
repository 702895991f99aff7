"""Code blocks of the pages in `docs/`, and tiny models and data under the names that they use."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
    set_seed,
)

import pipeline as softlabel
from tests.conftest import TOPICS, WORDS, sentence, tiny_model
from tests.support.entities import entities
from tests.support.generations import writing_model
from tests.support.markdown import code_of
from tests.support.once import once
from tests.support.pictures import NAMES, data_set, encode, folders, pictures, pixels, untrained
from tests.support.teaching import pretrained

Make = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page with its language ("" if indented) and text."""

    page: str
    number: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks, then the indented ones, each in page order."""
    for number, (language, text) in enumerate(code_of(page.read_text(encoding="utf-8"))):
        yield Block(page.name, number, language, text)


class World:
    """Models and data that the pages presuppose, created in the working directory when needed."""

    def __init__(self, bert: PreTrainedTokenizerBase, lm: PreTrainedTokenizerBase):
        self.bert, self.lm = copy.deepcopy(bert), copy.deepcopy(lm)
        self.bert.model_max_length = self.lm.model_max_length = 512
        self.spoken = _spoken(self.lm)

    def make(self, page: str, names: set[str]) -> None:
        """Create the models and data of the page that are named and missing."""
        for name, make in {**self._models(), **self._things().get(page, {})}.items():
            if name in names and not Path(name).exists():
                path = Path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix:
                    make(path)
                else:
                    once((__name__, page, name), make, path)

    def objects(self, page: str) -> dict[str, Any]:
        """Return the objects that a page's Python presupposes."""
        if page == "generate.md":
            return {"model": writing_model(len(self.lm), max_position_embeddings=512), "tokenizer": self.lm}
        if page == "llm-teachers.md":
            texts = [" ".join(WORDS[i : i + 5]) for i in range(12)]
            rows = Dataset.from_dict({"text": texts, "label": ["billing", "bug"] * 6})
            return {"dataset": DatasetDict({"train": rows, "test": rows.select(range(4))})}
        if page == "tasks.md":
            teacher = str(untrained(Path("its-teacher")))
            model = AutoModelForImageClassification.from_pretrained(teacher)
            model.config.id2label = dict(enumerate(NAMES))
            return {
                "model": model,
                "image_processor": AutoImageProcessor.from_pretrained(teacher),
                "dataset": data_set(train=pictures(0, 12), test=pictures(1, 4)),
            }
        return {}

    # ------------------------------------------------------------------------------------- models

    def _models(self) -> dict[str, Make]:
        """Return the hub models, with the real number of layers where a command depends on it."""
        encoder = self._encoder(12)
        return {
            "bert-base-uncased": encoder,
            "bert-base-cased": encoder,
            "microsoft/MiniLM-L12-H384-uncased": encoder,
            "sentence-transformers/all-MiniLM-L6-v2": self._encoder(6),
            "prajjwal1/bert-tiny": self._encoder(2),
            "google-t5/t5-small": self._seq2seq,
            "google/vit-base-patch16-224-in21k": untrained,
            "HuggingFaceTB/SmolLM2-135M": self._writer(30),
            "Qwen/Qwen3-0.6B": self._writer(2),
            "Qwen/Qwen3-8B": self._writer(2),
            "meta-llama/Llama-3.2-1B": self._foreign,
            "org/teacher": self._writer(2),
            "runs/llm": self._writer(2),
            "runs/base": self._writer(2),
            "runs/adapter": self._adapter,
        }

    def _encoder(self, layers: int) -> Make:
        return lambda path: pretrained(path, self.bert, num_hidden_layers=layers)

    def _classifier(self, *names: str, seed: int = 0) -> Make:
        def make(path: Path) -> None:
            self._of_classes(*names, seed=seed).save_pretrained(path)
            self.bert.save_pretrained(path)

        return make

    def _of_classes(self, *names: str, seed: int = 0) -> Any:
        model = tiny_model("bert", len(self.bert), num_labels=len(names), seed=seed, num_hidden_layers=2)
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        return model

    def _writer(self, layers: int) -> Make:
        def make(path: Path) -> None:
            writing_model(len(self.lm), num_hidden_layers=layers, max_position_embeddings=512).save_pretrained(path)
            self.spoken.save_pretrained(path)

        return make

    def _foreign(self, path: Path) -> None:
        """Save a language model of another family with its own tokenizer."""
        from tests.tasks.families import FAMILIES

        tokenizer = FAMILIES["llama2"]
        tiny_model("llama", len(tokenizer), num_hidden_layers=2).save_pretrained(path)
        tokenizer.save_pretrained(path)

    def _adapter(self, path: Path) -> None:
        import peft

        model = writing_model(len(self.lm), num_hidden_layers=2, max_position_embeddings=512)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(path)

    def _seq2seq(self, path: Path) -> None:
        from tests.tasks.families import FAMILIES

        set_seed(0)
        tokenizer = FAMILIES["t5"]
        config = AutoConfig.for_model(
            "t5", vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=6, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)

    # ------------------------------------------------------------------------- what each page names

    def _things(self) -> dict[str, dict[str, Make]]:
        topics = self._classifier(*TOPICS)
        news = {"runs/cache": self._classes, "runs/teacher": topics, "runs/student-init": topics, "STUDENT": topics,
                "runs/student": topics, "my-data": _labelled("text", "label")}  # fmt: skip
        articles = _labelled("Headline & Text", "Topic")
        queues = _csv("Body of ticket", "Queue", "Invoices", "Shipping", "others", unlabelled_every=5)
        texts = {"org/corpus": _corpus, "corpus": _corpus, "runs/cache": self._tokens}
        return {
            "index.md": news,
            "quickstart.md": {**news, "articles": articles, "more.csv": _csv("Headline & Text")},
            "data.md": {
                **news, **texts, "runs/teacher": self._classifier("billing", "delivery", "others"), "tickets.csv": queues, "more.csv": _csv("Body of ticket"),
                "chats.jsonl": _chats, "prompts.jsonl": _prompts, "tokens.parquet": _tokens,
            },
            "chats.md": {"chats.jsonl": _chats},
            "caches.md": {
                **news, "runs/may": self._classes, "runs/june": self._classes, "runs/full": self._tokens_full,
                "runs/cache": self._domains,
            },
            "capture.md": {**news, **texts},
            "cross-tokenizer.md": {**texts, "T": self._writer(2)},
            "encodings.md": {"TEACHER": self._writer(2), "DATA": _corpus},
            "evaluation.md": {
                **news, "runs/control": self._classifier(*TOPICS, seed=3), "runs/bbc/cache": self._classes,
                "runs/bbc/teacher": topics, "runs/bbc/student": self._classifier(*TOPICS, seed=4),
                "runs/bbc/control-labels": self._classifier(*TOPICS, seed=5),
            },
            "generate.md": {
                "runs/student": self._writer(2), "runs/teacher": self._writer(2), "prompts.jsonl": _prompts,
                "examples.jinja": _template,
            },
            "importing.md": {"responses.jsonl": self._responses, "DIRECTORY": self._logprobs},
            "llm-teachers.md": {"tickets.csv": _csv("text"), "prompt.jinja": _question},
            "sweeps.md": news,
            "tasks.md": {
                "tickets": _labelled("text", "queue"), "topics": _several, "passages": _ranking, "conll": _words,
                "corpus": _corpus, "pairs": _pairs, "photos": _photos, "cat.jpg": _cat, "questions": _choices,
                "squad": _answers, "STUDENT": self._scorer, "runs/start": untrained,
            },
            "teachers.md": {
                **news, "org/corpus": _corpus, "tickets.csv": _csv("text"), "runs/large": self._classes,
                "runs/code": self._classes, "runs/teacher-a": topics, "runs/teacher-b": topics,
            },
            "training.md": {
                **news, "runs/large": self._classes, "runs/code": self._classes, "runs/news": self._classes,
                "runs/chat": self._classes,
            },
        }  # fmt: skip

    def _classes(self, path: Path) -> None:
        self._capture(path, _rows("text", "label"))

    def _domains(self, path: Path) -> None:
        """Write a cache of long rows with a column `domain`, for `filter`."""
        rng = random.Random(7)
        rows = Dataset.from_dict({
            "text": [sentence(rng, 200, topic) for topic in [*TOPICS] * 12],
            "label": [*TOPICS] * 12,
            "domain": ["news", "law"] * 18,
        })  # fmt: skip
        self._capture(path, DatasetDict({"train": rows, "test": rows.select(range(6))}), keep=("domain",), length=256)

    def _capture(self, path: Path, rows: DatasetDict, *, keep: tuple[str, ...] = (), length: int = 32) -> None:
        softlabel.cache_logits(
            self._of_classes(*TOPICS), rows, path, task="sequence-classification", tokenizer=self.bert,
            max_length=length, store_text=True, columns=softlabel.Columns(keep=keep),
        )  # fmt: skip

    def _tokens(self, path: Path) -> None:
        self._write_texts(path, softlabel.Sampled())

    def _tokens_full(self, path: Path) -> None:
        self._write_texts(path, softlabel.Full())

    def _write_texts(self, path: Path, encoding: Any) -> None:
        softlabel.cache_logits(
            tiny_model("llama", len(self.lm), num_hidden_layers=2), _documents(), path,
            task="causal-lm", tokenizer=self.lm, encoding=encoding,
        )  # fmt: skip

    def _scorer(self, path: Path) -> None:
        model = tiny_model("bert", len(self.bert), num_labels=1, num_hidden_layers=2)
        model.save_pretrained(path)
        self.bert.save_pretrained(path)

    def _responses(self, path: Path) -> None:
        """Write vLLM responses with the log-probabilities of the prompt."""
        path.write_text("".join(json.dumps(self._response(i)) + "\n" for i in range(6)))

    def _response(self, number: int) -> dict[str, Any]:
        ids = self.lm(sentence(random.Random(number), 12))["input_ids"]
        rng = np.random.default_rng(number)
        logprobs = []
        for token in ids[1:]:
            others = [int(each) for each in rng.choice(len(self.lm), 21, replace=False) if each != token][:20]
            values = np.log(rng.dirichlet(np.ones(22)))[:21]
            logprobs.append({
                str(each): {"logprob": float(value), "rank": rank, "decoded_token": self.lm.decode([each])}
                for rank, (each, value) in enumerate(zip([token, *others], np.sort(values)[::-1], strict=True), 1)
            })  # fmt: skip
        return {
            "id": f"cmpl-{number}", "object": "text_completion", "model": "Qwen/Qwen3-8B",
            "choices": [{
                "index": 0, "text": "", "logprobs": None, "prompt_logprobs": [None, *logprobs], "prompt_token_ids": ids,
            }],
        }  # fmt: skip

    def _logprobs(self, path: Path) -> None:
        """Write a table with `token_ids` and `top_values`."""
        path.mkdir(exist_ok=True)
        rows: dict[str, list[Any]] = {"input_ids": [], "token_ids": [], "top_values": []}
        for number in range(6):
            (choice,) = self._response(number)["choices"]
            entries = [{int(k): v["logprob"] for k, v in each.items()} for each in choice["prompt_logprobs"][1:]]
            rows["input_ids"].append(choice["prompt_token_ids"])
            rows["token_ids"].append([list(each) for each in entries])
            rows["top_values"].append([list(each.values()) for each in entries])
        Dataset.from_dict(rows).to_parquet(path / "part-0.parquet")


def _spoken(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return found


# ------------------------------------------------------------------------------------- data


def _rows(text: str, label: str) -> DatasetDict:
    def split(count: int, seed: int) -> Dataset:
        rng = random.Random(seed)
        names = [[*TOPICS][i % 3] for i in range(count)]
        return Dataset.from_dict({text: [sentence(rng, 10, name) for name in names], label: names})

    return DatasetDict({"train": split(45, 0), "validation": split(12, 1), "test": split(18, 2)})


def _labelled(text: str, label: str) -> Make:
    def make(path: Path) -> None:
        path.mkdir(exist_ok=True)
        for name, part in _rows(text, label).items():
            part.to_csv(path / f"{name}.csv")

    return make


def _csv(text: str, label: str | None = None, *names: str, unlabelled_every: int = 0) -> Make:
    """Return a function that writes sixty texts, labelled with the names if `label` is set."""

    def make(path: Path) -> None:
        rng = random.Random(3)
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow([text] if label is None else [text, label])
            for i in range(60):
                known = "" if unlabelled_every and i % unlabelled_every == 0 else (names or (*TOPICS,))[i % 3]
                row = sentence(rng, 10, [*TOPICS][i % 3])
                writer.writerow([row] if label is None else [row, known])

    return make


def _documents() -> DatasetDict:
    rng = random.Random(5)
    return DatasetDict({
        split: Dataset.from_dict({"text": [sentence(rng, rng.randint(5, 40)) for _ in range(count)]})
        for split, count in (("train", 24), ("test", 6))
    })  # fmt: skip


def _corpus(path: Path) -> None:
    _save(path, _documents())


def _save(path: Path, splits: Mapping[str, Any]) -> None:
    path.mkdir(exist_ok=True)
    for split, rows in splits.items():
        part = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
        part.to_json(path / f"{split}.jsonl")


def _lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _chats(path: Path) -> None:
    said = [("user", "the cat sat"), ("assistant", "on the mat"), ("user", "then"), ("assistant", "it ran home")]
    turns = [{"role": role, "content": text} for role, text in said]
    _lines(path, [{"messages": turns[: 2 + 2 * (i % 2)]} for i in range(12)])


def _prompts(path: Path) -> None:
    _lines(path, [{"prompt": " ".join(WORDS[i : i + 4]), "completion": " ".join(WORDS[i : i + 9])} for i in range(12)])


def _tokens(path: Path) -> None:
    rows = [{"input_ids": [5 + i, 6, 7, 8, 1], "labels": [-100, -100, 7, 8, 1]} for i in range(12)]
    Dataset.from_list(rows).to_parquet(path)


def _template(path: Path) -> None:
    path.write_text("Write about {{ label }}.\n{% for shot in shots %}\nTicket: {{ shot.text }}\n{% endfor %}\nTicket:")


def _question(path: Path) -> None:
    path.write_text("{% for shot in shots %}{{ shot.text }}: {{ shot.label }}\n{% endfor %}{{ text }}:")


def _several(path: Path) -> None:
    rows = _rows("text", "label")
    _save(path, {s: {"text": part["text"], "topics": [[each] for each in part["label"]]} for s, part in rows.items()})


def _ranking(path: Path) -> None:
    rng = random.Random(6)

    def split(count: int) -> dict[str, list[Any]]:
        return {
            "query_id": [i // 3 for i in range(count)],
            "query": [WORDS[i // 3] for i in range(count)],
            "passage": [sentence(rng, 8) for _ in range(count)],
            "relevance": [i % 3 for i in range(count)],
        }

    _save(path, {"train": split(30), "test": split(12)})


def _words(path: Path) -> None:
    _save(path, {"train": entities(0, 40), "test": entities(1, 16)})


def _pairs(path: Path) -> None:
    words = ["the", "cat", "sat", "on", "a", "mat"]

    def split(count: int) -> dict[str, list[str]]:
        rows = [words[i % 4 :] for i in range(count)]
        return {
            "source": [f"{i} " + " ".join(row) for i, row in enumerate(rows)],
            "target": [" ".join(row) for row in rows],
        }

    _save(path, {"train": split(16), "test": split(6)})


def _photos(path: Path) -> None:
    folders(path, train=pictures(0, 24), test=pictures(1, 9))


def _cat(path: Path) -> None:
    path.write_bytes(encode(pixels("red", np.random.default_rng(0)), "JPEG"))


def _choices(path: Path) -> None:
    names = [*TOPICS]

    def split(count: int, seed: int) -> dict[str, list[Any]]:
        rng = random.Random(seed)
        return {
            "question": [sentence(rng, 6, names[i % 3]) for i in range(count)],
            "options": [names for _ in range(count)],
            "answer": [i % 3 for i in range(count)],
        }

    _save(path, {"train": split(24, 0), "test": split(9, 1)})


def _answers(path: Path) -> None:
    def split(count: int, seed: int) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        found = []
        for _ in range(count):
            words = sentence(rng, 9).split()
            at = rng.randrange(len(words))
            start = len(" ".join(words[:at])) + bool(at)
            answers = {"text": [words[at]], "answer_start": [start]}
            found.append({"question": f"who {words[at]}", "context": " ".join(words), "answers": answers})
        return found

    _save(path, {"train": Dataset.from_list(split(24, 0)), "test": Dataset.from_list(split(9, 1))})

"""Evaluations that continue after an interruption: finished work is kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glass_mlx.chat_templates import Messages
from glass_mlx.config import Setting
from glass_mlx.fidelity.methods import Evaluation
from glass_mlx.fidelity.prompts import Continuation, WritingSettings, continue_prompts
from glass_mlx.fidelity.report import Outcome
from glass_mlx.fidelity.tasks import Sample
from glass_mlx.files import cache_folder, write_text
from glass_mlx.prior.file import cache_name
from glass_mlx.reporting.machine import made_with
from glass_mlx.session import Session

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

Outcomes = dict[tuple[str, Setting], list[Outcome]]


def cached_continuations(
    session: Session,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Messages],
    settings: WritingSettings,
    load_options: Sequence[Any],
) -> list[Continuation]:
    """Have the dense model continue prompts, or read its continuations from the cache.

    Every batch is written to the cache as soon as it is complete.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        prompts: the prompts.
        settings: how the model writes.
        load_options: how the weights were loaded, which also affects the continuations.
    """
    key = [made_with(), prompts, settings.tokens, settings.temperature, settings.seed]
    key += [settings.batch_size, *load_options, cache_name("", session.fingerprint)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = cache_folder() / "continuations" / f"{digest}.json"
    texts = json.loads(file.read_text()) if file.is_file() else []
    total, cached = settings.tokens * len(prompts), len(texts)
    with tqdm(total=total, initial=settings.tokens * cached, desc="writing", unit="tok") as bar:
        for batch in continue_prompts(
            session.model, tokenizer, prompts, settings, cached, bar.update
        ):
            texts.extend(map(asdict, batch))
            write_text(file, json.dumps(texts))
    return [Continuation(**text) for text in texts]


def evaluation_digest(
    evaluation: Evaluation, samples: Sequence[Sample], about: dict[str, Any]
) -> str:
    """Return a hash of everything that the outcomes of an evaluation depend on.

    Args:
        evaluation: the evaluation.
        samples: its texts.
        about: a description of the conditions.
    """
    identity = [
        about,
        evaluation.settings,
        {name: asdict(config) for name, config in evaluation.configs.items()},
        evaluation.rivals,
        [asdict(sample.text) for sample in samples],
        cache_name("", evaluation.session.fingerprint),
        evaluation.prior.digest,
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def evaluate(
    evaluation: Evaluation, samples: Sequence[Sample], digest: str, partial: Path | None
) -> Outcomes:
    """Score all texts, and keep the outcomes of finished texts in a file.

    The first line of the file is the digest of the evaluation. Every other line has the outcomes
    of one text.

    Args:
        evaluation: the evaluation.
        samples: its texts.
        digest: `evaluation_digest` of both.
        partial: the file. Outcomes of an earlier run are read from it. Default: none.

    Raises:
        ValueError: if the file belongs to another evaluation.
    """
    records = _read_partial(partial, digest) if partial and partial.is_file() else []
    if partial:
        # Write the file again without an incomplete last line.
        write_text(partial, "\n".join([digest, *map(json.dumps, records)]) + "\n")
    outcomes: Outcomes = {}
    for number, sample in enumerate(tqdm(samples, desc="scoring", unit="prompt")):
        if number < len(records):
            record = records[number]
        else:
            scored = evaluation.score(sample, number)
            record = [[*key, asdict(outcome)] for key, outcome in scored.items()]
            if partial:
                with partial.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        for method, setting, outcome in record:
            outcomes.setdefault((method, Setting(*setting)), []).append(Outcome(**outcome))
    return outcomes


def _read_partial(partial: Path, digest: str) -> list[list[Any]]:
    """Read the records of an earlier run, up to the first incomplete line."""
    head, *lines = partial.read_text().split("\n")
    if head != digest:
        raise ValueError(
            f"{partial} is from another evaluation that was interrupted; finish that evaluation "
            "with its original arguments, or delete the file"
        )
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records

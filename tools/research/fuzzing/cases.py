"""Mutated files by number: the same seed and number give the same files on every machine."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import Any

from fuzzing import gguf_seeds, seeds
from fuzzing.byte_mutations import mutate_bytes
from fuzzing.cache_mutations import mutate_cache
from fuzzing.digest_mutations import mutate_prior, mutate_statistics
from fuzzing.gguf_mutations import mutate_gguf
from fuzzing.json_mutations import mutate_json, to_text
from fuzzing.mutation import Expected, Mutation
from fuzzing.safetensors_mutations import mutate_index, mutate_safetensors
from fuzzing.seeds import CACHE_FILE, STATISTICS_FILE, Files

GGUF_FILE = "model.gguf"
_INDEX = "model.safetensors.index.json"
# Files that a model folder can do without.
_OPTIONAL = {_INDEX, "generation_config.json"}


@dataclass(frozen=True)
class Case:
    """Mutated files.

    Attributes:
        number: its number.
        format: which files are mutated, a key of `FORMATS`.
        seed: the name of the valid files that they come from.
        files: all files, mutated and not.
        mutation: what was changed.
    """

    number: int
    format: str
    seed: str
    files: Files
    mutation: Mutation


def make_case(seed: int, number: int) -> Case:
    """Make a case from the seed of all cases and its number."""
    rng = random.Random(f"{seed}/{number}")
    kind = case_format(number)
    name = rng.choice(list(seed_files(kind)))
    files, mutation = FORMATS[kind](rng, name)
    return Case(number, kind, name, files, mutation)


def case_numbers(formats: list[str], cases: int) -> list[int]:
    """Return the first numbers of cases with some formats, which take turns."""
    numbers: Iterator[int] = (number for number in count() if case_format(number) in formats)
    return list(islice(numbers, cases))


def case_format(number: int) -> str:
    """Return the format of a case, a key of `FORMATS`."""
    return [*FORMATS][number % len(FORMATS)]


@cache
def _gguf_files() -> dict[str, Files]:
    return {name: {GGUF_FILE: make().layout().content} for name, make in gguf_seeds.SEEDS.items()}


def seed_files(kind: str) -> dict[str, Files]:
    """Return the valid files of a format, by the name of the seed."""
    if kind == "gguf":
        return _gguf_files()
    if kind == "prior":
        return seeds.priors()
    return seeds.caches() if kind == "cache" else seeds.folders()


def _mutate_gguf(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    content, mutation = mutate_gguf(rng, gguf_seeds.SEEDS[name]())
    return {GGUF_FILE: content}, mutation


def _mutate_prior(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    ((file, content),) = seeds.priors()[name].items()
    if rng.random() < 0.6:
        content, mutation = mutate_prior(rng, content)
        return {file: content}, mutation
    content, mutation = mutate_safetensors(rng, content)
    return {file: content}, _behind_digest(mutation)


def _mutate_cache(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    files = dict(seeds.caches()[name])
    choice = rng.random()
    if STATISTICS_FILE in files and choice < 0.3:
        return mutate_statistics(rng, files)
    if STATISTICS_FILE in files and choice < 0.4:
        content, mutation = mutate_safetensors(rng, files[STATISTICS_FILE])
        return files | {STATISTICS_FILE: content}, _behind_digest(mutation)
    if choice < 0.42:
        file = rng.choice(list(files))
        del files[file]
        return files, Mutation(f"{file} is missing", Expected.REFUSED)
    change = mutate_cache if choice < 0.75 else mutate_safetensors
    content, mutation = change(rng, files[CACHE_FILE])
    return files | {CACHE_FILE: content}, mutation


def _behind_digest(mutation: Mutation) -> Mutation:
    """Return the mutation of a file whose digest tells every change of its contents."""
    is_changed = mutation.expected is Expected.ANY
    return Mutation(mutation.what, Expected.SAME_IF_LOADED) if is_changed else mutation


def _mutate_json_file(
    rng: random.Random, name: str, file: str, edit: Callable[[random.Random, Any], Mutation]
) -> tuple[Files, Mutation]:
    """Change one of a folder's JSON files: its bytes, any of its values, or particular ones.

    Args:
        rng: the source of choices.
        name: the folder.
        file: the file.
        edit: changes particular values in place.
    """
    files = dict(seeds.folders()[name])
    choice, content = rng.random(), files[file]
    if choice < 0.02:
        del files[file]
        expected = Expected.FINITE if file != "config.json" else Expected.REFUSED
        return files, Mutation(f"{file} is missing", expected)
    if choice < 0.2:
        bytes_edit = mutate_bytes(rng, content)
        files[file], what = bytes_edit.content, bytes_edit.what
        return files, Mutation(f"{file}: {what}", Expected.FINITE)
    tree = json.loads(content)
    if choice < 0.5:
        mutation = edit(rng, tree)
        files[file] = to_text(tree)
        return files, Mutation(f"{file}: {mutation.what}", mutation.expected)
    change = mutate_json(rng, tree)
    files[file] = change.content
    expected = Expected.SAME if change.keeps_meaning else Expected.FINITE
    return files, Mutation(f"{file}: {change.what}", expected)


def _mutate_tokenizer(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    if rng.random() < 0.7:
        return _mutate_json_file(rng, name, "tokenizer.json", _edit_vocabulary)
    return _mutate_json_file(rng, name, "tokenizer_config.json", _edit_tokenizer_config)


def _edit_vocabulary(rng: random.Random, tree: Any) -> Mutation:
    """Change the ids of tokens, up to some that the model has no embedding for."""
    identifier = rng.choice([0, 1, 258, 262, 263, 264, 300, 70000, 2**31, 2**32 - 1])
    vocabulary: dict[str, int] = tree["model"]["vocab"]
    added: list[dict[str, Any]] = tree["added_tokens"]
    edit = rng.choice(("move", "add", "add special", "move special", "template"))
    if edit == "move":
        vocabulary[rng.choice(["h", "e", "hell", "Ġ", *vocabulary])] = identifier
    elif edit == "add":
        vocabulary["Ġw"] = identifier
        tree["model"]["merges"].append(["Ġ", "w"])
    elif edit == "add special":
        added.append(added[-1] | {"content": rng.choice(["hello", "w", " "]), "id": identifier})
    elif edit == "move special":
        rng.choice(added)["id"] = identifier
    else:
        tree["post_processor"]["special_tokens"]["<s>"]["ids"] = [identifier]
    return Mutation(f"a token's id is {identifier} ({edit})", Expected.FINITE)


def _edit_tokenizer_config(rng: random.Random, tree: Any) -> Mutation:
    templates = ("", "{% for", "{{ messages[7] }}", "{{ raise_exception('no') }}", "<|im_end|>")
    templates += ("{{ messages | map(attribute='x') | list | first }}", "{{ 1 / 0 }}", "\ud800")
    templates += ("{{ undefined.x }}", "{% include 'x' %}", "{{ 'x' * 99 }}", "{{ ''.__class__ }}")
    key = rng.choice(["chat_template", "bos_token", "eos_token", "tokenizer_class", "added"])
    if key == "chat_template":
        tree[key] = rng.choice(templates)
    elif key == "added":
        identifier = rng.choice(["0", "264", "1000", "-1", "x", ""])
        tree["added_tokens_decoder"] = {identifier: {"content": "hello", "special": True}}
        return Mutation(f"it adds a token {identifier!r}", Expected.FINITE)
    elif key == "tokenizer_class":
        names = (
            "LlamaTokenizer",
            "Qwen2Tokenizer",
            "BertTokenizer",
            "Nothing",
            "TokenizersBackend",
        )
        tree[key] = rng.choice(names)
    else:
        tree[key] = rng.choice(["hello", "absent", {"content": "hello"}, "h", ""])
    return Mutation(f"{key} is {tree[key]!r}", Expected.FINITE)


def _mutate_config(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    if rng.random() < 0.85:
        return _mutate_json_file(rng, name, "config.json", _edit_config)
    return _mutate_json_file(rng, name, "generation_config.json", _edit_eos)


def _edit_config(rng: random.Random, tree: Any) -> Mutation:
    numbers = [key for key, value in tree.items() if type(value) in (int, float)]
    key = rng.choice([*numbers, "model_type", "vocab_size", "eos_token_id", "quantization"])
    if key == "model_type":
        tree[key] = rng.choice(["mixtral", "gemma3_text", "qwen2", "mamba", "../x", "base", "os"])
    elif key == "eos_token_id":
        return _edit_eos(rng, tree)
    elif key == "quantization":
        bits, group, mode = (
            rng.choice([0, 1, 3, 4, 8, 16]),
            rng.choice([0, 16, 32, 48, 64]),
            "affine",
        )
        mode = rng.choice([mode, "mxfp4", "none"])
        tree[key] = {"bits": bits, "group_size": group, "mode": mode}
    else:
        old = tree[key]
        tree[key] = rng.choice([0, 1, -1, 2 * old, old + 1, old - 1, old / 3, 10**5, 10**9, 2**40])
    return Mutation(f"{key} is {tree[key]}", Expected.FINITE)


def _edit_eos(rng: random.Random, tree: Any) -> Mutation:
    choices = [264, -1, 10**6, 2**40, [], [264, 999], [[260]], [None], "260", ["</s>"], 1.5, None]
    tree["eos_token_id"] = rng.choice(choices)
    return Mutation(f"eos_token_id is {tree['eos_token_id']}", Expected.FINITE)


def _mutate_weights(rng: random.Random, name: str) -> tuple[Files, Mutation]:
    files = dict(seeds.folders()[name])
    if rng.random() < 0.03:
        file = rng.choice([file for file in files if file not in _OPTIONAL])
        del files[file]
        # The tokenizer's configuration is optional.
        expected = Expected.REFUSED if file.endswith(".safetensors") else Expected.FINITE
        return files, Mutation(f"{file} is missing", expected)
    if rng.random() < 0.1:
        files[_INDEX], mutation = mutate_index(rng, files[_INDEX])
        return files, mutation
    file = rng.choice([file for file in files if file.endswith(".safetensors")])
    files[file], mutation = mutate_safetensors(rng, files[file])
    return files, mutation


# What mutates each format: from a source of choices and a seed's name to files and the change.
FORMATS: dict[str, Callable[[random.Random, str], tuple[Files, Mutation]]] = {
    "gguf": _mutate_gguf,
    "prior": _mutate_prior,
    "cache": _mutate_cache,
    "tokenizer": _mutate_tokenizer,
    "config": _mutate_config,
    "weights": _mutate_weights,
}

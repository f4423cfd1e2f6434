"""The files that lm-evaluation-harness reads: a task's definition and its questions."""

import hashlib
import json
import shutil
from pathlib import Path

from glass_mlx.files import replacing
from tasks import scorers
from tasks.questions import TASKS, write_questions

# Names of tasks in the harness begin with this, so that they differ from the harness's own.
PREFIX = "glass_"

_METRICS = {"mark_json": ("right", "share", "parses")}


def write_tasks(folder: Path, names: list[str], count: int | None, seed: int) -> list[Path]:
    """Write tasks into a folder, which is replaced as a whole.

    Args:
        folder: the folder.
        names: keys of `TASKS`.
        count: the number of questions of each. Default: as `TASKS` says.
        seed: the seed of the questions.

    Returns:
        The YAML files.
    """
    address = folder.resolve()
    with replacing(address, folder=True) as temporary:
        shutil.copyfile(Path(scorers.__file__), temporary / "scorers.py")
        for name in names:
            questions = write_questions(name, count or TASKS[name].count, seed)
            lines = [
                json.dumps({"question": q.text, "answer": q.answer, "tests": q.tests})
                for q in questions
            ]
            (temporary / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
            (temporary / f"{name}.yaml").write_text(_definition(name, address))
    return [folder / f"{name}.yaml" for name in names]


def _definition(name: str, folder: Path) -> str:
    """Return a task's definition. JSON is YAML, too, except for the harness's functions."""
    task = TASKS[name]
    metrics = _METRICS.get(task.scorer, ("right", "share"))
    fields = {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [*task.until],
            "max_gen_toks": task.max_tokens,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1},
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    lines.append(f"process_results: !function scorers.{task.scorer}")
    if task.scorer == "mark_code":
        lines.append("unsafe_code: true")
    return "\n".join(lines) + "\n"


def digest(file: Path) -> str:
    """Return a hash of a task's questions and of how they are marked."""
    state = hashlib.sha256()
    for part in (file.with_suffix(".jsonl"), file.with_name("scorers.py")):
        state.update(part.read_bytes())
    return state.hexdigest()[:16]

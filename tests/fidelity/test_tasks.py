"""Tasks with known answers."""

from glass_mlx.fidelity.tasks import TASKS, write_task

import pytest


@pytest.mark.parametrize("kind", TASKS)
def test_answer_ranges_contain_the_answers(default_model, kind):
    _, tokenizer = default_model
    texts = list(write_task(kind, tokenizer, 2, seed=3))
    assert texts == list(write_task(kind, tokenizer, 2, seed=3))
    for text, answers in texts:
        lines = tokenizer.decode(text.written).strip().splitlines()
        assert len(lines) == len(answers) == 16
        for line, (start, stop) in zip(lines, answers, strict=True):
            # All generated tokens except the first are scored.
            answer = tokenizer.decode(text.written[start + 1 : stop + 1])
            assert line.endswith(answer)
            question = line.removesuffix(answer)
            if kind == "arithmetic":
                a, _, b, _ = question.split()
                assert int(answer) == int(a) + int(b)
            else:
                assert f"Say{answer}:" == question

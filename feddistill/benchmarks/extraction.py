"""Extractive question answering."""

from collections.abc import Sequence

from feddistill.accounting import FlopMeter
from feddistill.modelio import inference
from feddistill.modelio.outputs import takes_types
from feddistill.modelio.padding import PAD_TO
from feddistill.modelio.passages import QAWindow, likeliest, windows
from feddistill.runs.trained_models import Student
from feddistill.types import ProgressCallback

ANSWER_TOKENS = 30
"""Maximum length of a span, as in BERT's script and transformers' ``run_qa.py``."""
OVERLAP = 128
"""Tokens of a passage shared by consecutive windows."""


def extract(
    student: Student,
    questions: Sequence[str],
    passages: Sequence[str],
    on_step: ProgressCallback,
    *,
    unanswerable: bool,
) -> list[str]:
    """Predict the most likely span of each passage, over all of its windows.

    With ``unanswerable`` (SQuAD 2.0), the prediction is empty if the no-answer score (the minimum over the
    windows) exceeds the score of the best span; the threshold is 0.

    Raises:
        ModelError: A question is too long, or the tokenizer has no token for ``unanswerable``.
    """
    length = student.max_tokens - student.max_tokens % PAD_TO
    cut: list[QAWindow] = []
    rows: list[int] = []
    for row, (question, passage) in enumerate(zip(questions, passages, strict=True)):
        made = windows(
            student.tokenizer,
            question,
            passage,
            length,
            student.name,
            overlap=OVERLAP,
            unanswerable=unanswerable,
        )
        cut += made
        rows += [row] * len(made)
    said = inference.answer_windows(
        student.model,
        cut,
        pad_id=student.specialist.pad_id,
        types=takes_types(student.model),
        batch_size=student.batch_size,
        bf16=student.bf16,
        meter=FlopMeter(student.model),
        on_step=on_step,
    )
    best = [(-float("inf"), "")] * len(questions)
    least = [float("inf")] * len(questions)
    for row, window, (start, end) in zip(rows, cut, said, strict=True):
        score, first, last = likeliest(start, end, window, ANSWER_TOKENS)
        if score > best[row][0]:
            best[row] = score, passages[row][window.starts[first] : window.ends[last]]
        if unanswerable:
            least[row] = min(
                least[row], float(start[window.no_answer].double() + end[window.no_answer].double())
            )
    return [
        text if not unanswerable or score >= none else ""
        for (score, text), none in zip(best, least, strict=True)
    ]

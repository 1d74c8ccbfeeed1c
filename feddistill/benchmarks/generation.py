"""Text generation with a causal language model: prompt truncation, greedy search, stop strings."""

from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig

from feddistill.benchmarks.likelihood import encode
from feddistill.errors import ModelError
from feddistill.models.tokenizers import end_id
from feddistill.runs.trained_models import Student
from feddistill.types import ProgressCallback


def fitted(student: Student, template: str, row: Mapping[str, str], cut: str, room: int) -> str:
    """Format a prompt of at most ``room`` tokens, truncating the end of the column ``cut`` if necessary.

    Raises:
        ModelError: The prompt is too long even with that column empty.
    """
    text = template.format(**row)
    if (over := len(encode(student, text)) - room) <= 0:
        return text
    ends = student.tokenizer(row[cut], add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    keep = len(ends)
    while over > 0 and keep > 0:
        keep = max(0, keep - over)
        shorter = row[cut][: ends[keep - 1][1]] if keep else ""
        text = template.format(**{**row, cut: shorter})
        over = len(encode(student, text)) - room
    if over > 0:
        raise ModelError(
            f"{student.name} has room for a prompt of {room} tokens; one has {room + over} even without {cut}"
        )
    return text


def generate(
    student: Student,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: Sequence[str] = (),
    on_step: ProgressCallback | None = None,
) -> list[str]:
    """Continue each prompt by greedy search.

    Generation ends at an end token, before the first of ``stop``, or after ``new_tokens`` tokens. Prompts are
    batched by length and padded on the left.
    """
    tokenizer, size = student.tokenizer, student.batch_size
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    end = end_id(tokenizer)
    filler = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=filler,
        eos_token_id=end,
        stop_strings=list(stop) or None,
    )
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), longest), filler)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, longest - len(prompts[row]) :] = 1
        with (
            torch.inference_mode(),
            torch.autocast(student.device.type, torch.bfloat16, enabled=student.bf16),
        ):
            written = student.model.generate(  # type: ignore[operator]  # transformers' models have generate
                ids.to(student.device),
                attention_mask=mask.to(student.device),
                generation_config=settings,
                tokenizer=tokenizer if stop else None,
            )
        for place, row in enumerate(rows):
            text = tokenizer.decode(written[place, longest:], skip_special_tokens=True)
            found[row] = before(text, stop).strip()
        if on_step is not None:
            on_step(start + len(rows), len(order))
    return found


def before(text: str, stop: Sequence[str]) -> str:
    """The part of a text before the first of ``stop``.

    >>> before("Paris\\n\\nQuestion: what", ["\\n", "ProxyQuery"])
    'Paris'
    """
    places = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(places)] if places else text

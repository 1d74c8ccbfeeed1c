"""Conversations as texts: a chat template writes the messages, and the assistant's turns are found."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from feddistill.config import Config
from feddistill.config.models import QueryOnlyModel, ScratchModel, TrainedTokenizer
from feddistill.errors import DataError, ModelError
from feddistill.models.sources import first_line
from feddistill.models.tokenizers import END, PAD, tokenizer_of
from feddistill.types import Span, Splits, TextSet

ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant writes."""

PROBE = "\ue000assistant\ue000"
"""Stands for a message to find what a template writes around it; in no real text."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template in Jinja, with the special tokens that it can name."""

    text: str
    tokens: Mapping[str, str]

    def write(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of messages; with ``prompt``, followed by the beginning of the assistant's next turn."""
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.text,
            add_generation_prompt=prompt,
            **self.tokens,
        )
        return str(text)

    def marked(self, messages: Sequence[Message]) -> list[Span]:
        """The parts that the template marks as the assistant's."""
        _, (spans,) = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **self.tokens,
        )
        return [(int(start), int(end)) for start, end in spans]


def of_splits(config: Config, splits: Splits) -> Splits:
    """All sets with conversations written as texts."""
    return replace(
        splits,
        private=tuple(of_texts(config, texts) for texts in splits.private),
        proxy=of_texts(config, splits.proxy),
        validation=of_texts(config, splits.validation),
        test=of_texts(config, splits.test),
    )


def of_texts(config: Config, texts: TextSet) -> TextSet:
    """A set with its conversations, if it has any, written by the student's chat template.

    Raises:
        ModelError: There is no template.
        DataError: The template does not take a conversation, or hides where the assistant's turns are.
    """
    if not texts.conversations:
        return texts
    template = template_of(config)
    written, turns = [], []
    for row, text in enumerate(texts.texts):
        try:
            whole, spans = write(json.loads(text), template)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{texts.name}: the chat template does not take the conversation {texts.ids[row]}: "
                f"{first_line(error)}"
            ) from None
        if not whole:
            raise DataError(f"{texts.name}: the chat template writes nothing for {texts.ids[row]}")
        written.append(whole)
        turns.append(spans)
    if not any(turns):
        raise DataError(f"{texts.name}: no conversation has a turn of the assistant")
    return replace(texts, texts=tuple(written), turns=tuple(turns), conversations=False)


def template_of(config: Config) -> ChatTemplate:
    """The run's chat template: that of ``language.chat_template``, or else of the student's tokenizer.

    Raises:
        ModelError: There is neither.
    """
    source: Any = config.student.model.source
    while isinstance(source, ScratchModel | QueryOnlyModel):
        source = source.tokenizer
    own: Any = None
    tokens = {"eos_token": END, "pad_token": PAD}
    if not isinstance(source, TrainedTokenizer):  # it needs the proxy texts, and has no template
        tokenizer = tokenizer_of(source, "student.model")
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        tokens = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    if (text := config.language.chat_template or own) is None:
        raise ModelError(
            "student.model: its tokenizer has no chat template, which messages_column needs; set "
            "language.chat_template"
        )
    return ChatTemplate(text, tokens)


def write(messages: Sequence[Message], template: ChatTemplate) -> tuple[str, tuple[Span, ...]]:
    """The text of a conversation, and the assistant's parts of it.

    A bos token at the beginning and an end token at the end are left out: each text gets them anyway.

    Raises:
        ValueError: A turn of the assistant cannot be found in the text.
    """
    text = template.write(messages)
    if GENERATION.search(template.text):
        spans = template.marked(messages)
    else:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                after = spans[-1][1] if spans else 0
                spans.append(_turn(messages, index, text, after, template))
    bos, eos = template.tokens.get("bos_token"), template.tokens.get("eos_token")
    first, last = 0, len(text)
    if bos and text.startswith(bos):
        first = len(bos)
    if eos and (stripped := text.rstrip()).endswith(eos):
        last = max(first, len(stripped) - len(eos))
    cut = [(max(start, first) - first, min(end, last) - first) for start, end in spans]
    return text[first:last], tuple((start, end) for start, end in cut if start < end)


def _turn(messages: Sequence[Message], index: int, text: str, after: int, template: ChatTemplate) -> Span:
    """Where the assistant's turn ``index`` is in the text of all messages, from the place ``after`` on.

    It includes what ends the turn, but not the beginning that the template writes for the assistant.
    """
    message, earlier = messages[index], messages[:index]
    before, prompt = template.write(earlier), template.write(earlier, prompt=True)
    head, found, ending = template.write([*earlier, {**message, "content": PROBE}]).partition(PROBE)
    if text.startswith(before):
        after = max(after, len(before))
    if prompt != before and text.startswith(prompt):
        after = max(after, len(prompt))
    for content in (message["content"], message["content"].strip()):
        # A turn can be written in another way if others follow, as without its thoughts.
        alike = text.startswith(head + content + ending)
        place = len(head) if alike else text.find(content + ending, after)
        if found and place >= 0:
            start = after if prompt != before and after == len(prompt) else place
            return start, place + len(content + ending)
    raise ValueError(
        f"the assistant's message {index} is not in its text as it is; mark it with {{% generation %}}"
    )

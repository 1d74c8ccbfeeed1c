"""Conversations are written by the chat template, and only the assistant's turns are learned."""

import json

import numpy as np
import pytest
from language_fixtures import LLAMA, settings

from feddistill import data
from feddistill.config import parse
from feddistill.config.models import TrainedTokenizer
from feddistill.engines.remote import PROXY, RemoteClient
from feddistill.errors import ConfigError, DataError, ModelError
from feddistill.models import causal
from feddistill.models.tokenizers import text_bounds, tokenizer_of
from feddistill.runs import experiment
from feddistill.tasks.conversations import ChatTemplate, write
from feddistill.types import TextSet

CHAT = [
    {"role": "user", "content": "a, or an?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because it is."},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
THINKS = (  # as Qwen 3: only the last turn begins with thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_PROMPT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, ["a<|im_end|>\n", "Because it is.<|im_end|>\n"]),
        (PLAIN, ["a\n", "Because it is.\n"]),
        (LLAMA_2, ["a </s>", "Because it is. "]),
        (MARKED, ["a</s>", "Because it is."]),
        (THINKS, ["a<|im_end|>\n", "<think>\n\n</think>\n\nBecause it is.<|im_end|>\n"]),
        (OTHER_PROMPT, ["a<|im_end|>\n", "Because it is.<|im_end|>\n"]),
    ],
)
def test_the_turns_of_the_assistant_are_found_whatever_the_template(template, turns):
    text, spans = write(CHAT, ChatTemplate(template, TOKENS))
    assert [text[start:end] for start, end in spans] == turns
    assert not text.startswith("<s>")  # each text gets these two anyway
    assert not text.endswith("</s>")
    whole = ChatTemplate(template, TOKENS).write(CHAT)
    assert whole.removeprefix("<s>").removesuffix("</s>") == text


def test_tokens_of_others_are_not_learned():
    text, spans = write(CHAT, ChatTemplate(PLAIN, {}))
    texts = TextSet("t", ("0",), (text,), np.zeros(1, np.int64), (), turns=(spans,))
    tokenizer = tokenizer_of(TrainedTokenizer(vocab_size=300), "s", [text * 3])
    reader = causal.TextReader(tokenizer, text_bounds(tokenizer, "auto", "s"), answers_only=True)
    blocks = reader.blocks(texts, 8)
    said = tokenizer.decode(blocks.targets[blocks.loss_mask])
    assert said.replace(" ", "") == "a\nBecauseitis.\n<|end|>"
    assert reader.bytes(texts) == len("a\nBecause it is.\n")
    assert texts.digest() != TextSet("t", ("0",), (text,), np.zeros(1, np.int64), ()).digest()
    everything = causal.TextReader(tokenizer, reader.bounds).blocks(texts, 8)
    assert everything.loss_mask.all()


def of(folder, rows, task="causal_lm", **language):
    """A run of rows in a file."""
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "path": str(folder / "chats.jsonl"), "messages_column": "messages"}
    made = settings("chats", [LLAMA], LLAMA, sizes=(2, 2, 1, 1), task=task, language=language)
    made["data"] |= {
        "source": {**source, "label_column": None},
        "partition": {"kind": "iid", "clients": 1},
    }
    return made


ROWS = [{"messages": CHAT, "text": "t"}] * 6


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": "hello"}], r"row 5 has no list of messages .* in 'messages' \(chats.jsonl, "),
        ([{"messages": []}], "row 5 has no list of messages"),
        ([{"messages": [{"role": "user"}]}], "row 5 has a message 0 without a text for 'content'"),
        ([{"messages": [CHAT[0], {"content": "a"}]}], "row 5 has a message 1 without a text for 'role'"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "a text for 'content'"),
    ],
)
def test_what_is_no_conversation_is_one_line(rows, words, tmp_path):
    config = parse(of(tmp_path, ROWS[1:] + rows, chat_template=CHATML))
    with pytest.raises(DataError, match=words):
        experiment.check(config, build=False)


def test_templates_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"no chat template, .* messages_column .*language\.chat_template"):
        experiment.check(parse(of(tmp_path, ROWS)), build=False)
    for template, words in (
        ("{{ raise_exception('roles must alternate') }}", "chats/. ?: roles must alternate"),
        ("{% for %}", "the chat template does not take the conversation"),
        (
            "{{ messages[0].content | upper }}",
            r"assistant's message 1 is not in its text.*\{% generation %\}",
        ),
        ("{% if false %}{% endif %}", "is not in its text as it is"),
    ):
        with pytest.raises(DataError, match=words):
            experiment.check(parse(of(tmp_path, ROWS, chat_template=template)), build=False)
    config = parse(of(tmp_path, [{"messages": CHAT[:1]}] * 6, chat_template=CHATML))
    with pytest.raises(DataError, match="no conversation has a turn of the assistant"):
        experiment.check(config, build=False)
    with pytest.raises(ConfigError, match=r"language\.chat_template: cannot read 'no\.jinja': No such file"):
        parse(of(tmp_path, ROWS, chat_template="no.jinja"))


def test_conversations_are_for_language_models_and_beside_no_texts(tmp_path):
    config = of(tmp_path, ROWS, chat_template=CHATML)
    config["data"]["source"]["prompt_column"] = "text"
    with pytest.raises(ConfigError, match="set messages_column or prompt_column, not both"):
        parse(config)
    for task in ("classification", "question_answering"):
        with pytest.raises(DataError, match=f"messages_column is for causal_lm or masked_lm, not .*{task}"):
            data.load(parse(of(tmp_path, ROWS)).data, 0, task)


def test_a_file_with_the_template_is_stored_and_turns_travel_with_the_texts(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    config = parse(of(tmp_path, ROWS, chat_template=str(tmp_path / "chat.jinja"), completion_only=True))
    assert config.language.chat_template == CHATML
    splits = experiment.check(config, build=False)
    lines = b"".join(data.lines(splits.proxy))
    for row, line in enumerate(lines.splitlines()):
        assert tuple(map(tuple, json.loads(line)["turns"])) == splits.proxy.turns[row]

    class Run:
        """The run of a client that has been sent the proxy texts."""

        def read_bytes(self, name):
            assert name == PROXY
            return lines

    received = RemoteClient._proxy(None, Run(), ())
    assert received.digest() == splits.proxy.digest()
    assert received.turns == splits.proxy.turns

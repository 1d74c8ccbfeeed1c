"""Small real parts: a tokenizer trained here, encoders of a few thousand weights, a run of seconds."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # for `import bench`; installed packages go first

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes with two threads each wait for each other; tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning took 9 of 10 seconds of the tests of threads


def pytest_addoption(parser):
    parser.addoption("--fuzz-seed", type=int, default=0, help="Seed of the random kernel cases.")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="Where kernel tests run.")
    parser.addoption("--share", metavar="I/N", help="Of the kernel tests the I-th of N shares, I from 0.")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: it runs on this CPU


def pytest_collection_modifyitems(items):
    """The file that takes longest first: two test processes then end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_gpu_resources.py")


def pytest_report_header(config):
    return f"fuzz seed: {config.getoption('--fuzz-seed')}, kernels on {config.getoption('--device')}"


@pytest.fixture
def fuzz_seed(request):
    return request.config.getoption("--fuzz-seed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A two-layer BERT with random weights and a WordPiece tokenizer, as ``save_pretrained`` leaves them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from feddistill.config.data import EmbeddedSource
    from feddistill.data.sources import read

    folder = tmp_path_factory.mktemp("tiny-bert")
    texts = read(EmbeddedSource(), "texts").texts[:2000]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    import torch

    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory):
    """A two-layer GPT-2 with random weights and a byte-level BPE, as ``save_pretrained`` leaves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from feddistill.config.data import EmbeddedSource
    from feddistill.data.sources import read

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        read(EmbeddedSource(), "texts").texts[:1000],
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<end>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    config.bos_token_id = config.eos_token_id = fast.eos_token_id
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_settings(tiny_model):
    return tiny_settings_of(tiny_model)


@pytest.fixture(scope="session")
def new_tiny_settings(tiny_model):
    """``tiny_settings``, made anew by each call: for what the tests of a file share."""
    return lambda: tiny_settings_of(tiny_model)


def tiny_settings_of(tiny_model):
    """Three clients, two rounds, a hundred texts each: settings as a mapping."""
    model = {"source": {"kind": "hub", "name": str(tiny_model)}, "max_tokens": 24}
    training = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "head_learning_rate": 1e-2}
    return {
        "name": "tiny",
        "rounds": 2,
        "threads": 1,
        "precision": "fp32",
        "data": {
            "private": {"size": 300},
            "proxy": {"size": 120, "labelled": 40},
            "validation": {"size": 60},
            "test": {"size": 100},
            "partition": {"kind": "dirichlet", "clients": 3, "alpha": 0.5, "min_examples": 30},
        },
        "clients": {"models": [model], "training": training, "codistillation": {"examples": 60}},
        "student": {"model": {**model, "layers": [0]}, "training": training},
        "baselines": ["public_only", "local_only", "centralized"],
    }


@pytest.fixture
def tiny_config(tiny_settings):
    from feddistill.config import parse

    return parse(tiny_settings)


@pytest.fixture
def tiny_file(tiny_settings, tmp_path):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    return path

"""``evaluate FOLDER --benchmark`` of a RoBERTa whose tokenizer has no length, with a long text."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pandas
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

with tempfile.TemporaryDirectory() as scratch:
    model, data = Path(scratch) / "model", Path(scratch) / "data"
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "word": 4}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(model)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=5, **size, max_position_embeddings=66)
    config.id2label = {0: "negative", 1: "positive"}
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(model)
    (data / "sst2").mkdir(parents=True)
    rows = [{"sentence": "word " * (9 + 200 * i), "label": i % 2, "idx": i} for i in range(4)]
    pandas.DataFrame(rows).to_parquet(data / "sst2" / "validation-00000-of-00001.parquet")
    files = {"config_name": "sst2", "data_files": [{"split": "validation", "path": "sst2/validation-*"}]}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [files]})}---\n")
    command = ["evaluate", "model", "--benchmark", "glue/sst2", "--path", "data"]
    command = [sys.executable, "-m", "feddistill.cli", *command]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
print(f"exit status {done.returncode}: {(done.stdout or done.stderr).strip().splitlines()[-1]}; right: 0")
sys.exit(done.returncode)

"""An endpoint whose head is wider than its tokenizer gives an id that the tokenizer does not have."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from feddistill.config.models import EndpointModel
from feddistill.errors import FeddistillError

try:
    from feddistill.tasks.query_only.endpoint import Endpoint
except ImportError:  # an older version
    from feddistill.black_box import Endpoint

WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}


class Handler(BaseHTTPRequestHandler):
    """Completions of one prompt: half of the probability is at id 3, the rest at id 8 of 5."""

    def do_POST(self) -> None:
        """Reply."""
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"][0]
        rows = [None, *[{"token_id:3": -0.693147, "token_id:8": -0.8}] * len(prompt)]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"index": 0, "logprobs": {"top_logprobs": rows}}]}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]")),
    pad_token="[PAD]",
    unk_token="[UNK]",
)
source = EndpointModel(
    kind="endpoint",
    url=f"http://127.0.0.1:{server.server_port}/v1",
    model="m",
    tokenizer={"kind": "trained"},
    top=2,
)
try:
    (rows,) = Endpoint(source, tokenizer, "clients.models.0").query([[2, 3, 4]], 5)
except FeddistillError as error:
    sys.exit(f"the run ends: {error}; right: its mass goes to the rest")
probs = rows.expand().exp()[0]
print(f"id 3 has {float(probs[3]):.3f}, each other {float(probs[2]):.3f}; right: 0.500 and 0.125")
sys.exit(not (abs(float(probs[3]) - 0.5) < 1e-3 and abs(float(probs[2]) - 0.125) < 1e-3))

"""Projection of predictions over a client's tokens to the tokens of the student's tokenizer."""

from feddistill.alignment.baselines import mined_map, mined_project, uld_loss
from feddistill.alignment.projection import THRESHOLD, project
from feddistill.alignment.rows import Projection
from feddistill.alignment.spans import Reading, spans
from feddistill.alignment.vocabulary import Vocabulary, canonical_bytes, fingerprint
from feddistill.alignment.vocabulary_map import VocabularyMap, check_alignable, map_vocabulary

__all__ = [
    "THRESHOLD",
    "Projection",
    "Reading",
    "Vocabulary",
    "VocabularyMap",
    "canonical_bytes",
    "check_alignable",
    "fingerprint",
    "map_vocabulary",
    "mined_map",
    "mined_project",
    "project",
    "spans",
    "uld_loss",
]

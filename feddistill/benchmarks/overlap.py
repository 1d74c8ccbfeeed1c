"""Overlap with reference texts: ROUGE and BLEU, computed by rouge-score and sacrebleu."""

from collections.abc import Sequence
from statistics import fmean

from feddistill.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(given: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2, -L and -Lsum with stemming, from 0 to 1 (Lin, 2004; package rouge-score)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge-score") from None
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    found = [scorer.score(gold, text) for text, gold in zip(given, right, strict=True)]
    return {name: round(fmean(score[name].fmeasure for score in found), 6) for name in ROUGE}


def bleu(given: Sequence[str], right: Sequence[str]) -> dict[str, float | str]:
    """Corpus BLEU from 0 to 100 and its signature (Papineni et al., 2002; package sacrebleu)."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise _missing("sacrebleu") from None
    metric = BLEU()
    score = metric.corpus_score(list(given), [list(right)])
    return {"bleu": round(score.score, 6), "bleu_signature": str(metric.get_signature())}


def _missing(package: str) -> ConfigError:
    return ConfigError(f"summaries are evaluated with the package {package}: pip install 'feddistill[eval]'")

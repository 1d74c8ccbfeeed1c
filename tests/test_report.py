"""The report's skew: each number where they can be read, a picture and a summary where they are too many."""

import re

import matplotlib
import pytest

from feddistill.data import Skew
from feddistill.report import plots, skew_lines


def skewed(clients, labels):
    counts = tuple(tuple((3 * c + 7 * n) % 11 for n in range(labels)) for c in range(clients))
    return Skew(
        clients=tuple(f"client-{n}" for n in range(clients)),
        labels=tuple(f"label-{n}" for n in range(labels)),
        counts=counts,
        proxy_counts=(0,) * labels,
        non_iid=0.25,
        size_ratio=1.5,
        proxy_examples=10,
        test_examples=20,
        validation_examples=30,
        test_also_public=0,
    )


def texts(skew):
    with matplotlib.rc_context(rc=plots.STYLE):
        return re.findall(r"<text[^>]*>([^<]*)</text>", plots._skew(skew))


def test_few_say_each_number():
    skew = skewed(3, 4)
    said = texts(skew)
    for counts in skew.counts:
        assert all(str(count) in said for count in counts)
    assert {*skew.labels, f"client-0 ({sum(skew.counts[0])})"} <= set(said)
    assert [line.split()[-1] for line in skew_lines(skew)[1:4]] == [str(sum(c)) for c in skew.counts]


@pytest.mark.parametrize(("clients", "labels"), [(3, 10_000), (200, 5)])
def test_many_stay_readable(clients, labels):
    skew = skewed(clients, labels)
    said = texts(skew)
    assert len(said) < 100
    assert ("client-0 (" in " ".join(said)) == (clients <= plots.WRITTEN)
    assert all(len(line) < 200 for line in skew_lines(skew))


def test_a_client_of_many_labels_is_summed_up():
    skew = skewed(2, 100)
    header, first, *_ = skew_lines(skew)
    assert header.split() == ["labels", "total", "its", "most", "frequent", "label"]
    counts = skew.counts[0]
    top = counts.index(max(counts))
    has = sum(map(bool, counts))
    assert first.split() == ["client-0", str(has), str(sum(counts)), f"label-{top}:", str(max(counts))]

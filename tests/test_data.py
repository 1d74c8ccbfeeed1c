"""Everybody's texts: read from anywhere, divided without overlap, wrong ones refused by name."""

import json
import re

import hub_fixtures
import numpy as np
import pytest

from feddistill.config import parse
from feddistill.config.data import DirichletPartition, HubSource
from feddistill.data import load, skew
from feddistill.data.partition import client_names, partition
from feddistill.data.sources import read
from feddistill.errors import ConfigError, DataError
from feddistill.types import UNLABELLED, TextSet

SMALL = {
    "private": {"size": 400},
    "proxy": {"size": 100, "labelled": 20},
    "validation": {"size": 50},
    "test": {"size": 80},
}

PARTITIONS = {
    "iid": {"kind": "iid", "clients": 4},
    "dirichlet": {"kind": "dirichlet", "clients": 4, "alpha": 0.3, "min_examples": 20},
    "quantity": {"kind": "quantity", "clients": 4, "alpha": 0.5, "min_examples": 20},
    "by_source": {"kind": "by_source"},
}


def splits(seed=0, **changes):
    return load(parse({"data": {**SMALL, **changes}}).data, seed)


def of(partition):
    source = {"kind": "embedded", "name": "sotu_eras" if partition == "by_source" else "wordnet_topics"}
    return splits(source=source, partition=PARTITIONS[partition])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_text_goes_to_exactly_one_place(partition):
    found = of(partition)
    ids = [i for part in (*found.private, found.proxy, found.validation, found.test) for i in part.ids]
    assert len(set(ids)) == len(ids) == 400 + 100 + 50 + 80
    assert sum(map(len, found.private)) == 400


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_seed_decides_the_splits(partition):
    first, again = of(partition), of(partition)
    assert [s.digest() for s in first.private] == [s.digest() for s in again.private]
    assert first.proxy.digest() == again.proxy.digest()


def test_another_seed_gives_other_splits():
    assert splits(seed=1).proxy.digest() != splits(seed=0).proxy.digest()


def test_labels_that_the_server_does_not_have_are_gone():
    proxy = splits().proxy
    assert (proxy.labels != UNLABELLED).sum() == 20


def test_dirichlet_skew_grows_as_alpha_falls():
    def non_iid(alpha):
        return skew(splits(partition={**PARTITIONS["dirichlet"], "alpha": alpha})).non_iid

    assert non_iid(0.1) > non_iid(1.0) > non_iid(100.0)


def test_quantity_skew_keeps_the_mixture_of_classes():
    measured = skew(of("quantity"))
    assert measured.size_ratio > 1.5
    assert measured.non_iid < 0.25


def test_clients_by_source_are_named_after_it():
    assert {s.name for s in of("by_source").private} == {"1790-1860", "1861-1912", "1913-1968", "1969-now"}


def write(path, rows):
    if path.suffix == ".csv":
        import pandas

        pandas.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(n=60):
    return [{"text": f"text, number {i}", "label": "ab"[i % 2], "origin": "xyz"[i % 3]} for i in range(n)]


def from_files(path, **changes):
    source = {"kind": "files", "path": str(path)}
    parts = {
        "private": {"size": 30},
        "proxy": {"size": 10, "labelled": 2},
        "validation": {"size": 10},
        "test": {"size": 10},
    }
    partition = {"kind": "iid", "clients": 2}
    return load(parse({"data": {"source": source, **parts, "partition": partition, **changes}}).data, 0)


@pytest.mark.parametrize("name", ["d.csv", "d.parquet", "d.jsonl"])
def test_formats_agree(tmp_path, name):
    found = from_files(write(tmp_path / name, rows()))
    assert found.label_names == ("a", "b")
    assert found.proxy.texts == from_files(write(tmp_path / "other.jsonl", rows())).proxy.texts


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.jsonl", rows()[30:])
    write(tmp_path / "a.jsonl", rows()[:30])
    assert sorted(from_files(tmp_path).test.texts) == sorted(
        from_files(write(tmp_path.parent / "whole.jsonl", rows())).test.texts
    )


def test_a_text_file_is_a_text_a_line_and_can_be_the_proxy(tmp_path):
    path = tmp_path / "public.txt"
    path.write_text("one line\n\nanother line\n")
    found = splits(proxy={"source": {"kind": "files", "path": str(path)}, "size": None, "labelled": 0})
    assert found.proxy.texts == ("one line", "another line")


def test_a_local_folder_in_hub_layout_is_read_like_the_hub(tmp_path):
    import pandas

    (tmp_path / "sst").mkdir()
    pandas.DataFrame(rows()).to_parquet(tmp_path / "sst" / "train-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: sst\n  data_files:\n  - split: train\n    path: sst/train-*\n---\n"
    )
    source = {"kind": "hub", "name": str(tmp_path), "subset": "sst"}
    assert len(from_files("unused", source=source).test) == 10


def test_a_folder_that_has_changed_is_read_anew(tmp_path):
    """Also one of the same last name: datasets' own cache would give what it read before."""
    for number in range(2):
        folder = hub_fixtures.write(
            tmp_path / str(number) / "same", {"some": {"test": [{"text": f"text {number}"}]}}
        )
        source = HubSource(name=str(folder), subset="some", split="test", label_column=None)
        assert read(source, "data.test").texts == (f"text {number}",)


def test_only_line_ends_end_a_line(tmp_path):
    path = write(tmp_path / "d.jsonl", rows())
    path.write_text(path.read_text().replace("text, number 0", "text\u2028number\x85 0"))
    whole = from_files(path)
    texts = [t for part in (*whole.private, whole.proxy, whole.validation, whole.test) for t in part.texts]
    assert "text\u2028number\x85 0" in texts
    lines = tmp_path / "p.txt"
    lines.write_text("one\x0cpage\nanother\n")
    found = splits(proxy={"source": {"kind": "files", "path": str(lines)}, "size": None, "labelled": 0})
    assert found.proxy.texts == ("one\x0cpage", "another")


def test_a_client_that_spells_its_labels_otherwise_is_refused(tmp_path):
    odd = [{**row, "label": row["label"].upper()} for row in rows(20)]
    given = {
        "north": {"kind": "files", "path": str(write(tmp_path / "north.csv", rows(20)))},
        "south": {"kind": "files", "path": str(write(tmp_path / "south.csv", odd))},
    }
    own = {"source": {"kind": "files", "path": str(write(tmp_path / "d.csv", rows()))}}
    parts = {"proxy": {**own, "size": 10, "labelled": 2}, "validation": own, "test": own}
    partition = {"kind": "given", "sources": given}
    with pytest.raises(DataError, match=r"south: row 0 has label 'A', which is not one of a, b"):
        load(parse({"data": {"source": None, "partition": partition, **parts}}).data, 0)


def many_classes(classes, size):
    labels, texts = np.arange(classes).repeat(size), tuple(map(str, range(classes * size)))
    return TextSet("private", texts, texts, labels, texts[:classes])


def test_the_place_of_a_client_does_not_decide_how_many_texts_it_gets():
    """Rounding each class down would leave the rest to the last client: 65, 88, 89 and 144 of these."""
    how = DirichletPartition(clients=4, alpha=0.3, min_examples=1)
    sizes = [[len(part) for part in partition(many_classes(77, 5), how, seed)] for seed in range(40)]
    assert all(sum(row) == 77 * 5 for row in sizes)
    mean = np.mean(sizes, axis=0)
    assert np.abs(mean - 96.25).max() < 8  # a client's size has a standard deviation of 14

    even = DirichletPartition(clients=4, alpha=1000, min_examples=20)
    assert min(len(part) for part in partition(many_classes(50, 3), even, 0)) > 20


def test_sources_of_any_script_give_distinct_clients():
    sources = ["北京", "上海", "", "a b", "a-b", "a/b", "x" * 70, "x" * 71, "Ελλάδα", "plain"]
    names = client_names(sources)
    assert len(set(names)) == len(sources)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
    assert names[4] == "a-b"
    assert names[-1] == "plain"


def test_clients_may_bring_their_own_files(tmp_path):
    given = {
        name: {"kind": "files", "path": str(write(tmp_path / f"{name}.csv", rows(20)))}
        for name in ("north", "south")
    }
    found = from_files(write(tmp_path / "d.csv", rows()), partition={"kind": "given", "sources": given})
    assert [(s.name, len(s)) for s in found.private] == [("north", 20), ("south", 20)]


def refusals(tmp_path):
    good = write(tmp_path / "good.csv", rows())
    files = {"kind": "files", "path": str(good)}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    strange = write(tmp_path / "strange.csv", [*rows(10), {"text": "t", "label": "c", "origin": "x"}])
    blank = write(tmp_path / "blank.jsonl", [*rows(3), {"text": " ", "label": "a"}])
    (tmp_path / "odd.xlsx").write_text("x")
    crooked = tmp_path / "crooked.csv"
    crooked.write_text("text,label\nhe said, yes,a\nno, no,b\n")
    listed = write(tmp_path / "listed.jsonl", [{"text": ["a", "b"], "label": "a"}])

    def source(path, **more):
        return {"source": {"kind": "files", "path": str(path), **more}}

    return {
        "missing file": (source(tmp_path / "no.csv"), r"data\.source: no such file or folder: .*no\.csv"),
        "malformed": (source(broken), r"data\.source: .*broken\.jsonl is malformed"),
        "empty": (source(empty), r"data\.source: .*'text' is not a column; there are none"),
        "format": (source(tmp_path / "odd.xlsx"), r"ends in '\.xlsx'"),
        "column": (
            source(good, text_column="body"),
            r"text_column = 'body' is not a column; there are 'text'",
        ),
        "blank text": (source(blank), r"data\.source: row 3 has no 'text'"),
        "mismatched labels": (
            {"source": files, "test": source(strange)},
            r"data\.test: row 10 has label 'c', which is not one of a, b",
        ),
        "empty class": (
            {"source": files, "labels": ["a", "b", "never"]},
            r"class 'never' has no private example at any client",
        ),
        "one field too many": (
            source(crooked),
            r"crooked\.csv is malformed: rows have more fields than the header",
        ),
        "a list for a text": (source(listed), r"data\.source: row 0 has a list for 'text'"),
        "too few": (
            {"source": files, "test": {"size": 600}},
            r"data\.source has 60 examples, the parts need",
        ),
        "client without data": (
            {"source": files, "partition": {"kind": "iid", "clients": 31}},
            r"30 private examples for 31 clients; client-30 has none",
        ),
        "impossible draw": (
            {
                "source": files,
                "partition": {"kind": "dirichlet", "clients": 8, "alpha": 0.05, "min_examples": 6},
            },
            r"no draw in 1000 gave each of 8 clients 6 of 30 private examples",
        ),
        "no source column": (
            {"source": files, "partition": {"kind": "by_source"}},
            r"needs data\.source\.source_column",
        ),
        "too many labels wanted": (
            {"source": files, "proxy": {"size": 10, "labelled": 11}},
            r"data\.proxy\.labelled = 11",
        ),
        "unknown hub set": (
            {"source": {"kind": "hub", "name": "no-such/data-set"}},
            r"data\.source: cannot load data set 'no-such/data-set'",
        ),
    }


REFUSED = (
    (
        "missing file",
        "malformed",
        "empty",
        "format",
        "column",
        "blank text",
        "mismatched labels",
        "empty class",
    )
    + (
        "too few",
        "client without data",
        "impossible draw",
        "one field too many",
        "a list for a text",
        "no source column",
        "too many labels wanted",
    )
    + ("unknown hub set",)
)


def test_every_refusal_is_tested(tmp_path):
    assert set(REFUSED) == set(refusals(tmp_path))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case, tmp_path):
    changes, message = refusals(tmp_path)[case]
    with pytest.raises(DataError, match=message):
        from_files("unused", **changes)


def test_who_is_absent_changes_nothing_for_the_others():
    whole = splits()
    fewer = splits(exclude_clients=["client-1"])
    assert [p.name for p in fewer.private] == [p.name for p in whole.private if p.name != "client-1"]
    assert fewer.places == tuple(place for place in whole.places if place != 1)
    for part in fewer.private:
        assert part.digest(labels=True) == whole.private[int(part.name[-1])].digest(labels=True)
    assert fewer.proxy.digest(labels=True) == whole.proxy.digest(labels=True)
    with pytest.raises(ConfigError, match=r"data\.exclude_clients names client-99; the clients are client-0"):
        splits(exclude_clients=["client-99"])
    with pytest.raises(ConfigError, match=r"data\.exclude_clients names every client"):
        splits(exclude_clients=[p.name for p in whole.private])


def test_a_part_without_any_source_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"data\.test\.source is missing"):
        splits(source=None)


def test_the_digest_tells_texts_apart_and_not_labels():
    one = splits().proxy
    assert one.digest() == one.select(np.arange(len(one))).digest()
    assert one.digest() != one.select(np.arange(len(one))[::-1]).digest()

"""Files of texts: what is in them is read, all of it, and what cannot be read is named with its place."""

import gc
import gzip
import json
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from feddistill.cli import main
from feddistill.config import parse
from feddistill.config.data import DataConfig, FileSource, HubSource
from feddistill.config.tasks import TASKS
from feddistill.data import load, skew
from feddistill.data.sources import read
from feddistill.errors import ConfigError, DataError
from feddistill.methods.public_only import known_texts

MARKED = "\n".join(["text\tlabel", "one\ta", '"two\tb', "three\ta", "four\tb", '"five\ta', "six\tb", ""])
"""Six rows of tsv, with an open quotation mark in the second and in the fifth."""


@pytest.fixture
def table(tmp_path):
    """Write a file and read it."""

    def run(name, content, **settings):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(FileSource(path=path, **settings), "data.source")

    return run


def objects(*labels):
    return "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels)


def parquet(path, labels, kind):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    texts = [f"{path.stem} {row}" for row in range(len(labels))]
    parquet.write_table(pyarrow.table({"text": texts, "label": pyarrow.array(labels, kind)}), path)
    return path.parent


class TestQuotationMarks:
    """In tsv they are text; in csv a field begins and ends with one."""

    def test_tsv_has_none_unless_asked(self, table, tmp_path):
        texts = ("one", '"two', "three", "four", '"five', "six")
        assert table("d.tsv", MARKED).texts == texts
        assert table("d.csv", MARKED, delimiter="\t").texts == texts
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "train.tsv").write_text(MARKED)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            assert read(HubSource(name=str(tmp_path / "hub")), "data.source").texts == texts
            gc.collect()  # datasets leaves the file open
        assert table("q.tsv", 'text\tlabel\n"a\tb\nc"\ta\n', quoting="standard").texts == ("a\tb\nc",)
        assert table("n.csv", 'text,label\n"a,b\nc",d\n', quoting="none").texts == ('"a', 'c"')

    def test_fields_of_several_lines_are_read_in_csv(self, table):
        text = 'one, two\nthree "four"'
        assert table("d.csv", f'text,label\n"{text.replace(chr(34), chr(34) * 2)}",a\n').texts == (text,)
        long = "word, " * 50_000  # longer than the csv module's own limit
        assert table("long.csv", f'text,label\n"{long}",a\n').texts == (long,)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (MARKED.replace("\t", ","), r"d\.csv is malformed: row 1 \(lines 3 to 6\): ',' expected after"),
            ('text,label\na,b\n"c,d\n', r"row 1 \(lines 3 to 3\): unexpected end of data"),
            ("text,label\na\n", r"fields are missing \(row 0, line 2: 1, not 2\)"),
            ("text,text,label\na,b,c\n", "the header has the column 'text' twice"),
        ],
    )
    def test_what_would_lose_rows_is_named(self, content, message, table):
        with pytest.raises(DataError, match=message):
            table("d.csv", content)

    def test_check_counts_rows_and_names_a_field_that_may_have_swallowed_some(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = [f"{'ab'[i % 2]},text {i}" for i in range(60)]
        (tmp_path / "d.csv").write_text(
            "label,text\n" + "\n".join([*rows, 'a,"he, said', "b,she", 'a,said"', ""])
        )
        (tmp_path / "run.yaml").write_text(
            "data: {source: {kind: files, path: d.csv}, private: {size: 30}, proxy: {size: 10}, "
            "validation: {size: 10}, test: {size: 10}, partition: {kind: iid, clients: 2}}\nbaselines: []"
        )
        monkeypatch.setattr("feddistill.runs.experiment.check", lambda config: load(config.data, 0))
        done = CliRunner().invoke(main, ["config", "check", "run.yaml"])
        assert done.exit_code == 0, done.output
        lines = [line for line in done.stdout.splitlines() if line.startswith("data.source: ")]
        assert lines[0] == "data.source: 61 rows (d.csv 61)"
        assert lines[1].startswith(
            "data.source: row 60 (d.csv, line 62) holds line breaks and delimiters in 'text'"
        )
        assert len(lines) == 2


class TestLabels:
    """Equal numbers are one class, and what is missing is none."""

    def test_types_do_not_multiply_classes(self, tmp_path):
        import pyarrow

        parquet(tmp_path / "p" / "a.parquet", [0, 1, None], pyarrow.int64())
        folder = parquet(tmp_path / "p" / "b.parquet", [2.0, 1.0, float("nan")], pyarrow.float64())
        assert read(FileSource(path=folder), "data.source").labels == ("0", "1", None, "2", "1", None)
        sources = FileSource(path=folder, label_column=None, source_column="label")
        with pytest.raises(DataError, match=r"row 2 has no 'label' \(a\.parquet, row 2\)"):
            read(sources, "data.source")
        parquet(tmp_path / "f" / "a.parquet", [0.1, 2], pyarrow.float32())
        folder = parquet(tmp_path / "f" / "b.parquet", [0.1, 2], pyarrow.float64())
        assert set(read(FileSource(path=folder), "data.source").labels) == {"0.1", "2"}

    @pytest.mark.parametrize(
        ("content", "labels"),
        [
            (objects(1, 1.0, "1", None, float("nan"), " "), ("1", "1", "1", None, None, None)),
            (objects("sea", 2, 2.0), ("sea", "2", "2")),
            (objects(1.5, 2, "2.0"), ("1.5", "2", "2")),
            (objects(True, False), ("True", "False")),
            (objects("007", "7"), ("007", "7")),
        ],
    )
    def test_equal_numbers_are_one_class(self, content, labels, table):
        assert table("d.jsonl", content).labels == labels

    def test_cells_of_csv_have_no_types(self, table):
        assert table("d.csv", "text,label\na,1.0\nb,0\nc,\nd,1\n").labels == ("1", "0", None, "1")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (objects(1, True), r"row 1 has True for label \(d\.jsonl, line 2\), and row 0 has 1 "),
            (
                objects("sea", "1.0", 1),
                r"row 2 has '1' for label .*, and row 1 has '1\.0' .*: write them alike",
            ),
            (objects("\ufeffsea"), "row 0 has a byte order mark in label"),
            (
                objects(0, -1),
                r"row 1 has -1 for label \(d\.jsonl, line 2\): set no_label: -1 .* no_label: false",
            ),
            (objects(0, -1.0, "b"), "row 1 has -1 for label"),
        ],
    )
    def test_what_may_be_one_class_or_two_is_refused(self, content, message, table):
        with pytest.raises(DataError, match=message):
            table("d.jsonl", content)

    def test_minus_one_is_what_the_setting_says(self, table):
        content = objects(-1, 0, 1)
        assert table("d.jsonl", content, no_label=-1).labels == (None, "0", "1")
        assert table("d.jsonl", content, no_label=False).labels == ("-1", "0", "1")
        assert table("d.csv", "text,label\na,?\nb,x\n", no_label="?").labels == (None, "x")

    def test_minus_one_is_no_label_in_a_column_of_classes(self, tmp_path):
        import datasets

        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["-1", "up"])}
        rows = {"text": ["a", "b", "c"], "label": [0, 1, -1]}
        path = tmp_path / "train.parquet"
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
        assert read(FileSource(path=path), "data.source").labels == ("0", "1", None)
        assert read(HubSource(name=str(tmp_path)), "data.source").labels == ("-1", "up", None)

    def test_only_the_proxy_may_have_rows_without_a_label(self, tmp_path):
        (tmp_path / "d.jsonl").write_text(objects(*["a", "b"] * 30))
        (tmp_path / "some.jsonl").write_text(objects("a", None, "b", None))
        own = {"kind": "files", "path": str(tmp_path / "some.jsonl")}
        data = {
            "source": {"kind": "files", "path": str(tmp_path / "d.jsonl")},
            "private": {"size": 30},
            "proxy": {"source": own, "labelled": 2},
            "validation": {"size": 10},
            "test": {"size": 10},
            "partition": {"kind": "iid", "clients": 2},
        }
        assert load(parse({"data": data}).data, 0).proxy.labels.tolist() == [0, -1, 1, -1]
        with pytest.raises(DataError, match=r"data\.test: row 1 has no label \(some\.jsonl, line 2\)"):
            load(parse({"data": {**data, "test": {"source": own}}}).data, 0)

    def test_a_public_set_keeps_the_labels_that_it_has(self, tmp_path):
        (tmp_path / "d.jsonl").write_text(objects(*["a", "b"] * 30))
        (tmp_path / "some.jsonl").write_text(objects("a", None, "b", None, "b"))
        (tmp_path / "none.jsonl").write_text(objects(None, None))
        own = {"kind": "files", "path": str(tmp_path / "some.jsonl")}
        data = {
            "source": {"kind": "files", "path": str(tmp_path / "d.jsonl")},
            "private": {"size": 30},
            "validation": {"size": 10},
            "test": {"size": 10},
            "partition": {"kind": "iid", "clients": 2},
        }

        def splits(**proxy):
            config = parse({"data": {**data, "proxy": proxy}})
            return load(config.data, 0)

        whole = splits(source=own, labelled="all")
        assert whole.proxy.labels.tolist() == [0, -1, 1, -1, 1]
        assert skew(whole).proxy_counts == (1, 2)
        assert splits(source=own).proxy.labels.tolist() == [-1] * 5
        assert (splits(size=10, labelled="all").proxy.labels >= 0).all()
        session = SimpleNamespace(splits=whole, task=TASKS["classification"])
        assert known_texts(session).labels.tolist() == [0, 1, 1]  # what public_only trains on
        with pytest.raises(DataError, match="labelled = all, but no proxy text has a label"):
            splits(source={**own, "path": str(tmp_path / "none.jsonl")}, labelled="all")
        for wrong in ("some", -1):
            with pytest.raises(ConfigError, match=r"data\.proxy\.labelled"):
                splits(source=own, labelled=wrong)

    def test_a_public_set_keeps_the_answers_that_it_has(self, tmp_path):
        texts = {"context": "a cat sat", "question": "Who?"}
        right = {"text": ["a cat"], "answer_start": [0]}
        known = [{**texts, "answers": right}, {**texts, "answers": {"text": [], "answer_start": []}}] * 10
        some = [known[0], {**texts, "answers": None}, known[1]]
        for name, rows in (("known", known), ("some", some)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = {"text_column": "context", "question_column": "question", "label_column": None}
        sources = {
            name: {"kind": "files", "path": tmp_path / f"{name}.jsonl", **names} for name in ("known", "some")
        }
        data = {
            "source": sources["known"],
            "private": {"size": 8},
            "proxy": {"source": sources["some"], "labelled": "all"},
            "validation": {"size": 6},
            "test": {"size": 6},
            "partition": {"kind": "iid", "clients": 2},
        }
        read_as = partial(load, seed=0, task="question_answering")
        assert read_as(DataConfig.model_validate(data)).proxy.answers == (((0, 5),), None, ())
        data["test"] = {"source": sources["some"]}
        with pytest.raises(DataError, match=r"data\.test: row 1 has no answers \(some\.jsonl, line 2\)"):
            read_as(DataConfig.model_validate(data))


class TestEncodings:
    """Byte order marks are no part of a text; other encodings are named."""

    @pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.json", "d.txt", "d.csv.gz"])
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_marks_are_read(self, name, encoding, table):
        kind = name.split(".")[1]
        content = {
            "csv": "text,label\nZoë,a\n",
            "tsv": "text\tlabel\nZoë\ta\n",
            "jsonl": '{"text": "Zoë", "label": "a"}\n',
            "json": '[{"text": "Zoë", "label": "a"}]',
            "txt": "Zoë\n",
        }[kind].encode(encoding)
        found = table(name, gzip.compress(content) if name.endswith(".gz") else content)
        assert (found.ids, found.texts) == (("d/0",), ("Zoë",))
        assert found.labels == (None if kind == "txt" else ("a",))

    def test_joined_files_have_marks_inside(self, table):
        assert table("d.txt", "\ufeff\ufeffone\n\ufefftwo\n").texts == ("one", "two")

    @pytest.mark.parametrize(
        ("content", "encoding", "message"),
        [
            ("text\nZoë".encode("latin-1"), None, "byte 0xeb in line 2 is not utf-8; name the file's own"),
            ("text\nZoë".encode("utf-16"), "latin-1", "mark of utf-16-le, but encoding is latin-1"),
            ("text\nZoe".encode("utf-16-le"), None, "a NUL character in line 1"),
        ],
    )
    def test_another_encoding_is_named(self, content, encoding, message, table):
        with pytest.raises(DataError, match=message):
            table("d.csv", content, encoding=encoding, label_column=None)
        if encoding is None:
            used = "utf-16-le" if b"\0" in content else "latin-1"
            texts = table("d.csv", content, encoding=used, label_column=None).texts
            assert texts == (content.decode(used).split("\n")[1],)

    @pytest.mark.parametrize("change", [{"encoding": "hex"}, {"encoding": "latin-11"}, {"delimiter": '"'}])
    def test_what_is_no_encoding_or_delimiter_is_refused(self, change):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} = "):
            parse({"data": {"source": {"kind": "files", "path": "d.csv", **change}}})

    @pytest.mark.parametrize(
        ("name", "content", "settings", "message"),
        [
            ("d.jsonl", objects("a"), {"delimiter": ";"}, "delimiter is for csv and tsv, not for d.jsonl"),
            ("d.parquet", b"", {"encoding": "latin-1"}, "encoding is for text files, not for d.parquet"),
            ("d.parquet.gz", b"", {}, r"ends in '\.gz'; readable are \.csv"),
            ("d.csv.gz", b"text,label\n", {}, "d.csv.gz is malformed: Not a gzipped file"),
            (
                "d.csv.gz",
                gzip.compress(b"text\na" * 99, mtime=0)[:-9],
                {},
                "malformed: Compressed file ended",
            ),
        ],
    )
    def test_what_is_not_for_a_format_is_refused(self, name, content, settings, message, table):
        with pytest.raises(DataError, match=message):
            table(name, content, **settings)


class TestJson:
    """Objects in any of the usual forms, nested ones too."""

    @pytest.mark.parametrize(
        "content",
        [
            [{"text": "a", "label": 1}, {"text": "b", "label": None}],
            {"text": ["a", "b"], "label": [1, None]},
            {"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": None}},
            {"version": 1, "data": [{"text": "a", "label": 1}, {"text": "b"}]},
        ],
    )
    def test_forms_agree(self, content, table):
        found = table("d.json", json.dumps(content))
        assert (found.texts, found.labels) == (("a", "b"), ("1", None))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "d.jsonl",
                '{"text": "a"}\n\n{"text": "b", "text": "c"}\n',
                "line 3: an object has 'text'",
            ),
            ("d.json", '[{"a": {"b": 1, "b": 2}}]', "an object has 'b' twice"),
            ("d.json", '{"text": ["a"], "label": []}', r"its columns \(text, label\) have different rows"),
            ("d.json", "[" * 100_000, "nested too deeply"),
            (
                "d.json",
                '{"data": [{"paragraphs": [{"context": "c"}]}]}',
                "article 0, paragraph 0 has no",
            ),
        ],
    )
    def test_what_would_be_dropped_is_named(self, name, content, message, table):
        with pytest.raises(DataError, match=message):
            table(name, content)

    def test_a_column_can_be_inside_another(self, table):
        content = '{"a": {"b": "one", "l": [3, 4]}, "a.b": "flat"}\n{"a": {"l": [5]}, "a.b": "flat"}\n'
        assert table("d.jsonl", content, text_column="a.b", label_column="a.l[1]").labels == ("4", None)
        assert table("d.jsonl", content, text_column="a.b", label_column=None).texts == ("flat", "flat")
        with pytest.raises(DataError, match=r"text_column = 'a\.c' is not a column; there are 'a\.b',"):
            table("d.jsonl", content, text_column="a.c")
        with pytest.raises(DataError, match=r"row 1 has no 'a\.l\[1\]' \(d\.jsonl, line 2\)"):
            table("d.jsonl", content, text_column="a.l[1]")

    def test_questions_without_an_answer_are_read_from_squads_own_json(self, table):
        asked = [{"id": "1", "question": "Who?", "is_impossible": True, "answers": []}]
        content = {"data": [{"title": "T", "paragraphs": [{"context": "A cat sat.", "qas": asked}]}]}
        columns = {"text_column": "context", "question_column": "question", "label_column": None}
        assert table("d.json", json.dumps(content), **columns).answers == ((),)

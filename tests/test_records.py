"""Typed records hold everything that a run of an earlier commit has recorded."""

import json
from pathlib import Path

import pytest

from feddistill.store.records import (
    BaselineRecord,
    FederationRecord,
    RoundRecord,
    StepRecord,
    TeacherRecord,
    UploadRecord,
)

RECORDS = Path(__file__).parent / "recorded_run" / "run" / "records"
KINDS = {
    "methods/feddistill.json": FederationRecord,
    "methods/public_only.json": BaselineRecord,
    "methods/local_only.json": BaselineRecord,
    "alone/*/*.json": StepRecord,
    "baselines/*/*.json": StepRecord,
    "rounds/00?.json": RoundRecord,
    "rounds/*/specialists/*.json": StepRecord,
    "rounds/*/student.json": StepRecord,
    "rounds/*/teacher.json": TeacherRecord,
    "rounds/*/payloads/*.json": UploadRecord,
}


def without_null(content):
    if isinstance(content, dict):
        return {key: without_null(value) for key, value in content.items() if value is not None}
    return [without_null(value) for value in content] if isinstance(content, list) else content


@pytest.mark.parametrize("pattern", KINDS)
def test_reading_and_writing_a_record_loses_nothing(pattern):
    files = sorted(RECORDS.glob(pattern))
    assert files
    for file in files:
        content = json.loads(file.read_text())["content"]
        written = KINDS[pattern].from_json(content).as_json()
        if pattern.startswith("methods/") and "bytes" not in content:
            assert written.pop("bytes", {"uplink": 0, "downlink": 0}) == {"uplink": 0, "downlink": 0}
        assert without_null(written) == without_null(content)

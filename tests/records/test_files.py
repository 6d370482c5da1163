"""Files that are whole or not there, and the lock on a folder."""

import multiprocessing
import re

import pytest

from grap_solo.errors import ConfigError
from grap_solo.records.files import only_one, read_json, whole_file, write_json


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(EOFError), whole_file(path) as file:
        file.write("half")
        raise EOFError
    assert path.read_text() == "old"
    with whole_file(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_json_comes_back_and_a_damaged_or_absent_file_is_none(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None, "x"]})
    assert read_json(path) == {"a": [1, None, "x"]}
    path.write_text(path.read_text()[:-5])
    assert read_json(path) is None
    path.write_bytes(b"\xff\xfe")
    assert read_json(path) is None


def enter(directory, answers):
    try:
        with only_one(directory):
            answers.put("entered")
    except ConfigError as error:
        answers.put(str(error))


def test_a_second_process_is_refused_until_the_first_has_left(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for held in (True, False):
        process = context.Process(target=enter, args=(tmp_path, answers))
        if held:
            with only_one(tmp_path):
                process.start()
                message = answers.get(timeout=60)
        else:
            process.start()
            message = answers.get(timeout=60)
        process.join(60)
        expected = "another command is writing there: wait" if held else "^entered$"
        assert re.search(expected, message), message

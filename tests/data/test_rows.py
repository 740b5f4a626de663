"""Rows of files that are not lists: objects of rows, tars in the manner of webdataset."""

import json
import pickle

import pytest

from mmjax.data.messages import BadSample
from mmjax.data.rows import open_rows
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient, write_tar


def test_a_list_or_an_object_below_a_key(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"meta": {"annotations": [1]}, "annotations": [{"a": 1}, {"a": 2}], "n": {"x, \"": {"a": 3}, "y": 4}}))
    listed, keyed = open_rows(str(path), "annotations"), open_rows(str(path), "n")
    assert (len(listed), listed[1], listed.id(1)) == (2, {"a": 2}, "a.json:2")
    assert (len(keyed), keyed[0], keyed.id(0), keyed.id(1)) == (2, {"a": 3}, 'x, "', "y")
    with pytest.raises(BadSample, match="sample y: the row is not a JSON object"):
        keyed[1]
    with pytest.raises(UserError, match="no list and no object under the key 'absent'"):
        open_rows(str(path), "absent")
    with pytest.raises(UserError, match="the option `within`"):
        open_rows(str(path))
    path.write_text('{"annotations": [{"a": 1}')
    with pytest.raises(UserError, match="not valid JSON after 1 rows"):
        open_rows(str(path), "annotations")


def test_members_of_a_tar_that_share_a_name_are_a_row(tmp_path):
    picture = encoded(gradient())
    files = {
        "s/000.jpg": picture,
        "s/000.txt": "a naïve cat".encode(),
        "s/000.json": b'{"width": 24}',
        "s/001.PNG": picture,
        "s/001.json": b'{"caption": "a dog"}',
        "s/002.txt": b"\xff",
        "s/note.md": b"",
    }
    write_tar(tmp_path / "0.tar", files)
    rows = pickle.loads(pickle.dumps(open_rows(str(tmp_path / "*.tar"))))
    assert len(rows) == 3 and rows.id(1) == "s/001"
    assert rows[0] == {"width": 24, "caption": "a naïve cat", "image": "s/000.jpg"}
    assert rows[1] == {"caption": "a dog", "image": "s/001.PNG"}
    with pytest.raises(BadSample, match="s/002"):
        rows[2]
    with pytest.raises(UserError, match="no file"):
        open_rows(str(tmp_path / "1.tar"))

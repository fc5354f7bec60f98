import os

import pytest

from hashattn.files import replacing, replacing_folder


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    with replacing(path) as scratch:
        scratch.write_text("first")
        assert scratch.suffix == ".json" and not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyError), replacing(str(path)) as scratch:
        scratch.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results"
    with replacing_folder(path) as scratch:
        (scratch / "first").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyError), replacing_folder(path) as scratch:
        (scratch / "half").write_text("2")
        raise KeyError
    assert [p.name for p in path.iterdir()] == ["first"]
    with replacing_folder(path) as scratch:
        (scratch / "second").write_text("2")
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in path.parent.iterdir()] == ["results"]


def test_two_that_replace_one_folder_at_once_leave_the_last_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "results", os.replace
    path.mkdir()

    def meanwhile(source, target):
        replace(source, target)
        if source == path:  # another process is quicker
            path.mkdir()
            (path / "theirs").write_text("")
            monkeypatch.setattr(os, "replace", replace)

    monkeypatch.setattr(os, "replace", meanwhile)
    with replacing_folder(path) as scratch:
        (scratch / "ours").write_text("")
    assert [p.name for p in path.iterdir()] == ["ours"]
    assert [p.name for p in tmp_path.iterdir()] == ["results"]

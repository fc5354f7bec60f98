import pytest

from hashattn.files import replacing


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

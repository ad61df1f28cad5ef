"""Files are there whole or not at all, and foreign ones are refused."""

from __future__ import annotations

import pytest

from keras_distill.files import read_json, whole, whole_folder, write_json


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("before")

    def write(error):
        with whole(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "before"
            raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt)
    with pytest.raises(OSError, match="note.txt could not be written .no room.*whole"):
        write(OSError(28, "no room"))
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_folders_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"

    def write(text, error=None):
        with whole_folder(path) as temporary:
            temporary.mkdir()
            (temporary / "part").write_text(text)
            if error:
                raise error

    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("two", KeyboardInterrupt)
    assert (path / "part").read_text() == "one"
    write("three")
    assert (path / "part").read_text() == "three"
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("several", [True, False])
def test_the_name_to_write_to_has_the_paths_suffix(tmp_path, several):
    path = tmp_path / "model.keras"
    with whole(path, several) as temporary:
        assert temporary.suffix == ".keras"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"all")
    assert path.read_bytes() == b"all"
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]


def test_several_processes_have_names_of_their_own(tmp_path):
    path = tmp_path / "note.json"
    with whole(path, True) as first, whole(path, True) as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the last that came to its end


@pytest.mark.parametrize("text", ['{"a": ', "[1]", "3", "\x00"])
def test_truncated_and_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "note.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="note.json' is truncated or was not .* me: "):
        read_json(path, "me")
    write_json(path, {"a": [1.5, None]})
    assert read_json(path, "me") == {"a": [1.5, None]}

"""Files and folders are whole or not there."""

from __future__ import annotations

import os

import pytest

from titan_fp8.files import new_folder, save


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "result.json"
    save(path, lambda partial: partial.write_text("old"))

    def fails(partial):
        partial.write_text("ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        save(path, fails)
    assert path.read_text() == "old"
    save(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["result.json"]


def test_a_folder_is_there_when_it_is_whole_and_others_may_read_it(tmp_path):
    out = tmp_path / "a" / "tasks"
    with pytest.raises(ValueError, match="torn"), new_folder(out) as partial:
        (partial / "x").write_text("x")
        raise ValueError("torn")
    assert os.listdir(out.parent) == []
    before = os.umask(0o022)
    try:
        with new_folder(out) as partial:
            (partial / "x").write_text("x")
            (partial / "x").chmod(0o600)
            assert not out.exists()
    finally:
        os.umask(before)
    assert os.listdir(out.parent) == ["tasks"] and (out / "x").read_text() == "x"
    assert (out.stat().st_mode & 0o777, (out / "x").stat().st_mode & 0o777) == (0o755, 0o644)

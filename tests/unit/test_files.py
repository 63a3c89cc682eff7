"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from serve_app.files import write_whole


def test_a_file_is_replaced_and_a_draft_of_before_goes(tmp_path: Path) -> None:
    file, left_over = tmp_path / "file", tmp_path / "file.partial"
    left_over.write_bytes(b"of a run that was killed")
    for data in (b"one", b"two"):
        write_whole(file, data)
        assert file.read_bytes() == data
        assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_mode_is_the_one_given_less_the_umask(tmp_path: Path, overwrite: bool) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "secret", b"", overwrite=overwrite)
        write_whole(tmp_path / "public", b"", mode=0o666, overwrite=overwrite)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "public": 0o644}


def test_a_file_that_is_there_stays_where_it_may_not_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, b"first", overwrite=False)
    with pytest.raises(FileExistsError):
        write_whole(file, b"second", overwrite=False)
    assert file.read_bytes() == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "within").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", b"data")
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]

"""Files that hold the previous content or the new, and errors that name them."""

from __future__ import annotations

import errno

import pytest

from awp_optim._utils.io import atomic_write


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_failed_write_changes_nothing_and_names_the_file(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path) as file:
        file.write(b"after")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])
    with atomic_write(path) as file:
        file.write(b"after")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"after"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")

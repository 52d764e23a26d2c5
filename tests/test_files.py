"""Files that appear whole or not at all, and what differs between two configurations."""

import os
import stat

import pytest

from ddim_jax.storage.files import differences, whole_file, write_whole


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a"
    write_whole(path, b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert sorted(contents(tmp_path).values()) == [b"new", b"old"]
    assert contents(tmp_path) == {"a": b"new"}


@pytest.mark.parametrize("existed", [False, True])
def test_after_an_error_nothing_has_changed(tmp_path, existed):
    if existed:
        write_whole(tmp_path / "a", b"old")
    with pytest.raises(TypeError), whole_file(tmp_path / "a") as file:
        file.writelines([b"half of the new one", None])
    assert contents(tmp_path) == ({"a": b"old"} if existed else {})


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_differences_name_the_innermost_setting():
    saved = {"data": {"split": "train", "crop": None}, "seed": 0, "tau": [1, 2]}
    now = {"data": {"split": "test"}, "seed": 0, "tau": [1, 3]}
    assert differences(saved, now) == [
        "  data.crop: saved None, now nothing",
        "  data.split: saved 'train', now 'test'",
        "  tau: saved [1, 2], now [1, 3]",
    ]
    assert differences(saved, saved) == []

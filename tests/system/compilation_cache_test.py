"""Compiled programs are only loaded from a directory that no other user can write into."""

import warnings

import jax
import pytest

from dit_jax.system import compilation_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_directory_is_private(home):
    directory = compilation_cache.make_directory()
    assert directory.parent == home / "dit_jax"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert compilation_cache.make_directory() == directory


@pytest.mark.parametrize("shared", ["directory", "parent"])
def test_directory_that_others_may_write_is_not_used(home, caplog, shared):
    directory = compilation_cache.make_directory()
    path = directory if shared == "directory" else directory.parent
    path.chmod(0o777)
    with pytest.raises(OSError, match="others may write there"):
        compilation_cache.make_directory()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation_cache.enable()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "compiled programs are not kept" in caplog.text


def test_link_instead_of_the_directory_is_refused(home, tmp_path):
    directory = compilation_cache.make_directory()
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        compilation_cache.make_directory()


def test_nothing_is_written_through_a_link(home, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (home / "dit_jax").symlink_to(elsewhere)
    with pytest.raises(OSError, match="is a link"):
        compilation_cache.make_directory()
    assert not list(elsewhere.iterdir())


def test_warnings_about_programs_that_cannot_be_stored_are_ignored(home):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        compilation_cache.enable()
        warnings.warn("Error writing persistent compilation cache entry for 'f'", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]


def test_cache_that_the_user_has_configured_is_kept(home):
    before = jax.config.jax_compilation_cache_dir
    assert before  # conftest.py has configured a cache
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == before
    assert not list(home.iterdir())

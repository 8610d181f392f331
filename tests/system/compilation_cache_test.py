"""Compiled programs come from the user's own directory alone."""

import warnings

import jax
import pytest

from dit_jax.system import compilation_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_directory_is_the_user_s_alone(home):
    directory = compilation_cache.make_directory()
    assert directory.parent == home / "dit_jax"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert compilation_cache.make_directory() == directory


@pytest.mark.parametrize("which", [0, 1])
def test_directory_that_others_may_write_is_not_used(home, monkeypatch, caplog, which):
    directory = compilation_cache.make_directory()
    (directory, directory.parent)[which].chmod(0o777)
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


def test_a_link_is_not_followed(home, tmp_path):
    directory = compilation_cache.make_directory()
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        compilation_cache.make_directory()


def test_nothing_is_made_behind_a_link(home, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (home / "dit_jax").symlink_to(elsewhere)
    with pytest.raises(OSError, match="is a link"):
        compilation_cache.make_directory()
    assert not list(elsewhere.iterdir())


def test_programs_that_cannot_be_kept_are_not_told_one_by_one(home):
    with warnings.catch_warnings(record=True) as expected_message:
        warnings.simplefilter("always")
        compilation_cache.enable()
        warnings.warn("Error writing persistent compilation cache entry for 'f'", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in expected_message] == ["another"]


def test_the_user_s_choice_stays(home):
    before = jax.config.jax_compilation_cache_dir
    assert before  # the tests' own
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == before
    assert not list(home.iterdir())

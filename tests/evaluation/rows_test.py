"""Rows of evaluations: their code revision, and which rows are read back."""

import subprocess
import types

import jax
import pytest

from dit_jax.evaluation import rows
from dit_jax.system import files


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository that `rows` takes for its own."""

    def run_git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    run_git("init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    run_git("add", "code.py")
    run_git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "dit_jax" / "evaluation" / "rows.py"))
    return tmp_path


def test_revision_differs_for_different_changes(repository):
    clean = rows.get_git_revision()
    assert len(clean) == 40
    revisions = [clean]
    for text in ("2", "3"):
        (repository / "code.py").write_text(text)
        revisions.append(rows.get_git_revision())
        assert revisions[-1].startswith(f"{clean}-dirty-")
    assert len(set(revisions)) == 3
    (repository / "code.py").write_text("1")
    assert rows.get_git_revision() == clean


def test_failure_of_git_is_reported(repository, monkeypatch):
    def run(*_, **__):
        return types.SimpleNamespace(returncode=128, stdout=b"", stderr=b"dubious ownership")

    monkeypatch.setattr(rows.subprocess, "run", run)
    with pytest.raises(OSError, match="cannot have the revision of the code: dubious ownership"):
        rows.get_git_revision()


def test_row_is_found_only_if_all_values_agree(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    values = {"step": 3, "sample": {"steps": 4}, "git_revision": "abc"}
    assert rows.find(path, values) is None
    rows.append(path, values | {"fid": 2.5})
    assert rows.find(path, values) == values | {"fid": 2.5}
    assert rows.find(path, values | {"sample": {"steps": 5}}) is None
    assert rows.find(path, values | {"git_revision": "abc-dirty-1"}) is None
    rows.append(path, values | {"git_revision": "abc-dirty-1", "fid": 2.5})
    assert rows.find(path, values | {"git_revision": "abc-dirty-1"}) is None


def test_row_of_another_matmul_precision_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "get_git_revision", lambda: "abc")
    path, values = tmp_path / "evaluations.jsonl", {"step": 3, **rows.describe_code()}
    assert values["matmul_precision"] == "highest"  # set in conftest
    rows.append(path, values | {"fid": 2.5})
    assert rows.find(path, {"step": 3, **rows.describe_code()})
    with jax.default_matmul_precision("bfloat16"):
        other = {"step": 3, **rows.describe_code()}
    assert rows.find(path, other) is None
    assert rows.get_name(other) != rows.get_name(values)


@pytest.mark.parametrize("value", ["x", [1], {}, True, float("inf")], ids=str)
def test_row_whose_measures_are_not_numbers_is_not_found(tmp_path, caplog, value):
    path = tmp_path / "evaluations.jsonl"
    values = {"step": 3, "sample": {"steps": 4}, "git_revision": "abc", "picture": "a.png"}
    rows.append(path, values | {"fid": value, "img_per_s": None})
    assert rows.find(path, values) is None
    assert "1 damaged lines of" in caplog.text
    assert "with a wrong fid" in caplog.text
    rows.append(path, values | {"fid": 2.5, "img_per_s": None})
    assert rows.find(path, values)["fid"] == 2.5
    bits = {"step": 3, "likelihood": {"num": 4}, "git_revision": "abc"}
    rows.append(path, bits | {"bits_per_dim": value})
    rows.append(path, bits)
    assert rows.find(path, bits) is None


def test_impossible_measures_are_refused():
    rows.check({"fid": 0.0, "recall": -1e-9, "kid": -0.02, "bits_per_latent_dim": -3.0, "a": None})
    for name, value in (("fid", -0.1), ("sfid", float("nan")), ("kid_std", float("inf"))):
        with pytest.raises(FloatingPointError, match=f"impossible values {name} {value}, so"):
            rows.check({"precision": 0.5, name: value, "recall": 1.0})
    with pytest.raises(FloatingPointError, match=r"bits_per_dim -0\.5, bits_per_dim_prior nan, so"):
        rows.check({"bits_per_dim": -0.5, "bits_per_dim_prior": float("nan")})


def test_workdir_that_was_moved_is_not_created_again(tmp_path):
    with pytest.raises(files.LostError, match="run is gone"):
        rows.hold(tmp_path / "run" / "evaluations.jsonl", {"step": 1, "git_revision": "a"})
    assert not (tmp_path / "run").exists()

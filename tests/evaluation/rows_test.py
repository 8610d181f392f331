"""Rows of evaluations: the code they are of, and when one is read back."""

import subprocess
import types

import jax
import pytest

from dit_jax.evaluation import rows
from dit_jax.system import files


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with this code's module in it, as far as rows can tell."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "dit_jax" / "evaluation" / "rows.py"))
    return tmp_path


def test_revision_tells_changes_apart(repository):
    clean = rows.git_revision()
    assert len(clean) == 40
    revisions = [clean]
    for text in ("2", "3"):
        (repository / "code.py").write_text(text)
        revisions.append(rows.git_revision())
        assert revisions[-1].startswith(f"{clean}-dirty-")
    assert len(set(revisions)) == 3
    (repository / "code.py").write_text("1")
    assert rows.git_revision() == clean


def test_git_that_fails_is_told(repository, monkeypatch):
    def run(*_, **__):
        return types.SimpleNamespace(returncode=128, stdout=b"", stderr=b"dubious ownership")

    monkeypatch.setattr(rows.subprocess, "run", run)
    with pytest.raises(OSError, match="cannot say which code they are of: dubious ownership"):
        rows.git_revision()


def test_row_is_found_by_all_that_is_known_of_it(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    known = {"step": 3, "sample": {"steps": 4}, "git_revision": "abc"}
    assert rows.find(path, known) is None
    rows.append(path, known | {"fid": 2.5})
    assert rows.find(path, known) == known | {"fid": 2.5}
    assert rows.find(path, known | {"sample": {"steps": 5}}) is None
    assert rows.find(path, known | {"git_revision": "abc-dirty-1"}) is None
    rows.append(path, known | {"git_revision": "abc-dirty-1", "fid": 2.5})
    assert rows.find(path, known | {"git_revision": "abc-dirty-1"}) is None


def test_row_of_another_precision_of_products_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "git_revision", lambda: "abc")
    path, known = tmp_path / "evaluations.jsonl", {"step": 3, **rows.describe_code()}
    assert known["matmul_precision"] == "highest"  # the tests'
    rows.append(path, known | {"fid": 2.5})
    assert rows.find(path, {"step": 3, **rows.describe_code()})
    with jax.default_matmul_precision("bfloat16"):
        other = {"step": 3, **rows.describe_code()}
    assert rows.find(path, other) is None
    assert rows.get_name(other) != rows.get_name(known)


@pytest.mark.parametrize("value", ["x", [1], {}, True, float("inf")], ids=str)
def test_row_with_measures_that_are_no_numbers_is_not_found(tmp_path, caplog, value):
    path = tmp_path / "evaluations.jsonl"
    known = {"step": 3, "sample": {"steps": 4}, "git_revision": "abc", "picture": "a.png"}
    rows.append(path, known | {"fid": value, "img_per_s": None})
    assert rows.find(path, known) is None
    assert "1 damaged lines of" in caplog.text
    assert "with a wrong fid" in caplog.text
    rows.append(path, known | {"fid": 2.5, "img_per_s": None})
    assert rows.find(path, known)["fid"] == 2.5
    bits = {"step": 3, "likelihood": {"num": 4}, "git_revision": "abc"}
    rows.append(path, bits | {"bits_per_dim": value})
    rows.append(path, bits)
    assert rows.find(path, bits) is None


def test_measures_that_cannot_be_are_refused():
    rows.check({"fid": 0.0, "recall": -1e-9, "kid": -0.02, "bits_per_latent_dim": -3.0, "a": None})
    for wrong in ({"fid": -0.1}, {"sfid": float("nan")}, {"kid_std": float("inf")}):
        ((name, value),) = wrong.items()
        with pytest.raises(FloatingPointError, match=f"measured {name} {value}, which cannot be"):
            rows.check({"precision": 0.5, **wrong, "recall": 1.0})
    with pytest.raises(FloatingPointError, match=r"bits_per_dim -0\.5, bits_per_dim_prior nan, wh"):
        rows.check({"bits_per_dim": -0.5, "bits_per_dim_prior": float("nan")})


def test_workdir_that_was_moved_before_it_is_held_is_not_made_anew(tmp_path):
    with pytest.raises(files.LostError, match="run is gone"):
        rows.hold(tmp_path / "run" / "evaluations.jsonl", {"step": 1, "git_revision": "a"})
    assert not (tmp_path / "run").exists()

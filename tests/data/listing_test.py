"""One pass over a folder: what it lists, in which order, and which links it refuses."""

import os

import pytest

from dit_jax.data import listing


@pytest.fixture
def root(tmp_path):
    """root/train/a, b with images, root/pool beside them, and other/ outside."""
    for name in ("train/a/0.png", "train/a/deep/1.png", "train/b/2.png", "pool/3.png"):
        _touch(tmp_path / "root" / name)
    _touch(tmp_path / "other" / "4.png")
    return tmp_path / "root"


def _touch(path, contents=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def _names(root, folder="train"):
    return listing.scan(root / folder, root).names


def test_order_is_of_the_parts_of_names(root):
    for name in ("a.png", "a/0", "a-b/0.png", "a/deep.png", "B/0.PNG", "ä/0.webp", "a/deep/0.jpeg"):
        _touch(root / "train" / name)
    actual = listing.scan(root / "train", root)
    expected = [path.relative_to(root / "train") for path in (root / "train").rglob("*.*")]
    assert actual.names == [str(path) for path in sorted(expected)]
    assert actual.folders == ["B", "a", "a-b", "b", "ä"]
    assert actual.others == {"no suffix": 1}


def test_sizes_and_times_are_of_the_images(root):
    _touch(root / "train" / "b" / "0.png", b"12345")
    os.utime(root / "train" / "b" / "0.png", ns=(7, 123_456_789))
    actual = listing.scan(root / "train", root)
    i = actual.names.index("b/0.png")
    changed = (root / "train" / "b" / "0.png").stat().st_ctime_ns  # utime does not set it
    assert (actual.sizes[i], actual.times[i]) == (5, changed)
    assert len(actual.sizes) == len(actual.times) == len(actual.names) == 4


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0.png",
        "__MACOSX/0.png",
        "@eaDir/0.png",
        "lost+found/0.png",
        "$RECYCLE.BIN/0.png",
        "System Volume Information/0.png",
        "a/.hidden.png",
        "a/._0.png",
        "a/@EADIR/0.png",
        "a/deep/.thumbnails/0.png",
        "Thumbs.db",
        "a/desktop.ini",
        "a/.DS_Store",
    ],
)
def test_hidden_and_system_names_are_left_out_and_said(root, name, caplog):
    before = _names(root)
    _touch(root / "train" / name)
    actual = listing.scan(root / "train", root)
    assert (actual.names, actual.folders) == (before, ["a", "b"])
    with caplog.at_level("INFO", "dit_jax"):
        listing.report(actual)
        listing.report(actual)
    (hidden,) = actual.hidden
    assert caplog.messages == [
        f"image folder {root}/train: 1 hidden or system name left out, such as {hidden}."
    ]


def test_other_files_are_counted_by_suffix(root, caplog):
    for name in ("a/0.gif", "a/1.GIF", "b/0.tiff", "b/x.jfif", "x.avif", "a/notes.txt", "a/b.json"):
        _touch(root / "train" / name)
    (root / "train" / "a" / "old.png").mkdir()
    actual = listing.scan(root / "train", root)
    assert actual.names == ["a/0.png", "a/deep/1.png", "b/2.png"]
    with caplog.at_level("INFO", "dit_jax"):
        listing.report(actual)
    images, others = caplog.records
    folder = f"image folder {root}/train"
    expected = f"{folder}: 5 images of other kinds left out: 2 .gif, 1 .avif, 1 .tiff, 1 .jfif"
    assert sorted(images.getMessage()) == sorted(
        f"{expected}. Convert them; {listing.pixels.READ} are read."
    )
    assert images.levelname == "WARNING"
    assert others.getMessage().startswith(f"{folder}: 2 other files left out: ")
    assert others.levelname == "INFO"


def _link(path, target):
    path.symlink_to(target)


def test_links_that_stay_inside_are_followed(root, tmp_path):
    _link(root / "train" / "a" / "linked.png", "../../pool/3.png")
    _link(root / "train" / "a" / "more", root / "pool")
    _link(root / "train" / "c", "../pool")
    _link(root / "train" / "b" / "again.png", "../a/linked.png")
    _link(root / "train" / "b" / "twice", "../../train/a/more")
    _link(tmp_path / "way", "root")
    expected = [
        *("a/0.png", "a/deep/1.png", "a/linked.png", "a/more/3.png"),
        *("b/2.png", "b/again.png", "b/twice/3.png", "c/3.png"),
    ]
    assert _names(root) == expected
    assert _names(tmp_path / "way") == expected
    assert _names(root, "train/c") == ["3.png"]


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "a/x.png",
            "../../../other/4.png",
            "a/x.png: a link that leads outside, to ../../../other",
        ),
        ("a/more", "../../../other", "a/more: a link that leads outside"),
        ("a/deep/x.txt", "/etc/hostname", "a/deep/x.txt: a link that leads outside, to /etc/host"),
        ("c", "../../other", "c: a link that leads outside"),
        ("a/x.png", "/nowhere.png", "a/x.png: a link that leads nowhere, to /nowhere.png"),
        ("a/x.png", "x.png", "a/x.png: a link that leads nowhere, to x.png"),
        ("a/more", ".", "a/more: the same folder as a"),
        ("a/more", "..", "a/more/a: the same folder as a"),
        ("a/more", "../..", "a/more/train/a: the same folder as a"),
        ("a/more", "deep", "a/more: the same folder as a/deep"),
        ("loop", ".", "loop/loop: the same folder as loop"),
    ],
)
def test_links_out_of_the_root_to_nowhere_and_in_circles_are_refused(root, name, target, message):
    _link(root / "train" / name, target)
    with pytest.raises(ValueError, match=message) as error:
        _names(root)
    assert f"Nothing outside of {root} is read. Copy the files there" in str(error.value)


def test_links_that_begin_with_the_root_s_name_are_outside(root, tmp_path):
    _touch(tmp_path / "root2" / "5.png")
    _link(root / "train" / "a" / "x.png", tmp_path / "root2" / "5.png")
    with pytest.raises(ValueError, match="leads outside"):
        _names(root)


def test_a_split_that_leads_out_of_the_root_is_refused(root, tmp_path):
    _link(root / "val", tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"image folder .*/val leads to .*/other, outside of .*root"
    ):
        _names(root, "val")


def test_links_to_links_are_resolved_to_the_end(root, tmp_path):
    _link(root / "pool" / "out", tmp_path / "other")
    _link(root / "train" / "a" / "x.png", "../../pool/out/4.png")
    with pytest.raises(ValueError, match=r"a/x\.png: a link that leads outside"):
        _names(root)


def test_doubling_links_end(root):
    """Each of 40 folders holds two links to the next: 2^40 ways."""
    for i in range(40):
        (root / "pool" / str(i)).mkdir()
        for name in "xy":
            _link(root / "pool" / str(i) / name, f"../{i + 1}")
    (root / "pool" / "40").mkdir()
    with pytest.raises(ValueError, match="the same folder as"):
        _names(root, "pool")


def test_faults_are_listed_together_with_their_number(root):
    for i in range(14):
        _link(root / "train" / "a" / f"{i:02d}.png", "/nowhere")
    with pytest.raises(ValueError, match="has 14 faults:") as error:
        _names(root)
    assert str(error.value).count("leads nowhere") == 10
    assert "\n  and 4 more\n" in str(error.value)


def test_strange_names_are_listed_and_escaped(root):
    name = os.fsdecode(b"\xe9\x1b[31m\n.png")
    _touch(root / "train" / "a" / name)
    assert f"a/{name}" in _names(root)
    _link(root / "train" / "a" / f"x{name}", "/nowhere")
    with pytest.raises(ValueError, match="nowhere") as error:
        _names(root)
    assert "a/x\\udce9\\x1b[31m\\n.png: a link" in str(error.value)


def test_pipes_are_refused(root):
    """Reading one would wait for ever."""
    os.mkfifo(root / "train" / "a" / "x.png")
    with pytest.raises(ValueError, match=r"a/x\.png: neither a file nor a folder"):
        _names(root)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_folders_that_cannot_be_read_are_refused(root):
    (root / "train" / "a").chmod(0)
    with pytest.raises(ValueError, match="a: Permission denied"):
        _names(root)
    (root / "train" / "a").chmod(0o700)

import json
from pathlib import Path

import pytest

from deploycc.core.store import ENTRY, Store, default_root
from deploycc.errors import StoreError


def write(text):
    return lambda folder: (folder / "data").write_text(text)


def test_an_entry_comes_back_with_its_facts(tmp_path):
    store = Store(tmp_path)
    assert store.get("k") is None
    store.put("k", {"a": 1}, write("hello"))
    facts, folder = store.get("k")
    assert facts == {"a": 1}
    assert (folder / "data").read_text() == "hello"


def test_the_key_depends_on_every_fact():
    assert Store.key({"a": 1, "b": 2}) == Store.key({"b": 2, "a": 1})
    assert Store.key({"a": 1}) != Store.key({"a": 2})


@pytest.mark.parametrize("damage", ["changed", "missing", "garbled"])
def test_a_damaged_entry_counts_as_absent(tmp_path, damage):
    store = Store(tmp_path)
    store.put("k", {}, write("hello"))
    folder = store.get("k")[1]
    if damage == "changed":
        (folder / "data").write_text("jello")
    elif damage == "missing":
        (folder / "data").unlink()
    else:
        (folder / ENTRY).write_text("{")
    assert store.get("k") is None
    store.put("k", {}, write("again"))
    assert (store.get("k")[1] / "data").read_text() == "again"


def test_a_write_that_dies_leaves_no_entry(tmp_path):
    store = Store(tmp_path)

    def die(folder: Path):
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("k", {}, die)
    assert store.get("k") is None
    assert list(store.root.iterdir()) == []


def test_a_full_disk_is_an_error_with_a_fix(tmp_path):
    def full(folder: Path):
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left") as caught:
        Store(tmp_path).put("k", {}, full)
    assert "DEPLOYCC_CACHE" in caught.value.fix


def test_a_place_that_is_not_a_folder_is_an_error_with_a_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write") as caught:
        Store(tmp_path / "file").put("k", {}, write("x"))
    assert "DEPLOYCC_CACHE" in caught.value.fix


def test_the_least_recently_used_entry_goes_first(tmp_path):
    import os

    store = Store(tmp_path, limit_bytes=2500)
    for index, name in enumerate("abc"):
        store.put(name, {}, write(name * 1000))
        os.utime(store.root / name, (index, index))
    store.put("d", {}, write("d" * 1000))
    kept = {path.name for path in store.root.iterdir()}
    assert "d" in kept
    assert "a" not in kept
    assert sum(len((store.root / name / "data").read_text()) for name in kept) <= 2500


def test_the_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "here"))
    assert default_root() == tmp_path / "here"
    monkeypatch.delenv("DEPLOYCC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "deploycc"


def test_entries_are_plain_json(tmp_path):
    store = Store(tmp_path)
    store.put("k", {"a": [1, None]}, write("x"))
    assert json.loads((store.root / "k" / ENTRY).read_text())["facts"] == {"a": [1, None]}


def test_a_run_afresh_reads_nothing_and_replaces_what_was_there(tmp_path):
    Store(tmp_path).put("k", {"a": 1}, write("old"))
    afresh = Store(tmp_path, reading=False)
    assert afresh.get("k") is None
    afresh.put("k", {"a": 2}, write("new"))
    facts, folder = Store(tmp_path).get("k")
    assert facts == {"a": 2}
    assert (folder / "data").read_text() == "new"
    again = afresh.get("k")  # another attempt of the same run
    assert again is not None
    assert again[0] == {"a": 2}
    afresh.put("k", {"a": 2}, write("twice"))
    assert (folder / "data").read_text() == "new"


def test_a_process_that_does_not_write_reads(tmp_path):
    silent = Store(tmp_path, writing=False)
    silent.put("k", {}, write("x"))
    assert Store(tmp_path).get("k") is None
    Store(tmp_path).put("k", {}, write("x"))
    assert silent.get("k") is not None


def test_what_a_pass_kept_to_go_on_from_is_gone_when_it_is_finished(tmp_path):
    store = Store(tmp_path)
    folder = store.progress("k")
    folder.mkdir(parents=True)
    (folder / "epoch.pt").write_text("state")
    store.put("other", {}, write("x"))
    assert folder.is_dir()
    store.put("k", {}, write("x"))
    assert not folder.exists()

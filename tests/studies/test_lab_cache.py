# SPDX-License-Identifier: Apache-2.0
"""Folders of the lab's cache: whole or absent, and known by the code that made them."""

import json
import sys

import pytest

from batchery.studies import lab_cache


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "some.folder"

    def fail(target):
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab_cache.write_folder(folder, fail)
    assert list(tmp_path.iterdir()) == []
    assert not lab_cache.is_whole(folder)
    lab_cache.write_folder(folder, lambda target: (target / "a").write_text("one"))
    lab_cache.write_folder(folder, lambda target: (target / "a").write_text("two"))
    assert lab_cache.is_whole(folder)
    assert (folder / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"a": "0"}', '{"b": "0"}'])
def test_a_folder_with_a_wrong_manifest_is_not_whole(tmp_path, manifest, caplog):
    folder = tmp_path / "some.folder"
    lab_cache.write_folder(folder, lambda target: (target / "a").write_text("content"))
    path = folder / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    assert not lab_cache.is_whole(folder)
    assert "some.folder" in caplog.text


def test_a_folder_that_another_process_finished_first_stays(tmp_path):
    folder = tmp_path / "some.folder"

    def race(target):
        (target / "a").write_text("ours")

    def finished_meanwhile(source, target):
        lab_cache.os.rename = rename
        lab_cache.write_folder(folder, lambda other: (other / "a").write_text("theirs"))
        raise OSError("not empty")

    rename = lab_cache.os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_cache.os, "rename", finished_meanwhile)
        lab_cache.write_folder(folder, race)
    assert (folder / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_digest_of_code_follows_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for content in ("a = 1", "a = 2"):
        (tmp_path / "toy_module_of_lab.py").write_text(content)
        sys.modules.pop("toy_module_of_lab", None)
        import toy_module_of_lab

        digests.append(lab_cache.code_digest(toy_module_of_lab))
    assert digests[0] != digests[1]
    assert json.loads(json.dumps(digests)) == digests

# SPDX-License-Identifier: Apache-2.0
import hashlib
import http.client
import http.server
import io
import logging
import os
import tarfile
import threading
import wave

import numpy as np
import pytest

from batchery import dataset_readers, datasets
from batchery.datasets import CorruptData, Dataset, File, MissingData, UnknownData

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the test may forbid ranges, cut the answer short, or change it."""

    ranges, cut, content = True, None, CONTENT
    asked: list = []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (_Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}/toy.bin"
        yield handler
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BATCHERY_DATA", raising=False)
    return tmp_path / "batchery"


@pytest.fixture
def register(monkeypatch):
    def add(url="", digest=DIGEST):
        source = ((File("folder/toy.bin", digest, url),), lambda paths: paths[0].read_bytes())
        monkeypatch.setitem(datasets._REGISTRY, "toy", Dataset("toy", "", "", (source,)))

    return add


def test_a_download_is_checked_and_kept(server, cache, register):
    register(server.url)
    assert datasets.load("toy") == CONTENT
    assert datasets.load("toy") == CONTENT
    assert server.asked == [None]
    assert [p.name for p in (cache / "folder").iterdir()] == ["toy.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, cache, register, ranges):
    register(server.url)
    server.cut = 100_000
    with pytest.raises(MissingData, match=r"folder/toy.bin.*connection ended after 100,000 bytes"):
        datasets.load("toy")
    assert (cache / "folder/toy.bin.part").stat().st_size == 100_000
    assert not (cache / "folder/toy.bin").exists()
    server.cut, server.ranges = None, ranges
    assert datasets.load("toy") == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_complete_part_is_not_fetched_again(server, cache, register):
    register(server.url)
    (cache / "folder").mkdir(parents=True)
    (cache / "folder/toy.bin.part").write_bytes(CONTENT)
    assert datasets.load("toy") == CONTENT


def test_a_wrong_download_is_never_used_and_the_next_begins_anew(server, cache, register):
    register(server.url)
    server.content = b"x" + CONTENT[1:]
    with pytest.raises(CorruptData, match="truncated or changed"):
        datasets.load("toy")
    assert list((cache / "folder").iterdir()) == []
    server.content = CONTENT
    assert datasets.load("toy") == CONTENT


def test_an_answer_that_is_no_http_names_file_reason_and_command(cache, register, monkeypatch):
    def broken(url, part):
        raise http.client.IncompleteRead(b"")

    register("http://127.0.0.1:9/toy.bin")
    monkeypatch.setattr(datasets, "_transfer", broken)
    with pytest.raises(MissingData, match="'toy' needs folder/toy.bin: .*IncompleteRead"):
        datasets.load("toy")


def test_no_connection_names_file_reason_and_command(cache, register):
    register("http://127.0.0.1:9/toy.bin")
    with pytest.raises(
        MissingData,
        match=r"'toy' needs folder/toy.bin: .*could not be fetched.*: batchery data toy",
    ):
        datasets.load("toy")


def test_the_named_folder_comes_first(cache, register, tmp_path, monkeypatch):
    register("http://127.0.0.1:9/toy.bin")
    path = tmp_path / "given/folder/toy.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv("BATCHERY_DATA", str(tmp_path / "given"))
    assert datasets.load("toy") == CONTENT


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"x" + CONTENT[1:], b""])
def test_a_damaged_file_is_named_and_not_used(cache, register, tmp_path, monkeypatch, damage):
    register()
    path = tmp_path / "given/folder/toy.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv("BATCHERY_DATA", str(tmp_path / "given"))
    assert datasets.load("toy") == CONTENT
    before = path.stat()
    path.write_bytes(damage)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its time tells nothing
    with pytest.raises(CorruptData, match=r"given/folder/toy.bin .*truncated or changed"):
        datasets.load("toy")


def test_a_file_without_an_address_is_missing(cache, register):
    register()
    with pytest.raises(MissingData, match="no address"):
        datasets.load("toy")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UnknownData, match="no data set is called 'mnits'; there are .*mnist"):
        datasets.load("mnits")


def test_every_set_can_be_described_and_has_digests():
    for name in datasets.names():
        entry = datasets.describe(name)
        assert entry.summary
        assert entry.licence
        for files, _ in entry.sources:
            assert all(len(file.sha256) == 64 for file in files)
        assert all(not files or files[0].url for files, _ in entry.sources[-1:])


def test_stdlib_text_is_the_same_twice_and_is_source():
    text = datasets.load("stdlib-text")
    assert len(text) > 5_000_000
    assert "class OrderedDict(dict):" in text
    assert text == datasets.load("stdlib-text")


def test_digits():
    data = datasets.load("digits")
    assert data["x_train"].shape == (1437, 64)
    assert data["x_test"].shape == (360, 64)
    assert data["x_train"].min() == 0.0
    assert data["x_train"].max() == 1.0
    assert sorted(set(data["y_test"].tolist())) == list(range(10))


def _wav(samples):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.array(samples, np.int16).tobytes())
    return buffer.getvalue()


def test_recordings_are_read_and_digested_whatever_the_archive(tmp_path):
    rows = {"3_ada_7.wav": _wav([1, -2]), "0_bob_1.wav": _wav([5])}
    paths = []
    for number, order in enumerate((sorted(rows), sorted(rows, reverse=True))):
        paths.append(tmp_path / f"{number}.tar.gz")
        with tarfile.open(paths[-1], "w:gz") as archive:
            for name in order:
                entry = tarfile.TarInfo(f"top/recordings/{name}")
                entry.size, entry.mtime = len(rows[name]), number
                archive.addfile(entry, io.BytesIO(rows[name]))
    assert dataset_readers.recordings_digest(paths[0]) == dataset_readers.recordings_digest(
        paths[1]
    )
    data = dataset_readers.speech(dataset_readers.recordings(paths[0]))
    assert [w.tolist() for w in data["waves"]] == [[5], [1, -2]]
    assert data["labels"].tolist() == [0, 3]
    assert data["test"].tolist() == [True, False]


def test_cifar10_binary_rows(tmp_path):
    image = np.arange(3 * 32 * 32).astype(np.uint8)
    row = bytes([7]) + image.tobytes()
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(row)
            archive.addfile(entry, io.BytesIO(row))
    data = dataset_readers.cifar10_binary([tmp_path / "c.tar.gz"])
    assert data["x_train"].shape == (5, 32, 32, 3)
    assert data["y_test"].tolist() == [7]
    assert data["x_test"][0, 1, 2].tolist() == [int(image[c * 1024 + 34]) for c in range(3)]


@pytest.fixture
def pictures(tmp_path):
    """Both splits of CIFAR-10's form, of three pictures each, losslessly compressed."""
    parquet, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    import pyarrow

    paths, arrays = [], {}
    for split in ("train", "test"):
        drawn = np.random.default_rng(len(split))
        pixels, labels = drawn.integers(256, size=(3, 2, 2, 3), dtype=np.uint8), [3, 1, 2]
        rows = []
        for picture in pixels:
            buffer = io.BytesIO()
            image.fromarray(picture).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue()})
        paths.append(tmp_path / f"{split}.parquet")
        parquet.write_table(pyarrow.table({"image": rows, "label": labels}), paths[-1])
        arrays |= {f"x_{split}": pixels, f"y_{split}": np.array(labels)}
    return paths, arrays


def _same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_decoded_pictures_are_kept(cache, pictures, monkeypatch):
    paths, arrays = pictures
    _same(dataset_readers.cifar10_jpeg(paths), arrays)
    monkeypatch.setattr(dataset_readers, "import_extra", None)  # nothing is decoded again
    _same(dataset_readers.cifar10_jpeg(paths), arrays)


def test_kept_pictures_that_are_damaged_anywhere_are_named_and_decoded_again(
    cache, pictures, caplog
):
    paths, arrays = pictures
    dataset_readers.cifar10_jpeg(paths)
    kept = next(cache.glob("cifar10.*.npz"))
    whole = kept.read_bytes()
    cuts = [whole[:size] for size in range(0, len(whole), 97)]
    places = range(0, len(whole), 5)
    flips = [whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :] for k in places]
    named = 0
    with caplog.at_level(logging.WARNING):
        for damaged in cuts + flips:
            kept.write_bytes(damaged)
            caplog.clear()
            _same(dataset_readers.cifar10_jpeg(paths), arrays)
            if caplog.records:  # else what was flipped is nothing that anyone reads
                named += 1
                assert str(kept) in caplog.text
                assert kept.read_bytes() == whole
    assert named > 0.7 * len(cuts + flips)


SHAPES = {
    "mnist": {"x_train": (60000, 28, 28), "x_test": (10000, 28, 28)},
    "cifar10": {"x_train": (50000, 32, 32, 3), "x_test": (10000, 32, 32, 3)},
}


@pytest.mark.skipif("BATCHERY_DATA" not in os.environ, reason="BATCHERY_DATA names no folder")
@pytest.mark.parametrize("name", ["mnist", "cifar10", "gsm8k", "tinyshakespeare", "fsdd"])
def test_the_real_files(name):
    data = datasets.load(name)
    if name in SHAPES:
        assert {key: data[key].shape for key in SHAPES[name]} == SHAPES[name]
        assert np.bincount(data["y_test"]).min() >= 890
    elif name == "gsm8k":
        assert (len(data["train"]), len(data["test"])) == (7473, 1319)
    elif name == "fsdd":
        assert len(data["waves"]) == 3000
        assert data["test"].sum() == 300
    else:
        assert data.startswith("First Citizen:")

"""The cache of preprocessed images: used, written again, shared by several processes."""

import logging
import os
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image
from test_data import folder, split_images
from training_runs import same

from flowgen.data import cache
from flowgen.data.dataset import Prefetcher
from flowgen.training.checkpoint import read_checkpoint


def all_images(root: Path) -> torch.Tensor:
    return torch.cat(split_images(folder(root)))


def cached(suffix: str) -> list[Path]:
    return sorted(Path(os.environ["FLOWGEN_CACHE"]).glob(f"*{suffix}"))


def test_the_cache_is_used_and_written_again_when_an_image_changes(images, monkeypatch):
    before = all_images(images)
    with monkeypatch.context() as patch:
        patch.setattr("flowgen.data.preprocess.preprocess", None)  # decoding would fail
        assert torch.equal(all_images(images), before)
    path = images / "000.png"
    Image.new("RGB", (8, 8), "red").save(path)
    os.utime(path, ns=(1, 1))
    assert any((image[0] == 255).all() and not image[1].any() for image in all_images(images))
    assert len(cached(".bin")) == 1


def test_the_cache_depends_on_the_settings(images):
    assert folder(images, size=4).image_shape == (3, 4, 4)
    assert folder(images, channels=1).image_shape == (1, 8, 8)


def test_a_broken_link_and_a_lost_cache_file_do_no_harm(images):
    (images / "gone.png").symlink_to(images / "nowhere.png")
    before = all_images(images)
    for path in cached(".bin"):
        path.unlink()
    assert torch.equal(all_images(images), before)


@pytest.mark.parametrize(
    "text", ["", '{"kept": ["000.p', "no index", "[]", '{"kept": 3, "refused": []}', "\udcff"]
)
def test_a_damaged_index_is_written_again(images, text):
    before = all_images(images)
    cached(".json")[0].write_text(text, errors="surrogateescape")
    assert torch.equal(all_images(images), before)
    assert cached(".json")[0].read_text().startswith('{"kept"')


def test_files_of_a_killed_process_are_removed(images):
    folder(images)
    index = cached(".json")[0]
    index.unlink()
    index.with_suffix(".bin.part").write_bytes(b"half")
    other = index.name.rpartition("-")[0] + "-0123456789ab.bin"
    index.with_name(other).write_bytes(b"of other images")
    folder(images)
    assert sorted(path.suffix for path in index.parent.iterdir()) == [".bin", ".json", ".lock"]


def test_one_of_several_threads_writes_the_cache_and_the_others_wait(images, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    caplog.set_level(logging.INFO, "flowgen")
    write = cache._write
    calls = []
    results: list[torch.Tensor] = []

    def num_waiting() -> int:
        waiting = "waiting for another process"
        return len({id(each) for each in caplog.records if waiting in each.getMessage()})

    def slow_write(*arguments):
        calls.append(threading.get_ident())
        deadline = time.monotonic() + 60
        while num_waiting() < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(*arguments)

    monkeypatch.setattr(cache, "_write", slow_write)
    threads = [
        threading.Thread(target=lambda: results.append(all_images(images))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 3
    assert all(torch.equal(result, results[0]) for result in results)
    assert num_waiting() == 2


def test_images_are_not_removed_while_another_thread_opens_them(images, monkeypatch):
    """The other thread sees one more image, and the file of the first is stale to it."""
    map_file = cache._map_file
    threads = []

    def map_slowly(path):
        monkeypatch.setattr(cache, "_map_file", map_file)
        save_image(images / "more.png")
        threads.append(threading.Thread(target=folder, args=(images,)))
        threads[0].start()
        threads[0].join(1)
        return map_file(path)

    monkeypatch.setattr(cache, "_map_file", map_slowly)
    assert len(all_images(images)) == 40
    threads[0].join()
    assert len(cached(".bin")) == 1


def test_a_data_set_may_exceed_the_memory_limit_of_a_process():
    def writable_mib() -> int:
        """Memory that counts towards `ulimit -d`."""
        return psutil.Process().memory_info().data >> 20

    chunks = [torch.full((2**20,), number, dtype=torch.uint8) for number in range(64)]
    before = writable_mib()
    images = cache.cached_array("large", "fingerprints", lambda: iter(chunks))
    assert images[:: 2**12].long().sum() == 2**8 * sum(range(64))
    assert writable_mib() - before < 16


def test_a_data_set_that_does_not_fit_into_memory_trains_to_the_same_bits(
    images, command, monkeypatch
):
    overrides = [*SMALL, f"data.root={images}", "trainer.warmdown_ratio=0", "data.random_flip=true"]
    assert command("train", *overrides, "trainer.steps=4", "output_dir=whole")[0] == 0
    monkeypatch.setattr("flowgen.data.dataset.free_memory", lambda: 1)
    assert command("train", *overrides, "trainer.steps=2", "output_dir=prefetched")[0] == 0
    prefetcher = Mock(side_effect=Prefetcher)
    with monkeypatch.context() as patch:
        patch.setattr("flowgen.data.dataset.Prefetcher", prefetcher)
        assert command("resume", "prefetched", "trainer.steps=4")[0] == 0
    assert prefetcher.call_count == 1
    first, second = (
        read_checkpoint(Path(name) / "checkpoints" / "last.pt") for name in ("whole", "prefetched")
    )
    for key in ("step", "images_seen", "model", "ema", "optimizer"):
        assert same(first[key], second[key]), key

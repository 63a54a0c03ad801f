"""Prepared images on disk: used, made again, shared by several processes."""

import logging
import os
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image
from test_data import folder, parts
from trainings import same

from flowgen.data import cache
from flowgen.data.dataset import Prefetcher
from flowgen.training.checkpoint import read_checkpoint


def cached(suffix: str) -> list[Path]:
    return sorted(Path(os.environ["FLOWGEN_CACHE"]).glob(f"*{suffix}"))


def test_cache_is_used_and_made_again_when_an_image_changes(images, monkeypatch):
    before = torch.cat(parts(folder(images)))
    with monkeypatch.context() as patched:
        patched.setattr("flowgen.data.cache.prepare", None)  # nothing may be decoded now
        assert torch.equal(torch.cat(parts(folder(images))), before)
    path = images / "000.png"
    Image.new("RGB", (8, 8), "red").save(path)
    os.utime(path, ns=(1, 1))
    data = folder(images)
    assert any((image[0] == 255).all() and not image[1].any() for image in torch.cat(parts(data)))
    assert len(list(Path(os.environ["FLOWGEN_CACHE"]).glob("*.bin"))) == 1


def test_cache_depends_on_the_settings(images):
    assert folder(images, size=4).shape == (3, 4, 4)
    assert folder(images, channels=1).shape == (1, 8, 8)


def test_a_broken_link_and_a_lost_cache_are_no_trouble(images):
    (images / "gone.png").symlink_to(images / "nowhere.png")
    before = torch.cat(parts(folder(images)))
    for path in Path(os.environ["FLOWGEN_CACHE"]).glob("*.bin"):
        path.unlink()
    assert torch.equal(torch.cat(parts(folder(images))), before)


@pytest.mark.parametrize(
    "text", ["", '{"kept": ["000.p', "no index", "[]", '{"kept": 3, "refused": []}', "\udcff"]
)
def test_an_index_that_is_damaged_is_made_again(images, text):
    before = torch.cat(parts(folder(images)))
    cached(".json")[0].write_text(text, errors="surrogateescape")
    assert torch.equal(torch.cat(parts(folder(images))), before)
    assert cached(".json")[0].read_text().startswith('{"kept"')


def test_what_a_killed_process_left_is_cleared(images):
    folder(images)
    index = cached(".json")[0]
    index.unlink()
    index.with_suffix(".part").write_bytes(b"half")
    index.with_name(index.name.rpartition("-")[0] + "-0123456789ab.bin").write_bytes(
        b"of other images"
    )
    folder(images)
    assert sorted(path.suffix for path in index.parent.iterdir()) == [".bin", ".json", ".lock"]


def test_of_several_that_want_the_same_images_one_prepares_them(images, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    caplog.set_level(logging.INFO, "flowgen")
    write, calls = cache._write, []

    def slow(*arguments):
        calls.append(threading.get_ident())
        time.sleep(0.2)
        return write(*arguments)

    monkeypatch.setattr(cache, "_write", slow)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.cat(parts(folder(images)))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(calls) == 1 and len(found) == 3 and all(torch.equal(each, found[0]) for each in found)
    )
    assert (
        len(
            {
                id(record)
                for record in caplog.records
                if "waiting for another process" in record.getMessage()
            }
        )
        == 2
    )


def test_images_are_not_cleared_away_while_another_opens_them(images, monkeypatch):
    """The other one has seen an image more, so that what the first one made is stale to it."""
    mapped, others = cache._mapped, []

    def open_slowly(path):
        monkeypatch.setattr(cache, "_mapped", mapped)
        save_image(images / "more.png")
        others.append(threading.Thread(target=folder, args=(images,)))
        others[0].start()
        others[0].join(1)
        return mapped(path)

    monkeypatch.setattr(cache, "_mapped", open_slowly)
    assert len(torch.cat(parts(folder(images)))) == 40
    others[0].join()
    assert len(cached(".bin")) == 1


def test_a_set_may_be_larger_than_the_memory_that_a_process_may_have(tmp_path):
    def private() -> int:
        """MiB that may be written to, which are what a limit or a small machine refuses."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) // 1024

    chunks = [torch.full((2**20,), number, dtype=torch.uint8) for number in range(64)]
    before = private()
    images = cache.cached_array("large", "stamps", lambda: iter(chunks))
    assert images[:: 2**12].long().sum() == 2**8 * sum(range(64)) and private() - before < 16


def test_a_set_that_does_not_fit_into_memory_trains_to_the_same_bits(images, command, monkeypatch):
    words = [*SMALL, f"data.root={images}", "trainer.warmdown_ratio=0", "data.random_flip=true"]
    assert command("train", *words, "trainer.steps=4", "output_dir=whole")[0] == 0
    monkeypatch.setattr("flowgen.data.dataset.free_memory", lambda: 1)
    assert command("train", *words, "trainer.steps=2", "output_dir=ahead")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(
            "flowgen.data.dataset.Prefetcher", read_ahead := Mock(side_effect=Prefetcher)
        )
        assert command("resume", "ahead", "trainer.steps=4")[0] == 0
    assert read_ahead.call_count == 1
    states = [
        read_checkpoint(Path(name) / "checkpoints" / "last.pt") for name in ("whole", "ahead")
    ]
    assert all(
        same(states[0][key], states[1][key])
        for key in ("step", "images_seen", "model", "ema", "optimizer")
    )

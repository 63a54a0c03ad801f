"""The commands `compress` and `decompress`: exact files, and one sentence for every problem."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image, save_images, trained
from PIL import Image
from test_coding import briefly_trained, smooth_images
from test_models import build_model

import flowgen
from flowgen import coding
from flowgen.bijections.networks import CausalTransformer
from flowgen.coding import archive
from flowgen.coding.coder import NearBoundaryError
from flowgen.coding.flow_codec import FlowCodec
from flowgen.commands.compress import check_names, file_names
from flowgen.config.instantiate import build_data
from flowgen.config.runs import find_checkpoint
from flowgen.data.mnist import MNISTSample
from flowgen.training.checkpoint import write_checkpoint
from flowgen.utils.errors import UserError

pytest.importorskip("constriction", reason="needs the extra codec")

GENERIC = {  # kernels without the vector instructions of this machine
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",  # two threads on a busy machine would wait for each other
}
HERE = Path(__file__).parents[1]
DAMAGED_FILES = int(os.environ.get("DAMAGED_FILES", "100"))


@pytest.fixture(scope="module")
def model() -> flowgen.models.Flow:
    """A small flow of smooth images, in memory."""
    torch.manual_seed(0)
    return briefly_trained(build_model("glow", steps_per_level=1), smooth_images())


@pytest.fixture(scope="module")
def data(model) -> bytes:
    return coding.compress(FlowCodec(model), smooth_images(8), "run", list("abcdefgh")).data


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on color images of 8 bits, which it represents exactly."""
    folder = tmp_path_factory.mktemp("color")
    root = f"data.root={save_images(folder / 'images')}"
    return trained(folder, run=[*SMALL, root, "data.bits=8", "trainer.steps=2"]) / "run"


@pytest.fixture
def color_run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def restore(model, data: bytes) -> torch.Tensor:
    header, payload = coding.read_header(data)
    return coding.decompress(FlowCodec(model), header, payload)


def pack(header: archive.Header, payload: bytes) -> bytes:
    """Write a file with valid checksums of its words, as an attacker can."""
    return archive._pack(replace(header, words=zlib.crc32(payload))) + payload


# Commands


def test_a_folder_returns_with_its_names(command, color_run, images, elsewhere):
    (images / "more").mkdir()
    save_image(images / "more" / "000.png")
    Image.open(images / "001.png").save(images / "more" / "000.bmp")
    status, out, _ = command("compress", images, "--run", color_run, "--out", "a.flow")
    assert status == 0
    size = (elsewhere / "a.flow").stat().st_size
    assert f"42 images of 192 numbers: {size:,} bytes, {8 * size / 42 / 192:.4f} bits/dim" in out
    assert "decoded again: equal" in out
    status, out, _ = command("decompress", "a.flow", "--run", color_run, "--out", "restored")
    assert (status, out) == (0, "restored\n42 images of 8 bits\n")
    restored = elsewhere / "restored"
    names = {path.relative_to(restored) for path in restored.rglob("*.png")}
    assert len(names) == 42 and Path("more/000_2.png") in names
    for name in names - {Path("more/000.png"), Path("more/000_2.png")}:
        assert Image.open(restored / name).tobytes() == Image.open(images / name).tobytes()
    both = {Image.open(restored / "more" / name).tobytes() for name in ("000.png", "000_2.png")}
    sources = (images / "more" / "000.png", images / "001.png")
    assert both == {Image.open(path).tobytes() for path in sources}


def test_a_split_is_numbered_and_json_has_all_values(command, color_run, elsewhere):
    arguments = ("--split", "test", "--count", 3, "--run", color_run, "--json", "--no-verify")
    status, out, _ = command("compress", *arguments, "--out", "a.flow")
    row = json.loads(out)
    assert status == 0
    assert row["images"] == 3 and row["dimensions"] == 192 and not row["verified"]
    assert row["bytes"] == (elsewhere / "a.flow").stat().st_size
    assert row["net_bits_per_dim"] == pytest.approx(row["model_bits_per_dim"], rel=0.01)
    assert row["bits_per_dim"] > row["net_bits_per_dim"]
    command("decompress", "a.flow", "--run", color_run, "--out", "restored")
    assert sorted(path.name for path in (elsewhere / "restored").iterdir()) == [
        f"{index:07d}.png" for index in range(3)
    ]


def test_the_file_names_its_run(command, color_run, images, elsewhere):
    run = elsewhere / "outputs" / "tiny"
    run.parent.mkdir()
    color_run.rename(run)
    assert command("compress", images / "000.png", "--out", "a.flow")[0] == 0
    assert command("decompress", "a.flow", "--out", "restored")[0] == 0
    run.rename(elsewhere / "elsewhere")
    status, _, error = command("decompress", "a.flow", "--out", "again")
    assert status == 1 and "'outputs/tiny', which is not a run here: give the same" in error


@pytest.mark.parametrize("run", ["hf:owner/name", "/etc", "../secret", "zoo/../../x"])
def test_a_file_does_not_choose_places_or_downloads(command, data, elsewhere, run):
    header, payload = coding.read_header(data)
    (elsewhere / "a.flow").write_bytes(pack(replace(header, run=run), payload))
    status, _, error = command("decompress", "a.flow", "--out", "restored")
    assert status == 1 and "not a run here: give the same model with --run" in error


def test_images_that_would_change_are_refused(command, color_run, tmp_path, elsewhere):
    large = save_image(tmp_path / "large.png", (9, 8, 3))
    arguments = ("--run", color_run, "--out", "a.flow")
    status, _, error = command("compress", large, *arguments)
    assert status == 1 and "large.png would be changed to 8x8 pixels" in error
    assert "add --prepared" in error and not (elsewhere / "a.flow").exists()
    assert command("compress", large, *arguments, "--prepared")[0] == 0
    transparent = tmp_path / "transparent.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(transparent)
    assert command("compress", transparent, *arguments, "--overwrite")[0] == 1
    gray = save_image(tmp_path / "gray.png", (8, 8))
    assert command("compress", gray, *arguments, "--overwrite")[0] == 0  # as color, equal


def test_images_that_are_not_square_return(command, tmp_path, elsewhere):
    for index in range(30):
        save_image(tmp_path / "images" / f"{index:03d}.png", (8, 12, 3))
    root = [*SMALL, f"data.root={tmp_path / 'images'}", "data.size=[8,12]", "data.bits=8"]
    arguments = ("--run", trained(tmp_path, run=[*root, "trainer.steps=1"]) / "run", "--out")
    square = save_image(tmp_path / "square.png", (8, 8, 3))
    status, _, error = command("compress", square, *arguments, "a.flow")
    assert status == 1 and "square.png would be changed to 12x8 pixels, 3 channels" in error
    images = [tmp_path / "images" / f"{index:03d}.png" for index in range(3)]
    assert command("compress", *images, *arguments, "a.flow")[0] == 0
    assert command("decompress", "a.flow", *arguments, "restored")[0] == 0
    for image in images:
        restored = Image.open(elsewhere / "restored" / image.name)
        assert restored.tobytes() == Image.open(image).tobytes()


def png_of_16_bits(values: bytes) -> bytes:
    """Return a color PNG of 8x8 pixels, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = b"".join(b"\0" + values[48 * row : 48 * row + 48] for row in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "ppm"])
def test_color_images_of_16_bits_are_refused(command, color_run, tmp_path, elsewhere, suffix):
    """Pillow reads only the upper 8 bits, so that the lower ones would be lost silently."""
    values = random.Random(0).randbytes(2 * 3 * 8 * 8)
    deep = tmp_path / f"deep.{suffix}"
    deep.write_bytes(png_of_16_bits(values) if suffix == "png" else b"P6 8 8 65535\n" + values)
    arguments = ("--run", color_run, "--out", "a.flow")
    status, _, error = command("compress", deep, *arguments)
    assert status == 1 and f"deep.{suffix} would be changed to" in error
    assert not (elsewhere / "a.flow").exists()
    shallow = tmp_path / f"shallow.{suffix}"
    Image.new("RGB", (8, 8), "teal").save(shallow)
    assert command("compress", shallow, *arguments)[0] == 0


def test_images_of_fewer_bits_are_exact_if_they_were_restored(command, tmp_path, elsewhere):
    images = tmp_path / "images"
    for index in range(30):
        save_image(images / f"{index:03d}.png")
    root = [*SMALL, f"data.root={images}", "data.bits=5", "trainer.steps=2"]
    run = trained(tmp_path, run=root) / "run"
    arguments = ("--run", run, "--out")
    status, _, error = command("compress", images, *arguments, "a.flow")
    assert status == 1 and "8x8 pixels, 3 channels and 5 bits, which loses details" in error
    assert command("compress", images, *arguments, "a.flow", "--prepared")[0] == 0
    status, out, _ = command("decompress", "a.flow", *arguments, "restored")
    assert "30 images of 5 bits, scaled to 8" in out
    assert command("compress", "restored", *arguments, "b.flow")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images, folders or zips, or choose --split test"),
        (["IMAGES", "--split", "test"], "but not both"),
        (["EMPTY"], "contains no images"),
        (["nowhere.png"], "nowhere.png does not exist: choose images, or a folder or a zip"),
        (["BROKEN"], "broken.png is not an image, or is cut short: repair or remove it"),
        (["IMAGES", "--out", "no/a.flow"], "the folder of no/a.flow does not exist"),
    ],
)
def test_problems_of_compress(command, color_run, images, tmp_path, arguments, message):
    places = {"IMAGES": images, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken.png"}
    places["EMPTY"].mkdir()
    places["BROKEN"].write_bytes(b"\x89PNG broken")
    words = [places.get(word, word) for word in arguments]
    status, _, error = command("compress", "--run", color_run, "--out", "a.flow", *words)
    assert status == 1 and message in error and error.count("\n") == 1


def test_nothing_is_replaced_without_overwrite(command, color_run, images, elsewhere):
    (elsewhere / "a.flow").write_text("mine")
    arguments = ("compress", images / "000.png", "--run", color_run, "--out", "a.flow")
    status, _, error = command(*arguments)
    assert status == 1 and "a.flow exists already" in error
    assert (elsewhere / "a.flow").read_text() == "mine"
    assert command(*arguments, "--overwrite")[0] == 0
    folder = elsewhere / "restored"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "000.png").write_text("old")
    arguments = ("decompress", "a.flow", "--run", color_run, "--out", folder)
    status, _, error = command(*arguments)
    assert status == 1 and "restored exists already" in error
    assert command(*arguments, "--overwrite")[0] == 0
    assert (folder / "notes.txt").read_text() == "mine"
    restored = Image.open(folder / "000.png")
    assert restored.tobytes() == Image.open(images / "000.png").tobytes()
    assert not list(elsewhere.glob(".restored*"))


def test_links_in_the_folder_are_not_followed(command, color_run, images, elsewhere):
    (images / "sub").mkdir()
    save_image(images / "sub" / "a.png")
    assert command("compress", images, "--run", color_run, "--out", "a.flow")[0] == 0
    outside = elsewhere / "outside"
    outside.mkdir()
    folder = elsewhere / "restored"
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    (folder / "000.png").symlink_to(outside / "target")
    arguments = ("decompress", "a.flow", "--run", color_run, "--out", folder, "--overwrite")
    status, _, error = command(*arguments)
    assert status == 1 and "is a link to another folder" in error
    (folder / "sub").unlink()
    assert command(*arguments)[0] == 0
    assert not list(outside.iterdir()) and not (folder / "000.png").is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        *("../a.png", "/a.png", "a/../../b.png", "a//b.png", "C:a.png", "a\\b.png", "a\0", "."),
        "\ud800.png",
    ],
)
def test_unsafe_names_are_refused(data, name):
    header, _ = coding.read_header(data)
    with pytest.raises(UserError, match="is not a safe name"):
        file_names(replace(header, names=[name] * 8))


def test_names_stay_different():
    check_names(["a.jpg", "b/c.png", "12:30.png", "..a"])


def test_another_model_is_refused(command, color_run, images, tmp_path):
    other = [*SMALL, f"data.root={images}", "data.bits=8", "trainer.steps=1", "seed=1"]
    run = trained(tmp_path, other=other) / "other"
    assert command("compress", images / "000.png", "--run", color_run, "--out", "a.flow")[0] == 0
    status, _, error = command("decompress", "a.flow", "--run", run, "--out", "restored")
    assert status == 1 and "was written with another model" in error
    assert error.count("\n") == 1


def test_a_model_of_another_kind_is_refused(command, color_run, images):
    assert command("compress", images / "000.png", "--run", color_run, "--out", "a.flow")[0] == 0
    status, _, error = command("decompress", "a.flow", "--run", "zoo/rbm_mnist", "--out", "b")
    assert status == 1 and "was written with another model" in error


@pytest.mark.parametrize(
    "args", [("compress", "--split", "test", "--out", "a.flow"), ("evaluate", "compress=true")]
)
def test_a_missing_package_is_one_sentence_before_any_work(command, color_run, args, monkeypatch):
    monkeypatch.setattr("flowgen.coding.factory.find_spec", lambda name: None)
    monkeypatch.setattr("flowgen.models.base.GenerativeModel.evaluate", None)
    status, _, error = command(*args, "--run", color_run)
    assert status == 1 and "pip install 'constriction" in error and error.count("\n") == 1


def test_an_rbm_prints_its_length_next_to_the_verdict_on_log_z(command, two_runs, elsewhere):
    run = shutil.copytree(two_runs / "rbm", elsewhere / "outputs" / "rbm")
    arguments = ("--split", "test", "--annealing-steps", 20, "--out", "a.flow", "--overwrite")
    status, out, _ = command("compress", *arguments)
    assert status == 0 and "nats per image); the model with log Z of `flowgen evaluate`: " in out
    assert "unknown; PNG" in out and "log Z is unknown: run `flowgen evaluate`" in out
    status, out, _ = command("compress", *arguments, "--json")
    assert json.loads(out)["model_bits_per_dim"] is None and json.loads(out)["verified"]
    status, out, _ = command("evaluate", "compress=true", "--json")
    row = json.loads(out)
    assert row["decompressed"] == "equal" and row["reliable"]
    assert row["code_log_likelihood"] < row["log_likelihood"]
    status, out, _ = command("compress", *arguments)
    assert f"log Z is {row['verdict']}" in out
    assert f"bits/dim ({-row['log_likelihood']:.2f} nats per image); PNG" in out
    assert command("decompress", "a.flow", "--run", run, "--out", "restored")[0] == 0
    assert len(list((elsewhere / "restored").iterdir())) == row["images"]


def test_a_full_disk_leaves_nothing(command, color_run, images, elsewhere, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    assert command("compress", images / "000.png", "--run", color_run, "--out", "a.flow")[0] == 0
    monkeypatch.setattr(Path, "write_bytes", full)
    arguments = ("--run", color_run, "--out")
    for words in (
        ("compress", images / "000.png", *arguments, "b.flow"),
        ("decompress", "a.flow", *arguments, "restored"),
    ):
        status, _, error = command(*words)
        assert status == 1 and "disk is full" in error
    assert {path.name for path in elsewhere.iterdir()} <= {"a.flow", "cache", "outputs"}


INTERRUPTED = """if True:
    import sys, time
    from flowgen.cli import main
    from flowgen.coding import archive

    class Slow(archive.Compressor):
        def add(self, images):
            print("batch", flush=True)
            time.sleep(0.5)
            super().add(images)

    archive.Compressor = Slow
    main(["compress", "--split", "train", "--run", sys.argv[1], "--out", "a.flow"])
"""


@pytest.mark.parametrize("kill_signal", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(color_run, elsewhere, kill_signal):
    arguments = [sys.executable, "-c", INTERRUPTED, str(color_run)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "batch\n"
        process.send_signal(kill_signal)
    assert process.returncode != 0
    assert not list(elsewhere.glob("*.flow*"))


# Damaged and hostile files


def test_damaged_files_give_one_sentence(model, data):
    """Flip a bit, cut, extend, swap or fill a part of the file; DAMAGED_FILES sets the count."""
    rng = random.Random(0)
    for _ in range(DAMAGED_FILES):
        damaged = bytearray(data)
        position = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                damaged[position] ^= 1 << rng.randrange(8)
            case 1:
                del damaged[position:]
            case 2:
                damaged += rng.randbytes(rng.randrange(1, 9))
            case 3:
                damaged[position : position + 4] = rng.randbytes(4)
            case _:
                damaged = bytearray(rng.randbytes(len(data)))
        if bytes(damaged) == data:
            continue
        with pytest.raises(UserError, match=r"is not a file of|is damaged"):
            restore(model, bytes(damaged))


def test_changed_words_with_valid_checksums_give_no_wrong_image(model, data):
    header, payload = coding.read_header(data)
    rng = random.Random(0)
    for _ in range(max(5, DAMAGED_FILES // 20)):
        words = bytearray(payload)
        words[rng.randrange(len(words))] ^= 1 << rng.randrange(8)
        with pytest.raises(UserError, match="do not match their checksum, so nothing was written"):
            restore(model, pack(header, bytes(words)))


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": []},
        {"batches": [[0, 0]]},
        {"batches": [[10**9, 0]]},
        {"batches": [[1, -1]]},
        {"batches": [[1, 33]]},
        {"batches": [[1.5, 0]]},
        {"batches": [["1", 0]]},
        {"batches": {"a": 1}},
        {"batches": [[1]]},
        {"borrowed": -1},
        {"borrowed": 1e99},
        {"names": ["a"]},
        {"names": [1] * 8},
        {"names": [""] * 8},
        {"run": None},
        {"tables": "x"},
        {"annealing_steps": "1"},
        {"model": 3},
    ],
)
def test_hostile_headers_are_refused(data, changes):
    header, payload = coding.read_header(data)
    with pytest.raises(UserError, match="is damaged"):
        coding.read_header(pack(replace(header, **changes), payload))


@pytest.mark.parametrize("changes", [{"borrowed": 10**9}, {"batches": [[32, 0]] * 100}])
def test_impossible_counts_end_early(model, data, changes):
    header, payload = coding.read_header(data)
    changed = replace(header, names=None, **changes)
    with pytest.raises(UserError, match="do not match their checksum"):
        restore(model, pack(changed, payload))


def test_a_huge_header_is_not_unpacked(data):
    packed = zlib.compress(b" " * (archive.MAX_HEADER_BYTES + 10))
    bomb = archive.MAGIC + len(packed).to_bytes(4, "little") + packed
    with pytest.raises(UserError, match="is damaged"):
        coding.read_header(bomb)


def test_too_many_images_for_the_memory(model, data):
    header, payload = coding.read_header(data)
    many = replace(header, names=None, batches=[[32, 0]] * 10**5)
    with pytest.raises(UserError, match="of memory"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowgen.utils.memory.free_memory", lambda: 2**26)
        restore(model, pack(many, payload))


# Verification and fallback


def test_a_batch_that_fails_is_stored_raw(model, monkeypatch):
    images = smooth_images(6)
    codec = FlowCodec(model)
    encode = codec.encode
    broken = iter([False, True, True, False])

    def encode_some(batch, coder):
        bits = encode(batch, coder)
        if next(broken, False):
            coder.push_bits(torch.zeros(1, dtype=torch.int64), 8)  # a trace on the stack
        return bits

    monkeypatch.setattr(codec, "encode", encode_some)
    monkeypatch.setattr(archive.Compressor, "next_batch_size", lambda self: 1)
    result = coding.compress(codec, images, "run")
    assert result.raw_images == 2
    assert torch.equal(restore(model, result.data), images)


def test_a_value_near_a_boundary_chooses_another_offset(model, monkeypatch):
    images = smooth_images(3)
    codec = FlowCodec(model)
    encode = codec.encode

    def encode_at_third_offset(batch, coder):
        bits = encode(batch, coder)
        if coder.offset < 0.8:
            raise NearBoundaryError
        return bits

    monkeypatch.setattr(codec, "encode", encode_at_third_offset)
    result = coding.compress(codec, images, "run")
    header, _ = coding.read_header(result.data)
    assert result.retries > 0 and result.raw_images == 0
    assert all(index > 0 for _, index in header.batches)
    assert torch.equal(restore(model, result.data), images)


def test_a_token_that_sees_itself_is_detected(monkeypatch):
    """A broken mask gives a better likelihood, but nothing can be decoded with it."""
    images = smooth_images()

    def forward(self, tokens, condition=None):
        embedded = self.embed(tokens)  # not shifted: each token sees itself
        return self.transform(self._embed_positions(len(tokens), condition) + embedded, True)

    def build():
        torch.manual_seed(0)
        model = build_model(
            "tarflow", num_layers=[1], transform="affine", local=False, permutation="none"
        )
        return briefly_trained(model, images, steps=60)

    honest = build()
    generator = torch.Generator().manual_seed(0)
    honest_log_prob = honest.score(images, generator=generator).mean()
    monkeypatch.setattr(CausalTransformer, "forward", forward)
    cheat = build()
    assert cheat.score(images, generator=generator.manual_seed(0)).mean() > honest_log_prob
    result = coding.compress(FlowCodec(cheat), images, "run")
    assert result.raw_images == len(images)
    assert torch.equal(restore(cheat, result.data), images)


# Other machines


ENCODE = """if True:
    import sys, torch, flowgen
    from pathlib import Path
    from flowgen import coding
    for run in sys.argv[1:]:
        codec = coding.make_codec(flowgen.load(run, device="cpu"), 20)
        images = torch.load("images.pt") >> (8 - codec.model.bits)
        data = coding.compress(codec, images, run, verify=False).data
        Path(run.replace("/", "_")).write_bytes(data)
"""
DECODE = """if True:
    import sys, torch, flowgen
    from pathlib import Path
    from flowgen import coding
    for run in sys.argv[1:]:
        header, payload = coding.read_header(Path(run.replace("/", "_")).read_bytes())
        codec = coding.make_codec(flowgen.load(run, device="cpu"), header.annealing_steps)
        images = torch.load("images.pt") >> (8 - codec.model.bits)
        assert torch.equal(coding.decompress(codec, header, payload), images)
"""
KERNELS = pytest.mark.parametrize(("encoder", "decoder"), [({}, GENERIC), (GENERIC, {})])


def check_kernels(
    images: torch.Tensor, encoder: dict[str, str], decoder: dict[str, str], *runs: str
) -> None:
    """Compress images of 8 bits in one process, and decompress them in another one."""
    torch.save(images, "images.pt")
    for script, environment in ((ENCODE, encoder), (DECODE, decoder)):
        subprocess.run(
            [sys.executable, "-c", script, *runs],
            check=True,
            env=os.environ
            | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
            | environment,
        )


@KERNELS
def test_files_move_between_kernels(elsewhere, encoder, decoder):
    """KERNEL_DIGITS sets the number of digits."""
    count = int(os.environ.get("KERNEL_DIGITS", "2"))
    digits = MNISTSample()
    images = torch.cat((digits.test.images, digits.validation.images))
    chosen = images[:: len(images) // count][:count]
    check_kernels(chosen, encoder, decoder, "zoo/glow_mnist", "zoo/rbm_mnist")


@pytest.mark.skipif("KERNEL_RUN" not in os.environ, reason="needs a run, KERNEL_RUN")
@KERNELS
def test_files_of_a_run_move_between_kernels(elsewhere, encoder, decoder):
    """KERNEL_RUN is a run, of whose test images KERNEL_IMAGES are compressed."""
    run = os.environ["KERNEL_RUN"]
    data = build_data(find_checkpoint(run)[1]["config"])
    count = int(os.environ.get("KERNEL_IMAGES", "2"))
    images = torch.cat(list(data.batches("test", 50, count)))
    check_kernels(images << (8 - data.bits), encoder, decoder, run)


# flowgen evaluate compress=true


def test_evaluate_compares_with_a_file(command, color_run):
    status, out, _ = command("evaluate", "--run", color_run, "compress=true", "--json")
    row = json.loads(out)
    assert status == 0 and row["decompressed"] == "equal"
    assert row["file_bits_per_dim"] == pytest.approx(8 * row["file_bytes"] / row["images"] / 192)
    assert row["net_bits_per_dim"] == pytest.approx(row["same_noise_bits_per_dim"], rel=0.01)
    gap = (row["net_bits_per_dim"] - row["bits_per_dim"]) / row["bits_per_dim_error"]
    assert row["net_gap"] == pytest.approx(gap)


def test_a_name_that_is_the_folder_of_another_image_is_changed(data):
    header, _ = coding.read_header(data)
    names = ["a.bmp", "a.png/b.png", "c", "d", "e", "f", "g", "h"]
    assert file_names(replace(header, names=names))[:2] == ["a_2.png", "a.png/b.png"]


def test_the_gap_of_one_image_is_unknown(model):
    images = smooth_images(1)
    evaluated = model.evaluate([images])["bits_per_dim"]
    row = coding.measure_compression(FlowCodec(model), images, evaluated).row()
    assert "net_bits_per_dim" in row and "net_gap" not in row


def test_evaluate_refuses_before_it_evaluates(command, two_runs, monkeypatch):
    monkeypatch.setattr("flowgen.models.flows.flow.Flow.evaluate", None)
    monkeypatch.setattr("flowgen.coding.flow_codec.has_rule", lambda part: False)
    status, _, error = command("evaluate", "--run", two_runs / "glow", "compress=true")
    assert status == 1 and "cannot compress images" in error


def test_newer_settings_of_the_evaluation_have_defaults(command, color_run):
    for path in color_run.glob("checkpoints/*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["config"]["evaluation"]["compress"]
        write_checkpoint(checkpoint, path)
    status, out, _ = command("evaluate", "--run", color_run, "compress=true", "--json")
    assert status == 0 and json.loads(out)["decompressed"] == "equal"

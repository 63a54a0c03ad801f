"""`flowgen explore`: responses of the endpoints, invalid requests, and many requests at once."""

import base64
import http.client
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import save_image, started
from PIL import Image
from test_cli import assert_error
from werkzeug.test import Client

from flowgen.data.preprocess import read_image
from flowgen.models.base import sample_images
from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import make_app, open_server
from flowgen.utils import rendering

HOST = "http://127.0.0.1:8700"
NUM_REQUESTS = int(os.environ.get("FLOWGEN_REQUESTS", "300"))


class Page:
    """Sends requests to the application as the page does in a browser."""

    def __init__(self, session: ModelSession):
        self.client = Client(make_app(session))

    def post(
        self,
        endpoint: str,
        payload: object,
        headers: dict[str, str] | None = None,
        **kwargs: object,
    ):
        return self.client.post(
            f"/api/{endpoint}",
            base_url=HOST,
            json=payload,
            headers={"Origin": HOST} | (headers or {}),
            **kwargs,
        )

    def __call__(self, endpoint: str, **payload: object) -> dict:
        response = self.post(endpoint, payload)
        assert response.status_code == 200, response.text
        return response.json

    def error(self, endpoint: str, **payload: object) -> str:
        """Return the message of a request that must fail."""
        response = self.post(endpoint, payload)
        assert response.status_code == 400, response.text
        return response.json["error"]


@pytest.fixture
def page(glow) -> Page:
    return Page(glow)


@pytest.fixture
def rbm_page(rbm) -> Page:
    return Page(rbm)


def decode(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def encode(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def save(url: str, path: Path) -> Path:
    path.write_bytes(decode(url))
    return path


def test_a_flow_of_noisy_images_offers_no_completion(images, command, elsewhere):
    noisy = ["model.dequantization=gaussian:0.05", "model.gaussianize=false"]
    size = ["model=tarflow", "model.num_layers=[1]", "model.width=8", "data=folder", "data.size=8"]
    train = ["train", *size, *noisy, f"data.root={images}", "trainer.steps=1"]
    assert command(*train, "trainer.init_images=16", "output_dir=outputs/noisy")[0] == 0
    session = ModelSession("noisy", "cpu")
    assert not session.capabilities["inpainting"]
    assert session.samplers == []


def two_samples(page: Page, **options: object) -> list[str]:
    return page("sample", count=2, temperature=0.7, seed=3, **options)["images"]


def mask(known: torch.Tensor) -> str:
    return encode(rendering.encode_png(known[None].to(torch.uint8), 1))


HALF = torch.ones(8, 8, dtype=torch.bool)
HALF[:, 4:] = False


def test_page_files_have_strict_headers_and_no_foreign_urls(page):
    for path, media_type in (
        ("/", "text/html"),
        ("/explore.js", "text/javascript"),
        ("/explore.css", "text/css"),
        ("/page.css", "text/css"),
    ):
        response = page.client.get(path, base_url=HOST)
        assert response.status_code == 200
        assert response.mimetype == media_type
        assert len(response.data) > 1000
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "http" not in response.text.replace("http-equiv", ""), "a URL of another site"


def test_about_describes_the_model(page, rbm_page):
    about = page("about")
    assert about["model"] == "Glow"
    assert about["shape"] == [3, 8, 8]
    assert about["num_classes"] == 2
    assert about["temperature"] == 0.7
    assert about["capabilities"] == {"classes": True, "chains": False, "inpainting": True}
    assert about["samplers"] == ["hmc"]
    capabilities = rbm_page("about")["capabilities"]
    assert capabilities == {"classes": False, "chains": True, "inpainting": True}


def run_command_line(command_line: str, command: object, folder: Path) -> Image.Image:
    """Return the picture that a command line of the page makes."""
    path = folder / "picture.png"
    status, _, error = command(*shlex.split(command_line)[1:], "--out", path)
    assert status == 0, error
    return Image.open(path).convert("RGB")


def to_images(urls: list[str]) -> torch.Tensor:
    pictures = [Image.open(io.BytesIO(decode(url))).convert("RGB") for url in urls]
    pixels = torch.stack([torch.tensor(list(picture.tobytes())) for picture in pictures])
    return pixels.view(-1, 8, 8, 3).permute(0, 3, 1, 2).to(torch.uint8)


@pytest.mark.parametrize("label", [None, 1])
def test_sample_command_line_draws_the_same_images(page, command, tmp_path, label):
    result = page("sample", count=5, temperature=0.6, seed=7, label=label)
    assert result["seed"] == 7
    assert len(result["images"]) == 5
    picture = run_command_line(result["command"], command, tmp_path)
    title = "temperature 0.6" if label is None else "class 1, temperature 0.6"
    expected = rendering.titled_grids([(title, to_images(result["images"]))], 8, columns=5)
    assert picture.tobytes() == expected.tobytes()


def test_image_urls_hold_exact_pixel_values(page, glow):
    images, scores = sample_images(glow.model, 2, 0.7, 3)
    expected = images[scores.argsort(descending=True)]
    for url, image in zip(two_samples(page), expected, strict=True):
        assert torch.equal(glow.read_image(decode(url))[0], image)
        assert torch.equal(glow.read_upload(decode(url))[0], image)


def test_interpolate_command_line_makes_the_same_images(page, command, tmp_path):
    first, second = two_samples(page)
    result = page("interpolate", first=first, second=second, steps=5, spherical=True)
    for images in (result["latent"], result["pixels"]):
        assert [images[0], images[-1]] == [first, second]
    save(first, Path("a.png"))
    save(second, Path("b.png"))
    assert "--spherical" in result["command"]
    picture = run_command_line(result["command"], command, tmp_path)
    rows = [
        ("along a great circle of latents", to_images(result["latent"])),
        ("through the pixels", to_images(result["pixels"])),
    ]
    assert picture.tobytes() == rendering.titled_grids(rows, 8, columns=5).tobytes()


def test_edit_command_line_makes_the_same_image(page, command, tmp_path):
    assert page("attributes") == {"attributes": ["0", "1"]}
    image = two_samples(page)[0]
    result = page("edit", image=image, amounts={"1": 1, "0": -0.5})
    save(image, Path("a.png"))
    picture = run_command_line(result["command"], command, tmp_path)
    title = "the image, and 1 by 1, 0 by -0.5"
    expected = rendering.titled_grids([(title, to_images([image, result["image"]]))], 8, columns=2)
    assert picture.tobytes() == expected.tobytes()


def test_edit_finds_directions_for_a_model_without_classes(rbm_page):
    assert rbm_page("attributes")["attributes"] == ["0", "1"]
    image = two_samples(rbm_page, sampler="gibbs", steps=5)[0]
    assert rbm_page("edit", image=image, amounts={"1": 1})["image"].startswith("data:image/png")


def test_scores_equal_the_command_and_get_percentiles_later(two_runs, command):
    session = ModelSession(str(two_runs / "glow"), "cpu")
    page = Page(session)
    image = two_samples(page)[0]
    before = page("score", image=image)
    assert before["percentile"] is None
    assert before["p_value"] is None
    assert not page("status")["percentiles"]
    session.score_validation_images()
    after = page("score", image=image)
    assert after["value"] == before["value"]
    assert page("status")["percentiles"]
    save(image, Path("a.png"))
    status, output, error = command(*shlex.split(after["command"])[1:])
    assert status == 0, error
    sign, value, percentile, p_value, _ = output.splitlines()[1].split()
    assert sign == "<="
    assert value == f"{after['value']:.3f}"
    assert percentile == f"{after['percentile']:.1f}"
    assert p_value == f"{after['p_value']:.4f}"


def test_status_tells_why_there_are_no_percentiles(two_runs, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    session = ModelSession(str(two_runs / "glow"), "cpu")
    monkeypatch.setattr("flowgen.commands.score.make_scorer", fail)
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    session.score_validation_images()
    assert "out of luck" in Page(session)("status")["scorer_error"]
    assert "percentiles are unavailable: RuntimeError: out of luck" in caplog.text


def test_missing_validation_images_are_reported_in_one_sentence(
    two_runs, tmp_path, monkeypatch, caplog
):
    run = shutil.copytree(two_runs / "glow", tmp_path / "run")
    session = ModelSession(str(run), "cpu")
    session.checkpoint["config"]["data"]["root"] = str(tmp_path / "nowhere")
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    session.score_validation_images()
    error = Page(session)("status")["scorer_error"]
    assert error == (
        "the validation images are missing or damaged: "
        f"`flowgen evaluate --run {run}` tells what to do"
    )
    assert set(caplog.messages) == {f"percentiles are unavailable: {error}"}


def test_complete_command_line_makes_the_same_images(page, command, tmp_path):
    image = two_samples(page)[0]
    options = {"sampler": "hmc", "steps": 20, "seed": 5}
    result = page("complete", image=image, mask=mask(HALF), **options)
    original, *draws = (url_half(url) for url in (image, *result["draws"]))
    assert len(draws) == 20
    assert all((draw >> 3 == original >> 3).all() for draw in draws)
    save(image, Path("a.png"))
    save(mask(HALF), Path("mask.png"))
    picture = run_command_line(result["command"], command, tmp_path)
    urls = [result["mean"], result["spread"], *result["draws"][:5]]
    expected = rendering.image_grid(to_images(urls), 8, columns=7)
    # The command also shows the image and its known pixels, left of these seven images.
    box = (expected.width - 406, 4, expected.width - 2, 56)
    same_box = (picture.width - 406, picture.height - 56, picture.width - 2, picture.height - 4)
    assert picture.crop(same_box).tobytes() == expected.crop(box).tobytes()


def url_half(url: str) -> torch.Tensor:
    """Return the known pixels of an image under the mask `HALF`."""
    return to_images([url])[0][:, :, :4].int()


def test_chains_are_reproducible_and_the_oldest_are_dropped(rbm_page, command, tmp_path):
    options = {"sampler": "gibbs", "seed": 2, "count": 4}
    ids = [rbm_page("start_chains", **options)["chain_id"] for _ in range(2)]
    first, second = (
        [
            rbm_page("advance_chains", **options, chain_id=chain_id, frames=frames, steps=1)
            for frames in range(3)
        ]
        for chain_id in ids
    )
    assert first == second
    assert first[0]["images"] != first[1]["images"]
    path = tmp_path / "a.gif"
    assert command(*shlex.split(first[2]["command"])[1:], "--out", path)[0] == 0
    assert Image.open(path).n_frames == 3
    for _ in range(4):
        rbm_page("start_chains", **options)
    error = rbm_page.error("advance_chains", **options, chain_id=ids[0], frames=3, steps=1)
    assert "have ended" in error


def test_rbm_samples_scores_interpolates_completes_and_shows_filters(rbm_page):
    first, second = two_samples(rbm_page, sampler="gibbs", steps=5)
    assert rbm_page("score", image=first)["value"] is not None
    result = rbm_page("interpolate", first=first, second=second, steps=3, spherical=False)
    assert len(result["latent"]) == 3
    options = {"sampler": "mean-field", "steps": 5, "seed": 0}
    result = rbm_page("complete", image=first, mask=mask(HALF), **options)
    assert len(result["draws"]) == 64
    assert Image.open(io.BytesIO(decode(rbm_page("filters")["image"]))).width > 100


def test_uploads_are_preprocessed_like_the_training_images(page, glow, tmp_path):
    path = save_image(tmp_path / "big.png", (40, 30))
    url = page("upload", image=encode(path.read_bytes()))["image"]
    assert torch.equal(glow.read_image(decode(url)), read_image(path, 8, 3, None, 5))


def test_requests_of_other_sites_are_refused(page):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8700", ""):
        for method, path in (("GET", "/"), ("POST", "/api/about")):
            headers = {"Host": host, "Origin": f"http://{host}"}
            response = page.client.open(path, method=method, headers=headers)
            assert response.status_code == 400
    for origin in (
        "http://evil.example",
        "null",
        "https://127.0.0.1:8700",
        "http://127.0.0.1:8701",
        "http://localhost:8700",
        "",
    ):
        assert page.post("about", {}, {"Origin": origin}).status_code == 403
    assert page.client.post("/api/about", base_url=HOST, json={}).status_code == 403
    localhost = "http://localhost:99"
    response = page.client.post(
        "/api/about", base_url=localhost, json={}, headers={"Origin": localhost}
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/static/explore.html", 404),
        ("POST", "/api/", 404),
        ("POST", "/about", 404),
        ("POST", "/api/nothing", 404),
        ("POST", "/api/__class__", 404),
        ("POST", "/x/api/about", 404),
        ("GET", "/api/about", 405),
        ("POST", "/", 405),
        ("DELETE", "/explore.js", 405),
    ],
)
def test_unknown_paths_and_methods_are_refused(page, method, path, status):
    response = page.client.open(path, method=method, base_url=HOST, headers={"Origin": HOST})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("body", "media_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (b'{"count": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b" " * (8 * 2**20 + 1), "application/json", 413),
    ],
)
def test_bodies_that_are_not_json_objects_are_refused(page, body, media_type, status):
    response = page.client.post(
        "/api/sample",
        base_url=HOST,
        data=body,
        content_type=media_type,
        headers={"Origin": HOST},
    )
    assert response.status_code == status
    assert response.json["error"]


VALID = {"count": 1, "temperature": 0.7, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"count": 65}, "count must be a whole number"),
        ({"count": 0}, "count must be"),
        ({"count": True}, "count must be"),
        ({"count": "4"}, "count must be"),
        ({"count": None}, "count must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**53}, "seed must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 10**400}, "temperature is too large"),
        ({"label": 2}, "from 0 to 1"),
        ({"label": "../../etc/passwd"}, "label must be"),
        ({"sampler": "gibbs"}, "sampler must be hmc"),
        ({"sampler": "hmc"}, "does not use Markov chains"),
        ({"steps": 5}, "does not use Markov chains"),
    ],
)
def test_invalid_sample_requests_get_one_line(page, changes, expected):
    error = page.error("sample", **VALID | changes)
    assert expected in error
    assert "\n" not in error


def test_invalid_requests_get_one_line(page, rbm_page):
    first, second = two_samples(page)
    everything = mask(torch.ones(8, 8))
    nothing = mask(torch.zeros(8, 8))
    inpainting = {"image": first, "sampler": "hmc", "steps": 5, "seed": 0}
    wrong_size = encode(rendering.encode_png(torch.zeros(3, 7, 8, dtype=torch.uint8), 5))
    assert "as a data URL" in page.error("score")
    assert "as a data URL" in page.error("score", image=5)
    assert "as a data URL" in page.error("score", image="data:image/png;base64,%%%")
    assert "as a data URL" in page.error("score", image="../../etc/passwd")
    assert "open it again" in page.error("score", image=encode(b"/etc/passwd"))
    assert "the size" in page.error("score", image=wrong_size)
    pair = {"first": first, "second": second}
    assert "steps must be" in page.error("interpolate", **pair, steps=1, spherical=True)
    assert "spherical must be" in page.error("interpolate", **pair, steps=3, spherical="yes")
    assert "amounts must be" in page.error("edit", image=first)
    assert "choose one of 0, 1" in page.error("edit", image=first, amounts={"Smiling": 1})
    assert "amount must be a number" in page.error("edit", image=first, amounts={"1": "much"})
    assert "every pixel as known" in page.error("complete", **inpainting, mask=everything)
    assert "no pixel as known" in page.error("complete", **inpainting, mask=nothing)
    wrong_sampler = inpainting | {"sampler": ["gibbs"]}
    assert "sampler must be" in page.error("complete", **wrong_sampler, mask=mask(HALF))
    error = page.error("start_chains", sampler="hmc", seed=0, count=1)
    assert "does not use Markov chains" in error
    assert "no filters" in page.error("filters")
    assert "not class-conditional" in rbm_page.error("sample", **VALID, label=0)


def hostile_files() -> list[bytes]:
    """Return damaged files of every image format, and files that are not images."""
    rng = random.Random(0)
    files = [
        b"",
        b"words",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a",
        b"II*\0" + b"\xff" * 50,
    ]
    picture = Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    for image_format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        file = io.BytesIO()
        picture.save(file, image_format)
        content = file.getvalue()
        files += [content[:length] for length in (10, len(content) // 2, len(content) - 5)]
        for _ in range(8):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            files.append(bytes(damaged))
    return files


def test_hostile_images_get_one_line_and_write_no_file(page, elsewhere):
    before = sorted(Path().rglob("*"))
    for index, file in enumerate(hostile_files()):
        response = page.post("score" if index % 5 == 0 else "upload", {"image": encode(file)})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json["error"]
            assert "\n" not in error
            assert "bug" not in error
    for side, expected in ((8000, "million pixels"), (30_000, "is not an image")):
        bomb = rendering.to_png(Image.new("1", (side, side)))
        assert len(bomb) < 200_000
        assert expected in page.error("upload", image=encode(bomb))
    assert sorted(Path().rglob("*")) == before


def test_page_works_after_an_internal_error(page, glow, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(glow.model, "sample", fail)
        response = page.post("sample", VALID)
        assert response.status_code == 500
        assert "out of luck" in response.json["error"]
    assert len(two_samples(page)) == 2


def test_running_request_can_be_canceled(page, glow):
    payload = {
        "image": two_samples(page)[0],
        "mask": mask(HALF),
        "sampler": "hmc",
        "steps": 2000,
        "seed": 0,
        "request_id": "mine",
    }
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(page.post, "complete", payload)
        deadline = time.monotonic() + 60
        while not re.search(r"annealing.*: \d+ of \d+", page("status")["status"]):
            assert time.monotonic() < deadline
        page("cancel", request_id="mine")
        response = future.result(20)
    assert response.status_code == 400
    assert response.json["error"] == "the request was stopped"
    assert len(two_samples(page)) == 2
    assert page("status")["status"] == ""


def test_cancel_stops_only_the_named_request_while_it_waits(page, glow):
    lock = glow.lock
    payload = {
        "image": two_samples(page)[0],
        "mask": mask(HALF),
        "sampler": "hmc",
        "steps": 5,
        "seed": 0,
    }
    with ThreadPoolExecutor(2) as pool, lock.acquire("scoring"):
        futures = [
            pool.submit(page.post, "complete", payload | {"request_id": request_id})
            for request_id in ("mine", "other")
        ]
        time.sleep(0.2)  # both requests wait now; a request that comes later is stopped too
        page("cancel", request_id="mine")
        page("cancel")
        steps = list(lock.cancellable(range(3), "validation images"))
        assert steps == [0, 1, 2], "the request that holds the lock continues"
    mine, other = (future.result(20) for future in futures)
    assert mine.status_code == 400
    assert mine.json["error"] == "the request was stopped"
    assert other.status_code == 200
    assert not lock._canceled & {"mine", "other"}


def test_many_requests_at_once_get_their_own_responses(glow):
    """Set FLOWGEN_REQUESTS=2000 to send more requests."""
    expected = {}
    for seed in range(50):
        image = sample_images(glow.model, 1, 0.7, seed)[0][0]
        expected[seed] = encode(rendering.encode_png(image, 5))
    assert len(set(expected.values())) > 45
    with open_server(glow, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = threading.local()
        headers = {
            "Content-Type": "application/json",
            "Origin": f"http://127.0.0.1:{server.port}",
        }

        def is_right(index: int) -> bool:
            if not hasattr(local, "connection"):
                local.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            seed = index % 50
            body = json.dumps({"count": 1, "temperature": 0.7, "seed": seed})
            local.connection.request("POST", "/api/sample", body, headers)
            response = local.connection.getresponse()
            result = json.loads(response.read())
            return (
                response.status == 200
                and result["seed"] == seed
                and result["images"] == [expected[seed]]
            )

        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(is_right, range(NUM_REQUESTS)))
        server.shutdown()
    assert len(results) == NUM_REQUESTS
    assert all(results)


def test_explore_serves_until_it_is_interrupted(two_runs):
    with started("explore", two_runs / "glow", "--port", "0") as process:
        words = process.stdout.readline().split()
        address = next(word for word in words if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(address, timeout=20) as response:
            assert b"flowgen" in response.read()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 0
    assert not error


def test_invalid_arguments_of_explore_get_one_line(two_runs, command):
    run = two_runs / "glow"
    assert_error(command("explore", "nowhere"), "flowgen runs")
    assert_error(command("explore"), "flowgen train")
    assert_error(command("explore", run, "--port", "70000"), "--port", 2)
    assert_error(command("explore", run, "--port", "web"), "--port", 2)
    assert_error(command("explore", run, "more"), "more", 2)
    assert_error(command("explore", run, "--device", "tpu"), "choose auto")
    with open_server(ModelSession(str(two_runs / "rbm"), "cpu"), 0) as server:
        assert_error(
            command("explore", run, "--port", server.port),
            "--port 0 for any free port",
        )


def test_explore_refuses_a_model_of_two_dimensional_points(command):
    overrides = [
        "model=glow",
        "model.steps_per_level=1",
        "model.width=4",
        "data=toy",
        "trainer.steps=1",
        "trainer.minutes=null",
        "trainer.init_images=16",
        "trainer.eval_images=8",
        "output_dir=outputs/toy",
    ]
    status, _, error = command("train", *overrides)
    assert status == 0, error
    assert_error(command("explore", "outputs/toy"), "2 channels")

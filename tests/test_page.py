"""`flowgen explore`: what the page's questions get, what wrong requests get, and many of them at once."""

import base64
import http.client
import io
import json
import logging
import os
import random
import shlex
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
from test_cli import assert_plain
from werkzeug.test import Client

from flowgen.commands.sample import sample_images
from flowgen.data.preprocess import read_images
from flowgen.serving.session import ModelSession
from flowgen.serving.web.app import ExplorerApp, open_server
from flowgen.utils import rendering

HOST = "http://127.0.0.1:8700"
MANY = int(os.environ.get("FLOWGEN_REQUESTS", "300"))


class Asker:
    """Asks a page as a browser would."""

    def __init__(self, answers: ModelSession):
        self.client = Client(ExplorerApp(answers))

    def post(
        self, name: str, payload: object, headers: dict[str, str] | None = None, **more: object
    ):
        return self.client.post(
            f"/ask/{name}",
            base_url=HOST,
            json=payload,
            headers={"Origin": HOST} | (headers or {}),
            **more,
        )

    def __call__(self, name: str, **payload: object) -> dict:
        response = self.post(name, payload)
        assert response.status_code == 200, response.text
        return response.json

    def refuses(self, name: str, **payload: object) -> str:
        response = self.post(name, payload)
        assert response.status_code == 400, response.text
        return response.json["error"]


@pytest.fixture
def ask(glow) -> Asker:
    return Asker(glow)


@pytest.fixture
def ask_rbm(rbm) -> Asker:
    return Asker(rbm)


def bytes_of(picture: str) -> bytes:
    return base64.b64decode(picture.removeprefix("data:image/png;base64,"))


def url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def save(picture: str, path: Path) -> Path:
    path.write_bytes(bytes_of(picture))
    return path


def two_samples(ask: Asker, **more: object) -> list[str]:
    return ask("sample", count=2, temperature=0.7, seed=3, **more)["pictures"]


def mask(known: torch.Tensor) -> str:
    return url(rendering.png(known[None].to(torch.uint8), 1))


HALF = torch.ones(8, 8, dtype=torch.bool)
HALF[:, 4:] = False


def test_the_page_and_its_files_come_whole_and_shut_in(ask):
    for path, kind in (
        ("/", "text/html"),
        ("/explore.js", "text/javascript"),
        ("/explore.css", "text/css"),
    ):
        response = ask.client.get(path, base_url=HOST)
        assert (
            response.status_code == 200 and response.mimetype == kind and len(response.data) > 1000
        )
        policy = response.headers["Content-Security-Policy"]
        assert (
            "default-src 'none'" in policy
            and "unsafe" not in policy
            and response.headers["X-Content-Type-Options"] == "nosniff"
        )
        assert "http" not in response.text.replace("http-equiv", ""), "nothing from elsewhere"


def test_about_says_what_the_model_can_do(ask, ask_rbm):
    about = ask("about")
    assert (
        about["model"] == "Glow"
        and about["shape"] == [3, 8, 8]
        and about["classes"] == 2
        and about["temperature"] == 0.7
    )
    assert about["able_to"] == {"num_classes": True, "chains": False, "complete": True} and about[
        "methods"
    ] == ["langevin"]
    assert ask_rbm("about")["able_to"] == {"num_classes": False, "chains": True, "complete": True}


def command_makes(command: str, run: object, folder: Path) -> Image.Image:
    """The picture of a command line that the page shows."""
    status, _, error = run(*shlex.split(command)[1:], "--out", folder / "made.png")
    assert status == 0, error
    return Image.open(folder / "made.png").convert("RGB")


def grid(shown: list[str]) -> torch.Tensor:
    images = torch.stack(
        [
            torch.tensor(list(Image.open(io.BytesIO(bytes_of(each))).convert("RGB").tobytes()))
            for each in shown
        ]
    )
    return images.view(-1, 8, 8, 3).permute(0, 3, 1, 2).to(torch.uint8)


@pytest.mark.parametrize("label", [None, 1])
def test_the_command_draws_the_same_samples(ask, command, tmp_path, label):
    answer = ask("sample", count=5, temperature=0.6, seed=7, label=label)
    assert answer["seed"] == 7 and len(answer["pictures"]) == 5
    made = command_makes(answer["command"], command, tmp_path)
    title = "temperature 0.6" if label is None else "class 1, temperature 0.6"
    expected = rendering.blocks([(title, grid(answer["pictures"]))], 8, columns=5)
    assert made.tobytes() == expected.tobytes()


def test_a_picture_holds_its_levels_exactly(ask, glow):
    images, scores = sample_images(glow.model, 2, 0.7, 3)
    for picture, wanted in zip(
        two_samples(ask), images[scores.argsort(descending=True)], strict=True
    ):
        assert torch.equal(glow.exactly(bytes_of(picture))[0], wanted) and torch.equal(
            glow.read(bytes_of(picture))[0], wanted
        )


def test_the_command_walks_the_same_way(ask, command, tmp_path):
    first, second = two_samples(ask)
    answer = ask("walk", first=first, second=second, steps=5, spherical=True)
    assert (
        [answer["latent"][0], answer["latent"][-1]]
        == [first, second]
        == [answer["pixels"][0], answer["pixels"][-1]]
    )
    for name, picture in (("a.png", first), ("b.png", second)):
        save(picture, Path(name))
    assert "--spherical" in answer["command"]
    made = command_makes(answer["command"], command, tmp_path)
    rows = [
        ("great circle in the latents", grid(answer["latent"])),
        ("line in the pixels", grid(answer["pixels"])),
    ]
    assert made.tobytes() == rendering.blocks(rows, 8, columns=5).tobytes()


def test_the_command_edits_alike(ask, command, tmp_path):
    assert ask("attributes") == {"attributes": ["0", "1"]}
    picture = two_samples(ask)[0]
    answer = ask("edit", image=picture, amounts={"1": 1, "0": -0.5})
    save(picture, Path("a.png"))
    made = command_makes(answer["command"], command, tmp_path)
    title = "the image, and 1 by 1, 0 by -0.5"
    assert (
        made.tobytes()
        == rendering.blocks([(title, grid([picture, answer["picture"]]))], 8, columns=2).tobytes()
    )


def test_directions_are_found_where_the_model_knows_no_classes(ask_rbm):
    assert ask_rbm("attributes")["attributes"] == ["0", "1"]
    picture = two_samples(ask_rbm, method="gibbs", sweeps=5)[0]
    assert ask_rbm("edit", image=picture, amounts={"1": 1})["picture"].startswith("data:image/png")


def test_scores_are_those_of_the_command_with_percentiles_once_there_are_any(two_runs, command):
    answers = ModelSession(str(two_runs / "glow"), "cpu")
    ask = Asker(answers)
    picture = two_samples(ask)[0]
    before = ask("score", image=picture)
    assert before["percentile"] is None and before["p"] is None and not ask("doing")["percentiles"]
    answers.score_validation_images()
    found = ask("score", image=picture)
    assert found["value"] == before["value"] and ask("doing")["percentiles"]
    save(picture, Path("a.png"))
    status, output, error = command(*shlex.split(found["command"])[1:])
    assert status == 0, error
    value, percentile, p, _ = output.splitlines()[1].split()
    assert (value, percentile, p) == (
        f"{found['value']:.3f}",
        f"{found['percentile']:.1f}",
        f"{found['p']:.4f}",
    )


def test_percentiles_that_cannot_be_had_have_a_reason(two_runs, monkeypatch, caplog):
    def fault(*arguments, **options):
        raise RuntimeError("out of luck")

    answers = ModelSession(str(two_runs / "glow"), "cpu")
    monkeypatch.setattr("flowgen.serving.session.make_scorer", fault)
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    answers.score_validation_images()
    assert (
        "out of luck" in Asker(answers)("doing")["no_percentiles"]
        and "no percentiles: RuntimeError: out of luck" in caplog.text
    )


def test_the_command_completes_alike(ask, command, tmp_path):
    picture = two_samples(ask)[0]
    answer = ask("complete", image=picture, mask=mask(HALF), method="langevin", sweeps=20, seed=5)
    kept, *draws = (grid([each])[0][:, :, :4].int() for each in (picture, *answer["draws"]))
    assert len(draws) == 20 and all((draw >> 3 == kept >> 3).all() for draw in draws)
    save(picture, Path("a.png"))
    save(mask(HALF), Path("mask.png"))
    made = command_makes(answer["command"], command, tmp_path)
    shown = rendering.to_image(
        grid([answer["mean"], answer["spread"], *answer["draws"][:5]]), 8, columns=7
    )
    box = (shown.width - 406, 4, shown.width - 2, 56)
    place = (made.width - 406, made.height - 56, made.width - 2, made.height - 4)
    assert made.crop(place).tobytes() == shown.crop(box).tobytes()


def test_chains_run_on_and_the_oldest_end(ask_rbm, command, tmp_path):
    how = {"method": "gibbs", "seed": 2, "count": 4}
    names = [ask_rbm("start_chains", **how)["chains"] for _ in range(2)]
    frames = [
        [ask_rbm("advance", **how, chains=name, frames=frame, gibbs_steps=1) for frame in range(3)]
        for name in names
    ]
    assert frames[0] == frames[1] and frames[0][0]["pictures"] != frames[0][1]["pictures"]
    assert command(*shlex.split(frames[0][2]["command"])[1:], "--out", tmp_path / "a.gif")[0] == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    for _ in range(4):
        ask_rbm("start_chains", **how)
    assert "have ended" in ask_rbm.refuses("advance", **how, chains=names[0], frames=3, sweeps=1)


def test_an_rbm_samples_completes_scores_and_shows_its_filters(ask_rbm):
    first, second = two_samples(ask_rbm, method="gibbs", sweeps=5)
    assert ask_rbm("score", image=first)["value"] is not None
    assert len(ask_rbm("walk", first=first, second=second, steps=3, spherical=False)["latent"]) == 3
    answer = ask_rbm(
        "complete", image=first, mask=mask(HALF), method="mean-field", gibbs_steps=5, seed=0
    )
    assert len(answer["draws"]) == 64
    assert Image.open(io.BytesIO(bytes_of(ask_rbm("filters")["picture"]))).width > 100


def test_an_image_from_outside_is_prepared_like_the_data(ask, glow, tmp_path):
    path = save_image(tmp_path / "big.png", (40, 30))
    picture = ask("read", image=url(path.read_bytes()))["picture"]
    assert torch.equal(glow.exactly(bytes_of(picture)), read_images(path, 8, 3, None, 5))


def test_only_the_page_itself_may_ask(ask):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8700", ""):
        for path in ("/", "/ask/about"):
            response = ask.client.open(
                path,
                method="POST" if "ask" in path else "GET",
                headers={"Host": host, "Origin": f"http://{host}"},
            )
            assert response.status_code == 400
    for origin in (
        "http://evil.example",
        "null",
        "https://127.0.0.1:8700",
        "http://127.0.0.1:8701",
        "http://localhost:8700",
        "",
    ):
        assert ask.post("about", {}, {"Origin": origin}).status_code == 403
    assert ask.client.post("/ask/about", base_url=HOST, json={}).status_code == 403
    localhost = ask.client.post(
        "/ask/about",
        base_url="http://localhost:99",
        json={},
        headers={"Origin": "http://localhost:99"},
    )
    assert localhost.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/static/explore.html", 404),
        ("POST", "/ask/", 404),
        ("POST", "/ask/nothing", 404),
        ("POST", "/ask/__class__", 404),
        ("POST", "/x/ask/about", 404),
        ("GET", "/ask/about", 405),
        ("POST", "/", 405),
        ("DELETE", "/explore.js", 405),
    ],
)
def test_what_is_not_there_is_not_there(ask, method, path, status):
    assert (
        ask.client.open(path, method=method, base_url=HOST, headers={"Origin": HOST}).status_code
        == status
    )


@pytest.mark.parametrize(
    ("body", "kind", "status"),
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
def test_a_body_that_is_no_question_is_refused(ask, body, kind, status):
    response = ask.client.post(
        "/ask/sample", base_url=HOST, data=body, content_type=kind, headers={"Origin": HOST}
    )
    assert response.status_code == status and response.json["error"]


GOOD = {"count": 1, "temperature": 0.7, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "answer"),
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
        ({"temperature": 10**400}, "temperature is larger"),
        ({"label": 2}, "from 0 to 1"),
        ({"label": "../../etc/passwd"}, "label must be"),
        ({"method": "gibbs"}, "method must be langevin"),
        ({"method": "langevin"}, "no Markov chains"),
        ({"sweeps": 5}, "no Markov chains"),
    ],
)
def test_samples_that_cannot_be_had_get_one_sentence(ask, changes, answer):
    sentence = ask.refuses("sample", **GOOD | changes)
    assert answer in sentence and "\n" not in sentence


def test_questions_about_no_pictures_get_one_sentence(ask, ask_rbm):
    picture, other = two_samples(ask)
    whole, none = mask(torch.ones(8, 8)), mask(torch.zeros(8, 8))
    completion = {"image": picture, "method": "langevin", "sweeps": 5, "seed": 0}
    small = url(rendering.png(torch.zeros(3, 7, 8, dtype=torch.uint8), 5))
    assert "as a data URL" in ask.refuses("score")
    assert "as a data URL" in ask.refuses("score", image=5)
    assert "as a data URL" in ask.refuses("score", image="data:image/png;base64,%%%")
    assert "as a data URL" in ask.refuses("score", image="../../etc/passwd")
    assert "open it again" in ask.refuses("score", image=url(b"/etc/passwd"))
    assert "another size" in ask.refuses("score", image=small)
    assert "steps must be" in ask.refuses(
        "walk", first=picture, second=other, steps=1, spherical=True
    )
    assert "spherical must be" in ask.refuses(
        "walk", first=picture, second=other, steps=3, spherical="yes"
    )
    assert "name attributes" in ask.refuses("edit", image=picture)
    assert "choose one of 0, 1" in ask.refuses("edit", image=picture, amounts={"Smiling": 1})
    assert "amount must be a number" in ask.refuses("edit", image=picture, amounts={"1": "much"})
    assert "every pixel as known" in ask.refuses("complete", **completion, mask=whole)
    assert "no pixel as known" in ask.refuses("complete", **completion, mask=none)
    assert "method must be" in ask.refuses(
        "complete", **completion | {"method": ["gibbs"]}, mask=mask(HALF)
    )
    assert "no Markov chains" in ask.refuses("start_chains", method="langevin", seed=0, count=1)
    assert "no filters" in ask.refuses("filters")
    assert "no classes" in ask_rbm.refuses("sample", **GOOD, label=0)


def hostile() -> list[bytes]:
    """Files of every format with a few bytes changed or their ends cut off, and what is no image."""
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
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        file = io.BytesIO()
        picture.save(file, kind)
        whole = file.getvalue()
        files += [whole[:length] for length in (10, len(whole) // 2, len(whole) - 5)]
        for _ in range(8):
            spoilt = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            files.append(bytes(spoilt))
    return files


def test_a_hostile_image_does_nothing(ask, elsewhere):
    before = sorted(Path().rglob("*"))
    for number, file in enumerate(hostile()):
        response = ask.post("score" if number % 5 == 0 else "read", {"image": url(file)})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert "\n" not in response.json["error"] and "fault" not in response.json["error"]
    for side, answer in ((8000, "million pixels"), (30_000, "is not an image")):
        bomb = rendering.file_of(Image.new("1", (side, side)))
        assert len(bomb) < 200_000 and answer in ask.refuses("read", image=url(bomb))
    assert sorted(Path().rglob("*")) == before


def test_a_fault_of_ours_is_told_and_the_page_goes_on(ask, glow, monkeypatch):
    def fault(*arguments, **options):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(glow.model, "sample", fault)
        response = ask.post("sample", GOOD)
        assert response.status_code == 500 and "out of luck" in response.json["error"]
    assert len(two_samples(ask)) == 2


def test_work_can_be_stopped(ask, glow):
    picture = two_samples(ask)[0]
    with ThreadPoolExecutor(1) as pool:
        payload = {
            "image": picture,
            "mask": mask(HALF),
            "method": "langevin",
            "sweeps": 2000,
            "seed": 0,
            "question": "mine",
        }
        long = pool.submit(ask.post, "complete", payload)
        while "annealing" not in ask("doing")["doing"]:
            pass
        ask("stop", question="mine")
        response = long.result(20)
    assert response.status_code == 400 and response.json["error"] == "stopped"
    assert len(two_samples(ask)) == 2 and ask("doing")["doing"] == ""


def test_stop_ends_the_question_that_it_names_before_its_turn_and_no_other(ask, glow):
    picture, turns = two_samples(ask)[0], glow.turns
    payload = {"image": picture, "mask": mask(HALF), "method": "langevin", "sweeps": 5, "seed": 0}
    with ThreadPoolExecutor(2) as pool, turns.take("judging"):
        waiting = [
            pool.submit(ask.post, "complete", payload | {"question": name})
            for name in ("mine", "another")
        ]
        while not {"mine", "another"} <= turns._asked.keys():
            time.sleep(0.01)
        ask("stop", question="mine")
        ask("stop")
        assert list(turns.watched(range(3), "validation images")) == [0, 1, 2], (
            "who has the turn goes on"
        )
    mine, another = (each.result(20) for each in waiting)
    assert (
        mine.status_code == 400 and mine.json["error"] == "stopped" and another.status_code == 200
    )
    assert not turns._asked


def test_many_requests_at_once_are_neither_lost_nor_mixed_up(glow):
    """`FLOWGEN_REQUESTS=2000` asks as many."""
    expected = {}
    for seed in range(50):
        expected[seed] = url(rendering.png(sample_images(glow.model, 1, 0.7, seed)[0][0], 5))
    assert len(set(expected.values())) > 45
    with open_server(glow, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = threading.local()

        def one(number: int) -> bool:
            if not hasattr(local, "connection"):
                local.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            headers = {
                "Content-Type": "application/json",
                "Origin": f"http://127.0.0.1:{server.port}",
            }
            seed = number % 50
            local.connection.request(
                "POST",
                "/ask/sample",
                json.dumps({"count": 1, "temperature": 0.7, "seed": seed}),
                headers,
            )
            response = local.connection.getresponse()
            answer = json.loads(response.read())
            return (
                response.status == 200
                and answer["seed"] == seed
                and answer["pictures"] == [expected[seed]]
            )

        with ThreadPoolExecutor(20) as pool:
            right = list(pool.map(one, range(MANY)))
        server.shutdown()
    assert len(right) == MANY and all(right)


def test_explore_serves_until_it_is_interrupted(two_runs):
    with started("explore", two_runs / "glow", "--port", "0") as process:
        address = next(
            word
            for word in process.stdout.readline().split()
            if word.startswith("http://127.0.0.1:")
        )
        with urllib.request.urlopen(address, timeout=20) as response:
            assert b"flowgen" in response.read()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 0 and not error


def test_wrong_words_of_explore_get_one_line(two_runs, command):
    assert_plain(command("explore", "nowhere"), "flowgen runs")
    assert_plain(command("explore"), "flowgen train")
    assert_plain(command("explore", two_runs / "glow", "--port", "70000"), "--port", 2)
    assert_plain(command("explore", two_runs / "glow", "--port", "web"), "--port", 2)
    assert_plain(command("explore", two_runs / "glow", "more"), "more", 2)
    assert_plain(command("explore", two_runs / "glow", "--device", "tpu"), "choose auto")
    with open_server(ModelSession(str(two_runs / "rbm"), "cpu"), 0) as server:
        assert_plain(
            command("explore", two_runs / "glow", "--port", server.port),
            "--port 0 for any that is free",
        )


def test_a_flow_of_the_plane_has_no_pictures_to_play_with(command):
    words = [
        "model=glow",
        "model.steps_per_level=1",
        "model.width=4",
        "data=toy",
        "trainer.steps=1",
        "trainer.minutes=null",
    ]
    words += ["trainer.init_images=16", "trainer.eval_images=8", "output_dir=outputs/toy"]
    status, _, error = command("train", *words)
    assert status == 0, error
    assert_plain(command("explore", "outputs/toy"), "of 2 channels")

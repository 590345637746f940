"""Forks a server again and again, sends it verdicts and captions, and kills it in the middle; prints what was confirmed."""

import contextlib
import http.client
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from job_fakes import fake_models
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.answers import Answers
from sgid_transforms.review.app import Server
from sgid_transforms.review.gallery import Gallery
from sgid_transforms.review.making import Maker
from sgid_transforms.review.study import Study
from sgid_transforms.variants.store import VariantStore


def serve(folder: Path, out: int) -> None:
    captions, recipe = CaptionStore(folder / "captions.sqlite"), Recipe(caption_from="own")
    gallery = Gallery(captions, VariantStore(folder / "variants"), recipe, folder / "data")
    study = Study([gallery], ["mine"], Answers(folder / "answers.sqlite"), images=4)
    with Server(gallery, Maker(gallery, fake_models(), 4), study) as server:
        os.write(out, f"{server.port} {server.token}\n".encode())
        server.wait()


def send(port: int, token: str, number: int, key: str, confirmed: list[str]) -> None:
    """Verdicts and captions without end, until the server is gone."""
    headers = {
        "cookie": f"sgid-review-{port}={token}",
        "origin": f"http://127.0.0.1:{port}",
        "content-type": "application/json",
    }
    while True:
        number += 1
        verdict = {"key": "ab" * 24, "number": number, "decision": "reject"}
        for path, body in (
            ("/api/verdicts", {"who": "anna", "verdicts": [verdict]}),
            ("/api/caption", {"who": "anna", "key": key, "caption": f"caption {number}"}),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                connection.request("POST", path, json.dumps(body), headers)
                if connection.getresponse().status == 200:
                    confirmed.append(f"{path} {number}")
            finally:
                connection.close()


def main() -> None:
    folder, kills, key = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    rng, confirmed = random.Random(5), []
    for attempt in range(kills):
        end, start = os.pipe()
        child = os.fork()
        if not child:
            serve(folder, start)
            os._exit(0)
        os.close(start)
        port, token = os.read(end, 200).decode().split()
        os.close(end)
        killer = os.fork()
        if not killer:
            time.sleep(rng.random() * 0.2)
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        rng.random()  # the child's number was the parent's next one
        with contextlib.suppress(OSError, http.client.HTTPException):  # it was killed
            send(int(port), token, 1000 * attempt, key, confirmed)
        os.waitpid(child, 0)
        os.waitpid(killer, 0)
    print(json.dumps(confirmed))


if __name__ == "__main__":
    main()

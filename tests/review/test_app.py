"""What the review's server answers, over real sockets."""

import http.client
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the review extra is not installed")


class Client:
    """Asks as a browser does that opened the printed address; each header can be replaced or left out."""

    def __init__(self, server):
        self.port, self.cookie = server.port, f"sgid-review-{server.port}={server.token}"

    def ask(self, method, path, body=None, **headers):
        usual = {"host": f"127.0.0.1:{self.port}", "cookie": self.cookie}
        if method != "GET":
            usual |= {"origin": f"http://127.0.0.1:{self.port}", "content-type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {name: value for name, value in (usual | headers).items() if value is not None}
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content, answer.headers

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, body, **headers):
        return self.ask("POST", path, body, **headers)


@pytest.fixture
def client(server):
    return Client(server)


def rows(client, **asked):
    from urllib.parse import urlencode

    status, found, _ = client.get(f"/api/rows?{urlencode(asked)}")
    assert status == 200
    return found


class TestWhoMayAsk:
    @pytest.mark.parametrize("path", ["/", "/review.js", "/api/rows", "/picture?key=00", "/study/answers.csv", "/?token=wrong"])
    def test_without_the_token_nothing_is_answered(self, client, path):
        for cookie in (None, "sgid-review-1=x", client.cookie[:-1], "a=;;\x22;"):
            status, said, _ = client.get(path, cookie=cookie)
            assert status == 403
            assert "sgid review" in said["problem"]

    def test_the_printed_address_sets_a_cookie_that_no_script_can_read(self, client, server):
        status, _, headers = client.get(f"/?token={server.token}", cookie=None)
        assert (status, headers["location"]) == (303, "/")
        assert "HttpOnly" in headers["set-cookie"]
        assert "SameSite=strict" in headers["set-cookie"]

    @pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1"])
    def test_another_page_can_change_nothing(self, client, origin, stores):
        one = rows(client)["rows"][0]["variants"][0]
        given = {"who": "anna", "verdicts": [{"key": one["key"], "number": 0, "decision": "reject"}]}
        status, said, _ = client.post("/api/verdicts", given, origin=origin)
        assert status == 403
        assert "another page" in said["problem"]
        assert stores.variants.all_verdicts() == ()

    def test_another_name_does_not_lead_here(self, client):
        assert client.get("/", host="evil.example")[0] == 403
        assert client.get("/", host=f"evil.example:{client.port}")[0] == 403

    def test_a_large_body_is_refused_before_it_is_read(self, client):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        connection.putrequest("POST", "/api/verdicts", skip_host=True)
        for name, value in {
            "host": f"127.0.0.1:{client.port}", "origin": f"http://127.0.0.1:{client.port}", "cookie": client.cookie,
            "content-length": str(50 << 20), "content-type": "application/json",
        }.items():  # fmt: skip
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_large_body_in_chunks_is_refused_too(self, client):
        chunks = (b"x" * 65536 for _ in range(800))
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        headers = {"host": f"127.0.0.1:{client.port}", "origin": f"http://127.0.0.1:{client.port}", "cookie": client.cookie}
        try:
            connection.request(
                "POST", "/api/verdicts", chunks, headers | {"content-type": "application/json"}, encode_chunked=True
            )
            status = connection.getresponse().status
        except (ConnectionError, http.client.RemoteDisconnected):  # it stopped reading
            status = 413
        finally:
            connection.close()
        assert status in (400, 413)
        assert client.get("/api/start")[0] == 200

    def test_every_answer_forbids_foreign_content(self, client):
        for path in ("/", "/review.js", "/api/start"):
            headers = client.get(path)[2]
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


class TestPictures:
    def test_are_those_of_the_stores(self, client, stores):
        row = rows(client)["rows"][0]
        status, data, headers = client.get(f"/picture?key={row['key']}")
        assert (status, headers["content-type"]) == (200, "image/png")
        assert data.startswith(b"\x89PNG")
        assert client.get(f"/picture?key={row['variants'][0]['key']}&number=0")[0] == 200

    @pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "link.png", "\0", "data/../secret.png"])
    def test_files_outside_of_the_folder_are_refused(self, client, stores, path):
        """Paths are data: a merged caption store may name any file."""
        from sgid_transforms.captions.record import CaptionRecord

        secret = stores.folder / "secret.png"
        first = stores.scan.images[0].file.path
        secret.write_bytes(first.read_bytes())
        (stores.data / "link.png").symlink_to(secret)
        where = {"link.png": stores.data / "link.png", "data/../secret.png": stores.data / ".." / "secret.png"}.get(path, path)
        stores.captions.put(CaptionRecord("ab" * 16, "a secret", "cat", path=str(where)))
        status, said, _ = client.get(f"/picture?key={'ab' * 16}")
        assert status == 404
        assert "problem" in said

    @pytest.mark.parametrize("key", ["../../../../etc/passwd", "..", "", "%00", "00" * 300, "ab%2F..%2F.."])
    def test_no_key_leads_out_of_the_store(self, client, key):
        for path in (f"/picture?key={key}", f"/picture?key={key}&number=0"):
            assert client.get(path)[0] in (400, 404, 507)


class TestVerdicts:
    def test_are_in_the_store_when_they_are_confirmed(self, client, stores):
        row = rows(client)["rows"][0]
        given = [{"key": one["key"], "number": one["number"], "decision": "reject", "why": "no"} for one in row["variants"][:2]]
        status, said, _ = client.post("/api/verdicts", {"who": " ben ", "verdicts": given})
        assert (status, said) == (200, {"decisions": ["reject"] * 2, "who": ["ben"] * 2})
        assert len(stores.variants.rejections(stores.recipe)[row["key"]]) == 2
        assert [one["decision"] for one in rows(client)["rows"][0]["variants"]] == ["reject", "reject", "none", "none"]
        assert rows(client, state="rejected", who="ben")["total"] == 1
        assert rows(client, state="rejected", who="anna")["total"] == 0
        assert rows(client, state="unjudged")["total"] == 9

    @pytest.mark.parametrize(
        "change",
        [{"decision": "maybe"}, {"number": -1}, {"key": ""}, {"why": "x" * 2000}, {"key": "../x"}, {"number": 10**12}],
    )
    def test_bad_ones_change_nothing(self, client, stores, change):
        one = {"key": "ab" * 24, "number": 0, "decision": "reject"} | change
        assert client.post("/api/verdicts", {"who": "anna", "verdicts": [one]})[0] in (400, 422, 507)
        assert client.post("/api/verdicts", {"who": "", "verdicts": []})[0] == 422
        assert stores.variants.all_verdicts() == ()

    def test_two_people_at_once_lose_nothing(self, client, server, stores):
        variants = [one for row in rows(client)["rows"] for one in row["variants"]]

        def judge(who, decision):
            own = Client(server)
            for one in variants:
                given = {"key": one["key"], "number": one["number"], "decision": decision}
                assert own.post("/api/verdicts", {"who": who, "verdicts": [given]})[0] == 200

        threads = [threading.Thread(target=judge, args=pair) for pair in (("anna", "reject"), ("ben", "keep"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        said = {(one.key, one.variant, one.who) for one in stores.variants.all_verdicts()}
        assert len(said) == 2 * len(variants)

    def test_a_store_that_cannot_be_written_is_said(self, client, stores):
        from sgid_transforms.variants.verdicts import FILE

        (stores.variants.root / FILE).mkdir()
        one = rows(client)["rows"][0]["variants"][0]
        given = {"who": "anna", "verdicts": [{"key": one["key"], "number": 0, "decision": "reject"}]}
        status, said, _ = client.post("/api/verdicts", given)
        assert status == 507
        assert "could not be written" in said["problem"]


class TestCaptions:
    def test_the_prompt_is_shown_as_it_will_be(self, client):
        row = rows(client)["rows"][0]
        _, said, _ = client.get(f"/api/prompt?key={row['key']}&caption=on+a+red+sofa&words=kitten")
        (one,) = said["prompts"]
        assert one["prompt"] == "a photo of a kitten, on a red sofa"
        assert 8 <= one["tokens"] <= 30
        assert one["limit"] > 0
        _, said, _ = client.get(f"/api/prompt?key={row['key']}&caption={'very+' * 200}long")
        assert said["prompts"][0]["cut"] is True
        assert said["prompts"][0]["tokens"] <= said["prompts"][0]["limit"]

    def test_an_edit_outdates_the_variants_and_new_ones_carry_the_new_prompt(self, client, stores):
        from sgid_transforms.building.address import Address

        row = rows(client)["rows"][0]
        edit = {"who": "anna", "key": row["key"], "caption": "on a red sofa", "words": "kitten"}
        status, said, _ = client.post("/api/caption", edit)
        assert (status, said["outdated"], said["row"]["variants"]) == (200, 4, [])
        record = stores.captions.get(row["key"])
        assert (record.caption, record.words, record.label, record.source) == ("on a red sofa", "kitten", row["label"], "human")
        assert client.post("/api/make", {"key": row["key"]})[1]["started"] is True
        job = wait_for_job(client)
        assert (job["state"], job["done"], job["total"], job["message"]) == ("done", 4, 4, "")
        _, row, _ = client.get(f"/api/row?key={row['key']}")
        assert [one["prompt"] for one in row["variants"]] == ["a photo of a kitten, on a red sofa"] * 4
        record = stores.captions.get(row["key"])
        assert record.rank is not None  # scored, so that a later `sgid generate` finds these variants and makes no others
        address = Address(stores.recipe, stores.captions)
        assert {one["key"] for one in row["variants"]} == {address.key(record, number) for number in range(4)}

    def test_a_job_that_fails_says_why(self, client, stores):
        row = rows(client)["rows"][0]
        (stores.data / row["name"]).unlink()
        client.post("/api/make", {"key": row["key"]})
        job = wait_for_job(client)
        assert job["state"] == "failed"
        assert "cannot be read" in job["message"]

    def test_a_lent_context_follows_its_caption(self, client, stores):
        lender = next(key for key, _, _ in stores.captions.contexts())
        client.post("/api/caption", {"who": "anna", "key": lender, "caption": "a cat on a red sofa", "words": ""})
        assert stores.captions.get(lender).context == "on a red sofa"


def wait_for_job(client):
    while True:
        job = client.get("/api/job")[1]
        if job["state"] not in ("loading", "making"):
            return job


class TestLists:
    def test_search_class_and_pages(self, client, stores):
        everything = rows(client)
        assert everything["total"] == 10
        assert [row["label"] for row in everything["rows"]] == ["cat"] * 5 + ["dog"] * 5
        assert rows(client, label="dog")["total"] == 5
        assert [row["key"] for row in rows(client, offset=7)["rows"]] == [row["key"] for row in everything["rows"][7:]]
        name = everything["rows"][3]["name"].split("/")[1]
        assert everything["rows"][3]["key"] in {row["key"] for row in rows(client, search=name.upper())["rows"]}
        assert rows(client, search="<script>")["total"] == 0

    def test_removed_records_do_not_break_a_page(self, client, stores):
        stores.captions.remove([rows(client)["rows"][0]["key"]])
        assert len(rows(client)["rows"]) == 9


def test_two_hundred_kills_lose_nothing_that_was_confirmed(stores):
    """The server dies in the middle of saving; the last caption is either the confirmed one or the one that was being saved."""
    here, key = Path(__file__).parent, stores.scan.images[0].key
    environment = os.environ | {"PYTHONPATH": str(here.parent / "helpers")}
    command = [sys.executable, str(here / "kill_review_server.py"), str(stores.folder), "200", key]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    confirmed = [line.split() for line in json.loads(done.stdout)]
    verdicts = {int(number) for path, number in confirmed if path == "/api/verdicts"}
    assert len(verdicts) > 200
    assert verdicts <= {one.variant for one in stores.variants.all_verdicts()}
    assert stores.variants.verify().damaged == ()
    last = max(int(number) for path, number in confirmed if path == "/api/caption")
    record = stores.captions.get(key)
    assert int(record.caption.removeprefix("caption ")) >= last
    assert stores.captions.verify().ok
    assert not list(stores.folder.glob("**/*.tmp"))

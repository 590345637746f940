"""The review's web server: who may ask, and what each address answers."""

import dataclasses
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgid_transforms.errors import RecipeError, SGIDError, StoreError
from sgid_transforms.report.answers import to_csv
from sgid_transforms.review.gallery import Gallery, NotFoundError
from sgid_transforms.review.making import Maker
from sgid_transforms.review.study import Study
from sgid_transforms.variants.verdicts import MAX_TEXT, Verdict

MAX_BODY = 65536
"""Bytes of a request; a page of verdicts has a few thousand."""

_PAGE = 24
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}

Who = Annotated[str, Field(min_length=1, max_length=100, pattern=r"\S")]
Key = Annotated[str, Field(min_length=1, max_length=512)]


class OneVerdict(BaseModel):
    """A verdict as the page sends it; ``key`` is the variant's key in its store."""

    key: Key
    number: Annotated[int, Field(ge=0)]
    decision: Literal["reject", "keep", "none"]
    why: Annotated[str, Field(max_length=MAX_TEXT)] = ""


class Verdicts(BaseModel):
    """What a person said about some variants."""

    who: Who
    verdicts: Annotated[list[OneVerdict], Field(max_length=200)]


class Edit(BaseModel):
    """A person's text of an image."""

    who: Who
    key: Key
    caption: Annotated[str, Field(max_length=2000)]
    words: Annotated[str, Field(max_length=200)] = ""


class Make(BaseModel):
    """An image whose variants are to be made."""

    key: Key


class Given(BaseModel):
    """A person's answer in the study."""

    who: Who
    trial: Annotated[str, Field(max_length=64)]
    answer: Annotated[str, Field(max_length=1000)]


class Guard:
    """Lets through what the page itself sends, and nothing else.

    A request needs the token, as a cookie or, for the first one, in the address; the host that the server listens on, so that
    no other name can be made to lead here; its own origin, if it changes anything; and a small body.

    Args:
        app: What answers the others.
        token: The secret.
        hosts: ``name:port`` of the addresses that lead here.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str]) -> None:
        self.app, self.token, self.hosts = app, token, frozenset(hosts)
        port = hosts[0].rpartition(":")[2]
        self.cookie = f"sgid-review-{port}"  # cookies are shared between the ports of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get("content-length", "0")
        if headers.get("host", "") not in self.hosts:
            await _say(403, "this address is not the one that the server was started for")(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD") and headers.get("origin", "") not in {
            f"http://{one}" for one in self.hosts
        }:
            await _say(403, "another page may not change anything here")(scope, receive, send)
        elif "transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY:  # a length is required
            await _say(413, f"a request of more than {MAX_BODY} bytes is refused")(scope, receive, send)
        elif scope["path"] == "/" and self._is_right(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
            answer = Response(status_code=303, headers={"location": "/"})
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            await answer(scope, receive, self._with_headers(send))
        elif not self._is_right(_cookie(headers.get("cookie", ""), self.cookie)):
            await _say(403, "open the address that `sgid review` printed, with its token")(scope, receive, send)
        else:
            await self.app(scope, receive, self._with_headers(send))

    def _is_right(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())

    def _with_headers(self, send: Send) -> Send:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS.items()]}
            await send(message)

        return with_headers


def _cookie(header: str, name: str) -> str:
    try:
        cookie: SimpleCookie = SimpleCookie(header)
    except CookieError:
        return ""
    return cookie[name].value if name in cookie else ""


def _say(status: int, problem: str) -> JSONResponse:
    return JSONResponse({"problem": problem}, status)


def make_app(gallery: Gallery, maker: Maker, study: Study, *, who: str = "", count: int = 4) -> FastAPI:
    """The server's application, which `Guard` must protect.

    Args:
        gallery: What is shown.
        maker: Makes variants of edited images.
        study: The study's questions.
        who: The name that the page proposes.
        count: Variants per image.
    """
    app = FastAPI(openapi_url=None)
    writing = threading.Lock()

    @app.exception_handler(SGIDError)
    async def problem(request: Request, error: SGIDError) -> JSONResponse:
        return _say(404 if isinstance(error, NotFoundError) else 507 if isinstance(error, StoreError) else 400, str(error))

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(_own("review.html"), headers={"cache-control": "no-store"})

    @app.get("/review.js")
    def script() -> Response:
        return Response(_own("review.js"), media_type="text/javascript")

    @app.get("/review.css")
    def style() -> Response:
        return Response(_own("theme.css", "report") + _own("review.css"), media_type="text/css")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/start")
    def start() -> dict[str, Any]:
        return {
            "who": who,
            "labels": gallery.labels,
            "originals": len(gallery),
            "caption_from": gallery.recipe.caption_from,
            "page": _PAGE,
        }

    @app.get("/api/rows")
    def rows(
        offset: Annotated[int, Query(ge=0)] = 0,
        label: str = "",
        search: Annotated[str, Query(max_length=200)] = "",
        order: Literal["class", "label", "change"] = "class",
        state: Literal["all", "rejected", "unjudged"] = "all",
        who: str = "",
    ) -> dict[str, Any]:
        keys = gallery.select(label, search, order, state, who)
        shown = []
        for key in keys[offset : offset + _PAGE]:
            try:
                shown.append(gallery.row(key))
            except NotFoundError:  # removed meanwhile
                continue
        return {"total": len(keys), "rows": shown, "scored": gallery.scored if order != "class" else None}

    @app.get("/api/row")
    def row(key: str) -> dict[str, Any]:
        return gallery.row(key)

    @app.post("/api/verdicts")
    def judge(given: Verdicts) -> dict[str, Any]:
        with writing:  # else two of the same moment could swap their times
            now = time.time()
            gallery.variants.judge(
                Verdict(gallery.recipe.fingerprint, one.key, one.number, one.decision, given.who, now, one.why)
                for one in given.verdicts
            )
        standing = gallery.variants.verdicts()
        found = [standing.get((gallery.recipe.fingerprint, one.key, one.number)) for one in given.verdicts]
        return {
            "decisions": [one.decision if one else "none" for one in found],
            "who": [one.who if one else "" for one in found],
        }

    @app.get("/api/prompt")
    def prompt(key: str, caption: str, words: str = "") -> dict[str, Any]:
        edited = dataclasses.replace(gallery.record(key), caption=caption, words=words or None, contradiction=None)
        prompts: list[dict[str, Any]] = []
        for label, text in gallery.prompts(edited, count):
            try:
                prompts.append(maker.prompt(label, text))
            except RecipeError as error:
                prompts.append({"prompt": "", "problem": str(error)})
        return {"prompts": prompts}

    @app.post("/api/caption")
    def edit(given: Edit) -> dict[str, Any]:
        before = gallery.current(gallery.record(given.key))
        gallery.edit(given.key, given.caption.strip(), given.words.strip(), given.who.strip())
        left = gallery.current(gallery.record(given.key))
        return {"row": gallery.row(given.key), "outdated": len(before) - len(left)}

    @app.post("/api/make")
    def make(given: Make) -> dict[str, Any]:
        gallery.record(given.key)
        return {"started": maker.start(given.key), "job": maker.status()}

    @app.get("/api/job")
    def job() -> dict[str, Any]:
        return maker.status()

    @app.get("/picture")
    def picture(key: str, number: Annotated[int | None, Query(ge=0)] = None) -> Response:
        data, kind = gallery.picture(key, number)
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    @app.get("/api/study")
    def question(who: str) -> dict[str, Any]:
        return study.next(who)

    @app.post("/api/study")
    def answer(given: Given) -> dict[str, Any]:
        study.answer(given.who.strip(), given.trial, given.answer)
        return study.next(given.who.strip())

    @app.get("/study/picture/{token}")
    def blind(token: str) -> Response:
        data, kind = study.picture(token)
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    @app.get("/api/study/results")
    def results() -> dict[str, Any]:
        return dataclasses.asdict(study.results())

    @app.get("/study/answers.csv")
    def answers() -> Response:
        headers = {"content-disposition": 'attachment; filename="answers.csv"'}
        return Response(to_csv(study.answers.all()), media_type="text/csv; charset=utf-8", headers=headers)

    return app


class Server:
    """The running server, in a thread of this process.

    Args:
        gallery, maker, study, who, count: as for `make_app`.
        host: Address to listen on.
        port: Port; 0: any free one.
    """

    def __init__(
        self,
        gallery: Gallery,
        maker: Maker,
        study: Study,
        *,
        who: str = "",
        count: int = 4,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        import uvicorn

        self._socket = socket.create_server((host, port))
        self.port = int(self._socket.getsockname()[1])
        self.token = secrets.token_urlsafe(24)
        names = (
            {host, "localhost"}
            if host in ("127.0.0.1", "localhost")
            else {host, socket.gethostname(), "localhost", "127.0.0.1"}
        )
        hosts = [f"{name}:{self.port}" for name in sorted(names)]
        guarded = Guard(make_app(gallery, maker, study, who=who, count=count), self.token, hosts)
        self.url = f"http://{host}:{self.port}/?token={self.token}"
        config = uvicorn.Config(guarded, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=3)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="sgid-review", daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def wait(self) -> None:
        """Wait until the server ends, or KeyboardInterrupt."""
        while self._thread.is_alive():
            self._thread.join(1.0)


def _own(name: str, package: str = "review") -> str:
    return resources.files(f"sgid_transforms.{package}").joinpath(name).read_text(encoding="utf-8")

"""``sgid review``: people judge variants in the browser."""

import getpass
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from sgid_transforms.cli import options
from sgid_transforms.cli.output import fail, note, say


def review(
    data: Annotated[Path, typer.Argument(metavar="[DATA]", help="Folder of the originals.", show_default=False)] = Path(),
    variants: options.Variants = Path("variants"),
    captions: options.Captions = Path("captions.sqlite"),
    recipe: Annotated[
        list[Path] | None,
        typer.Option("--recipe", metavar="FILE", help="Recipe (TOML); give it again to compare several in the study."),
    ] = None,
    model: options.Model = None,
    count: Annotated[int, typer.Option("-k", "--variants-per-image", min=1, metavar="K", help="Variants per image.")] = 4,
    who: Annotated[str, typer.Option("--name", metavar="NAME", help="Your name; others type theirs on the page.")] = "",
    study_images: Annotated[int, typer.Option(min=1, metavar="N", help="Originals in the study.")] = 12,
    scorer: options.Scorer = "auto",
    device: options.Device = "auto",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address or name of this machine, to let others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0: any free one.")] = 0,
) -> None:
    """Judge variants in the browser, alone or in a study.

    Reject bad variants, which training with SGIDAugment then never shows again, and edit captions. Ctrl-C ends the server.
    """
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.models.clip import CLIPScorer
    from sgid_transforms.report.answers import Answers, beside

    try:
        import fastapi  # noqa: F401
        import krippendorff  # noqa: F401
        import scipy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        fail(f"the review needs {error.name}: pip install 'sgid-transforms[review]'")
    from sgid_transforms.review.app import Server
    from sgid_transforms.review.gallery import Gallery
    from sgid_transforms.review.making import Maker
    from sgid_transforms.review.study import Study

    recipes = [options.recipe_from(one, model) for one in recipe] if recipe else [options.recipe_from(None, model)]
    if len({one.fingerprint for one in recipes}) < len(recipes):
        raise typer.BadParameter("the same recipe comes twice; give different ones", param_hint="--recipe")
    names = [one.stem for one in recipe] if recipe else [recipes[0].model]
    if not data.is_dir():
        fail(f"{data} is not a folder; give the folder of the originals")
    store = options.variant_store(variants, readonly=False)
    if not captions.exists():
        fail(f"there is no caption store at {captions}; give its file with --captions, or run sgid generate first")
    models = options.models_from(device, 32, scorer=scorer)
    chosen = models.scorer_for(recipes[0])
    clip = None if chosen == "none" else CLIPScorer(chosen, models.device)
    with closing(CaptionStore(captions)) as texts:
        galleries = [Gallery(texts, store, one, data, clip) for one in recipes]
        if not len(galleries[0]):
            fail(f"the caption store {captions} is empty; run sgid generate first")
        study = Study(galleries, names, Answers(beside(captions)), study_images, clip)
        maker = Maker(galleries[0], models, count)
        try:
            server = Server(galleries[0], maker, study, who=who or _user(), count=count, host=host, port=port)
        except OSError as error:
            fail(f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port")
        if host not in ("127.0.0.1", "localhost"):
            note(
                "everybody who can reach this address and knows the token can change verdicts and captions; it is not encrypted"
            )
        with server:
            say(f"{len(galleries[0])} originals: {server.url}")
            say("Ctrl-C ends the server.")
            try:
                server.wait()
            except KeyboardInterrupt:
                say("\nstopped")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name, as in some containers
        return ""

import pytest

from job_fakes import fake_models
from sgid_transforms.cli import main, options


class Sgid:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments):
        """Exit code, stdout and stderr."""
        self._monkeypatch.setattr("sys.argv", ["sgid", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self._capsys.readouterr()
        return end.value.code or 0, out, err


@pytest.fixture
def sgid(monkeypatch, capsys, tmp_path):
    """The command line with its real models, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Sgid(monkeypatch, capsys)


@pytest.fixture
def fake_sgid(sgid, monkeypatch):
    """The same with fake models."""
    monkeypatch.setattr(options, "models_from", lambda *arguments, **named: fake_models())
    return sgid

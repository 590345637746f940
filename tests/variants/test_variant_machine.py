"""VariantStore against a plain dict, through any order of calls, crashes and accidents (hypothesis)."""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sgid_transforms.variants import Provenance, VariantStore

RECIPES = st.sampled_from(["01aa", "02bb"])
KEYS = st.sampled_from([f"{number:032x}" for number in (1, 2, 2**120)])
NUMBERS = st.integers(0, 2)
NAMES = st.tuples(RECIPES, KEYS, NUMBERS)
COLOURS = st.integers(0, 255)


def image(colour):
    return torch.full((3, 4, 4), colour, dtype=torch.uint8)


class VariantMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = VariantStore(self.folder / "a", fsync=False)
        self.other = VariantStore(self.folder / "b", fsync=False)
        self.other.root.mkdir()
        self.model, self.other_model, self.failures = {}, {}, {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(name=NAMES, colour=COLOURS)
    def put(self, name, colour):
        assert self.store.put(*name, image(colour), Provenance(str(colour))) is (name not in self.model)
        self.model.setdefault(name, colour)

    @rule(name=NAMES, colour=COLOURS)
    def put_elsewhere(self, name, colour):
        self.other.put(*name, image(colour), Provenance(str(colour)))
        self.other_model.setdefault(name, colour)

    @rule(name=NAMES, reason=st.text(min_size=1, max_size=5))
    def put_failure(self, name, reason):
        assert self.store.put_failure(*name, [reason]) is (name not in self.failures)
        self.failures.setdefault(name, (reason,))

    @rule()
    def merge(self):
        self.store.merge(self.other)
        self.model = self.other_model | self.model

    @rule(recipe=RECIPES)
    def prune(self, recipe):
        self.store.prune(recipe)
        self.model = {name: colour for name, colour in self.model.items() if name[0] == recipe}
        self.failures = {name: reasons for name, reasons in self.failures.items() if name[0] == recipe}

    @rule(name=NAMES)
    def remove(self, name):
        self.store.remove(ref for ref in list(self.store.iter()) if ref[:3] == name)
        self.model.pop(name, None)

    @rule()
    def reopen(self):
        self.store = VariantStore(self.folder / "a", fsync=False)

    @rule(name=NAMES, data=st.binary(max_size=40))
    def crash_while_writing(self, name, data):
        """A killed writer leaves a temporary file."""
        (self.folder / "a" / "tmp").mkdir(parents=True, exist_ok=True)
        (self.folder / "a" / "tmp" / "otherhost-1-2-3.tmp").write_bytes(data)

    @rule(name=NAMES, cut=st.integers(0, 200))
    def damage(self, name, cut):
        for ref in self.store.iter():
            if ref[:3] == name:
                ref.path.write_bytes(ref.path.read_bytes()[:cut])
                self.model.pop(name, None)
                assert self.store.get_image(*name) is None

    @rule()
    def verify(self):
        assert self.store.verify(repair=True).ok

    @invariant()
    def all_reads_are_those_of_the_dict(self):
        found = {ref[:3]: int(self.store.get_image(*ref[:3]).unique()) for ref in self.store.iter()}
        assert found == self.model
        for name, reasons in self.failures.items():
            assert self.store.failure(*name) == reasons


TestVariantMachine = VariantMachine.TestCase
TestVariantMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

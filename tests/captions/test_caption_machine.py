"""CaptionStore against a plain dict, through any order of calls, crashes and accidents (hypothesis)."""

import os
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sgid_transforms.captions import CaptionRecord, CaptionStore

KEYS = st.sampled_from(["aa", "bb", "cc", "ünï"])
RECORDS = st.builds(
    CaptionRecord,
    KEYS,
    st.text(max_size=5),
    st.none() | st.text(max_size=3),
    st.none() | st.floats(-1, 1),
    st.none() | st.floats(0, 1),
    st.sampled_from(["", "blip"]),
    st.sampled_from(["model", "human", "import"]),
    st.none() | st.text(max_size=3),
)


def put(old, new):
    """What ``docs/stores.md`` says of a record that is put on top of another."""
    if old is None:
        return new
    taken = new.source == "human" or old.source != "human"
    text = new if taken else old
    merged = replace(text, label=old.label if new.label is None else new.label, path=old.path if new.path is None else new.path)
    if new.caption != old.caption:
        return merged
    similarity = old.similarity if new.similarity is None else new.similarity
    same = None in (new.similarity, old.similarity) or new.similarity == old.similarity
    rank = new.rank if new.rank is not None or not same else old.rank
    return replace(merged, similarity=similarity, rank=rank)


class CaptionMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = CaptionStore(self.folder / "a.sqlite")
        self.model = {}

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(records=st.lists(RECORDS, max_size=3))
    def put_many(self, records):
        self.store.put_many(records)
        for record in records:
            self.model[record.key] = put(self.model.get(record.key), record)

    @rule(key=KEYS)
    def remove(self, key):
        self.store.remove([key])
        self.model.pop(key, None)

    @rule(key=KEYS, value=st.none() | st.floats(-1, 1))
    def set_similarities(self, key, value):
        self.store.set_similarities({key: value})
        if key in self.model:
            self.model[key] = replace(self.model[key], similarity=value, rank=None)

    @rule()
    def set_ranks(self):
        self.store.set_ranks()
        ranks = {record.key: record.rank for record in self.store}
        for key, record in self.model.items():
            assert (ranks[key] is None) is (record.similarity is None)
            self.model[key] = replace(record, rank=ranks[key])

    @rule(records=st.lists(RECORDS, min_size=1, max_size=3, unique_by=lambda record: record.key))
    def merge(self, records):
        """What only the other store knows comes as it is there; of the rest, only what is missing."""
        other = CaptionStore(self.folder / "b.sqlite")
        other.put_many(records)
        self.store.merge(other)
        other.close()
        os.unlink(other.path)
        for record in records:
            old = self.model.get(record.key)
            now = self.store.get(record.key)
            taken = old is None or (record.source == "human" and old.source != "human")
            text = record if taken else old
            assert (now.caption, now.source, now.captioner) == (text.caption, text.source, text.captioner)
            self.model[record.key] = now

    @rule()
    def reopen(self):
        self.store.close()
        self.store = CaptionStore(self.folder / "a.sqlite")

    @rule()
    def crash(self):
        """What a killed process leaves: its files, with the log."""
        len(self.store)
        for end in ("", "-wal"):
            if os.path.exists(f"{self.store.path}{end}"):
                shutil.copy(f"{self.store.path}{end}", self.folder / f"copy.sqlite{end}")
        self.store.close()
        for end in ("", "-wal"):
            if os.path.exists(self.folder / f"copy.sqlite{end}"):
                os.replace(self.folder / f"copy.sqlite{end}", f"{self.store.path}{end}")

    @rule(key=KEYS)
    def fork(self, key):
        """A child that writes, and a parent that closes meanwhile."""
        if os.fork() == 0:
            CaptionStore(self.store.path).put(CaptionRecord(key, "child", source="human"))
            os._exit(0)
        self.store.close()
        assert os.wait()[1] == 0
        self.model[key] = put(self.model.get(key), CaptionRecord(key, "child", source="human"))

    @rule(key=KEYS)
    def damage(self, key):
        self.store.put(CaptionRecord(key, "x"))
        raw = sqlite3.connect(self.store.path)
        with raw:
            raw.execute("UPDATE captions SET digest = digest + 1 WHERE key = ?", (key,))
        raw.close()
        self.model.pop(key, None)
        assert self.store.get(key) is None

    @rule()
    def verify(self):
        self.store.verify(repair=True)
        assert self.store.verify().ok

    @invariant()
    def all_reads_are_those_of_the_dict(self):
        assert {record.key: record for record in self.store} == self.model
        assert self.store.get_many(["aa", "bb", "cc", "ünï"]) == self.model


TestCaptionMachine = CaptionMachine.TestCase
TestCaptionMachine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)

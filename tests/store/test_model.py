"""Writer, reader, crash, merge and damage by hypothesis against the simplest model there is: a dictionary."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import synthetic
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compodistill.errors import StoreError
from compodistill.store import create_store, open_store, sharing

names = st.sampled_from(["a", "b", "c"])
seeds = st.integers(0, 2)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.spec = synthetic.spec()
        self.published: dict[str, int] = {}  # shard -> seed of its samples
        self.sealed: dict[str, int] = {}
        self.n = 0
        create_store(self.path, self.spec)

    @property
    def path(self):
        return self.root / "s"

    def teardown(self):
        shutil.rmtree(self.root)

    def samples(self, name, seed):
        return synthetic.zoo(self.spec, seed, name)[:2]

    def write(self, path, name, seed, stop_after=None):
        with create_store(path, self.spec).fragment(name, synthetic.sha(name)) as f:
            for i, s in enumerate(self.samples(name, seed)):
                if i == stop_after:
                    raise ZeroDivisionError
                f.add(s)

    @rule(name=names, seed=seeds)
    def write_fragment(self, name, seed):
        if self.published.get(name, seed) != seed:
            with pytest.raises(StoreError, match="differ"):
                self.write(self.path, name, seed)
        else:
            self.write(self.path, name, seed)
            self.published[name] = seed

    @rule(name=names, seed=seeds, stop_after=st.integers(0, 1))
    def fail_while_writing(self, name, seed, stop_after):
        with pytest.raises(ZeroDivisionError):
            self.write(self.path, name, seed, stop_after)

    @rule()
    def leave_the_litter_of_a_killed_writer(self):
        (self.path / ".building").mkdir(exist_ok=True)
        (self.path / ".building" / f"dead{self.n}.lock").touch()
        (self.path / ".building" / f"dead{self.n}").mkdir()
        self.n += 1

    @precondition(lambda self: self.published)
    @rule()
    def seal(self):
        create_store(self.path, self.spec).seal(map(synthetic.sha, self.published))
        self.sealed = dict(self.published)
        assert not (self.path / ".building").exists()

    @precondition(lambda self: self.sealed)
    @rule(name=names, seed=seeds)
    def merge_another_store_in(self, name, seed):
        self.n += 1
        other = self.root / f"other{self.n}"
        self.write(other, name, seed)
        create_store(other, self.spec).seal([synthetic.sha(name)])
        if self.published.get(name, seed) != seed:
            with pytest.raises(StoreError):
                sharing.copy(open_store(other), self.path)
        else:
            sharing.copy(open_store(other), self.path)
            self.published[name] = self.sealed[name] = seed

    @invariant()
    def readers_see_what_the_dictionary_says(self):
        store = open_store(self.path, allow_partial=True)
        expected = self.sealed if store.info.sealed else self.published
        wanted = {s.key: s for name, seed in expected.items() for s in self.samples(name, seed)}
        assert set(store) == set(wanted)
        for key, sample in wanted.items():
            synthetic.assert_equal(store[key], sample)


StoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("CDIST_EXAMPLES", "12")),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreAgainstADictionary = StoreMachine.TestCase

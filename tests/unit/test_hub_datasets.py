"""Data sets of the hub: which files are read, in which revision and column, and what is said where there are none."""

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
from test_calibration import PROSE, calibrate

from convexprune.adapters._data.documents import CORPORA
from convexprune.errors import CalibrationError, DependencyError

TEXTS = {"penn_treebank/train/0000.parquet": 42068, "penn_treebank/test/0000.parquet": 3761}


class DatasetsError(Exception):
    """Stands for the error of the package, which is none of Python's."""


class Rows(list):
    features: ClassVar = {name: SimpleNamespace(dtype="string") for name in ("text", "other")} | {
        "label": SimpleNamespace(dtype="int64")
    }


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets` that records what it was asked for."""
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        count = TEXTS.get(options.get("data_files", {}).get("train"), 50)
        rows = Rows([{"label": 1, "text": PROSE, "sentence": PROSE, "other": PROSE[::-1]}] * count)
        return rows if "data_files" in options else {"train": rows, "test": Rows(rows[:1])}

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("name", CORPORA)
def test_short_names_are_read_from_a_fixed_revision(tiny_opt, hub, name):
    assert calibrate(name, tiny_opt).shape == (4, 16)
    assert calibrate(name, tiny_opt, split="evaluation").shape == (4, 16)
    (repository, first), (_, second) = hub
    assert repository == CORPORA[name].repository
    assert first["revision"] == CORPORA[name].revision != "main"
    assert first["data_files"] != second["data_files"]


def test_a_branch_whose_files_have_changed_is_refused(tiny_opt, hub, monkeypatch):
    monkeypatch.setitem(TEXTS, "penn_treebank/train/0000.parquet", 50)
    with pytest.raises(CalibrationError, match="50 texts where there were 42068: the files have changed"):
        calibrate("ptb", tiny_opt)


def test_other_names_of_the_hub_are_read_by_their_text_column(tiny_opt, hub):
    windows = calibrate("someone/something", tiny_opt, num_samples=4)
    assert hub == [("someone/something", {})]
    assert tiny_opt.tokenizer.decode(windows[0]).strip() in PROSE.replace("\n", " ") + PROSE
    with pytest.raises(CalibrationError, match="full windows"):
        calibrate("someone/something", tiny_opt, num_samples=100, split="evaluation")


def test_a_column_and_a_revision_may_be_named(tiny_opt, hub):
    windows = calibrate("someone/something@abc123#other", tiny_opt, num_samples=4)
    assert hub == [("someone/something", {"revision": "abc123"})]
    assert tiny_opt.tokenizer.decode(windows[0]).strip() in PROSE[::-1].replace("\n", " ") + PROSE[::-1]
    with pytest.raises(CalibrationError, match="column 'label' holds neither text nor messages"):
        calibrate("someone/something#label", tiny_opt)
    with pytest.raises(CalibrationError, match=r"Unknown column 'texts'. Did you mean 'text'"):
        calibrate("someone/something#texts", tiny_opt)
    with pytest.raises(CalibrationError, match="its own column"):
        calibrate("c4#url", tiny_opt)


def test_a_missing_package_says_what_to_install(tiny_opt, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"pip install 'datasets"):
        calibrate("c4", tiny_opt)


@pytest.mark.parametrize("kind", [ConnectionError, DatasetsError])
def test_a_data_set_out_of_reach_is_said_to_be(tiny_opt, hub, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("no network")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(CalibrationError, match=r'c4: the data set cannot be loaded .*no network.*dataset="self"'):
        calibrate("c4", tiny_opt)

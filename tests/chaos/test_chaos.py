"""A few trials of each family, and the page that shows the long run says what its results say."""

import json

import pytest

from roots_dist.storage.checkpoint import save

from .run import attempt, count, main, read_results
from .table import FAMILIES
from .trial import Family, Outcome

SAMPLES = [pytest.param(name, marks=[] if family.sample else pytest.mark.full) for name, family in FAMILIES.items()]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_of_the_trials_holds(name, tmp_path):
    family = FAMILIES[name]
    for number in range(max(1, family.sample)):
        place = tmp_path / str(number)
        place.mkdir()
        outcome = attempt(family, 7, number, place)
        assert outcome.held, (number, outcome)


def test_results_are_counted_and_gone_on_with(tmp_path, monkeypatch):
    seen = []

    def trial(draw, place):
        seen.append(draw.random())
        if len(seen) == 2:
            raise ValueError("no more")
        return Outcome("a push", held=True, count=3)

    family = Family("pushes", "it is pushed", "it stands", trial)
    monkeypatch.setitem(FAMILIES, "pushes", family)
    results = tmp_path / "results.json"
    assert main(["pushes", "--minutes", "0.004", "--results", str(results)]) == 1
    found = json.loads(results.read_text())["families"]["pushes"]
    number = found["trials"]
    assert number == len(set(seen)) and found["kinds"]["a push"]["states"] == 3 * (number - 1)
    assert [f["trial"] for f in found["failures"]] == [1] and "no more" in found["failures"][0]["words"]
    main(["pushes", "--minutes", "0.004", "--results", str(results)])
    assert json.loads(results.read_text())["families"]["pushes"]["trials"] == len(set(seen)) > number
    monkeypatch.setitem(FAMILIES, "pushes", Family("pushes", "it is pushed", "it stands", _holds))
    kept = json.loads(results.read_text())["families"]["pushes"]["trials"]
    assert main(["pushes", "--again", "--results", str(results)]) == 0
    mended = json.loads(results.read_text())["families"]["pushes"]
    assert [one["trial"] for one in mended["mended"]] == [1] and not mended["failures"]
    assert mended["trials"] == kept == sum(k["trials"] for k in mended["kinds"].values())
    with pytest.raises(AssertionError, match="give --seed 0"):
        read_results(results, seed=1)
    count(found := read_results(results, seed=0), family, 900, Outcome("a pull", held=False, words="fell"), 1.0)
    assert found["families"]["pushes"]["kinds"]["a pull"] == {"trials": 1, "states": 1, "held": 0}


def _holds(draw, place):
    return Outcome("a push", held=True)


def test_the_model_of_power_loss_notices_a_name_that_nobody_synced(tmp_path, monkeypatch):
    """The checkpoints folder itself, once: its entry in the run's folder was not on disk."""
    monkeypatch.setattr(save, "make_folder", lambda path: path.mkdir(exist_ok=True))
    outcome = attempt(FAMILIES["power"], 7, 0, tmp_path)
    assert not outcome.held and "step 0 is found, 1 was committed" in outcome.words


def test_it_notices_the_same_in_the_background_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "sync_folder", lambda path: None)
    outcome = attempt(FAMILIES["power"], 7, 1, tmp_path)
    assert outcome.kind == "saves in the background of a run" and not outcome.held
    assert "looks like a checkpoint" in outcome.words or "was committed" in outcome.words

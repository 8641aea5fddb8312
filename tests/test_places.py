"""What is said of a place where nothing is."""

import pytest

from inarch.core.errors import ConfigError
from inarch.core.places import absent, is_model, nearest_place, no_model
from inarch.methods import read_config
from inarch.sweep.study import read_study_file


def test_what_is_there_is_not_offered_in_its_own_place(tmp_path):
    (tmp_path / "run").write_text("")
    assert nearest_place(str(tmp_path / "run")) == ""
    assert nearest_place(str(tmp_path / "rum")) == f"Did you mean `{tmp_path / 'run'}`?"


def test_only_what_fits_is_offered(tmp_path):
    for name in ("model", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "models/config.json").write_text("{}")
    assert nearest_place(str(tmp_path / "modl"), fits=is_model) == f"Did you mean `{tmp_path / 'models'}`?"
    (tmp_path / "models/config.json").unlink()
    assert nearest_place(str(tmp_path / "modl"), fits=is_model) == ""


def raised(kind, words="words of the client, HF_HUB_OFFLINE=0"):
    """What transformers raises of an error of the Hub's client."""
    error = OSError("We couldn't connect")
    error.__cause__ = type(kind, (Exception,), {})(words)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LocalEntryNotFoundError", "the Hub could not be reached for it, nor has the local cache any of that name"),
        ("RepositoryNotFoundError", "the Hub has none of that name, or keeps it private"),
        ("GatedRepoError", "the Hub gives it only to those who asked for it there"),
        ("SomethingElse", "the Hub gave none: We couldn't connect"),
    ],
)
def test_a_name_of_nothing_is_no_folder_and_no_id(kind, words):
    error = raised(kind)
    assert absent(error) == f"no such folder is here, and {words}"
    assert f"got `runs/none`: no such folder is here, and {words}. Check the name" in no_model("runs/none", error)
    assert "HF_HUB_OFFLINE" not in no_model("runs/none", error)


def test_a_file_that_is_missing_is_said_to_be(tmp_path):
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(ConfigError, match=r"file must be there; got nothing at .*Did you mean `.*adapter\.json`"):
        read_config(str(tmp_path / "adaptr.json"))
    with pytest.raises(ConfigError, match=r"file must be readable JSON; got .*adapter\.json"):
        read_config(str(tmp_path / "adapter.json"))
    with pytest.raises(ConfigError, match=r"study file must be there; got nothing at `.*none\.json`\. Give its path"):
        read_study_file(tmp_path / "none.json")

"""Adapters on the Hub: what is uploaded, what the card says, which revision is read. No network."""

import shutil
from types import SimpleNamespace

import pytest
import torch

import inarch
from inarch.core.errors import StateError
from inarch.testing import tiny, tiny_inputs


class Hub:
    """Keeps the folders that are uploaded, by commit."""

    def __init__(self, place):
        self.place, self.calls = place, []

    def api(self):
        class HfApi:
            create_repo, upload_folder = staticmethod(self.create_repo), staticmethod(self.upload_folder)

            def __init__(self, token=None):
                self.token = token

        return HfApi

    def create_repo(self, repository, *, private, exist_ok):
        if repository == "nobody/x":
            raise PermissionError("403 Forbidden")
        self.calls.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message, commit_description, revision, create_pr):
        commit = f"c{len(list(self.place.iterdir()))}"
        shutil.copytree(folder_path, self.place / commit)
        self.calls.append((repo_id, commit_message, commit_description, revision, create_pr))
        return SimpleNamespace(oid=commit)

    def snapshot_download(self, repository, *, allow_patterns, revision):
        return str(self.place / (revision or max(path.name for path in self.place.iterdir())))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", found.api())
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    return found


def test_what_is_pushed_is_read_back_at_its_revision(hub):
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("a", "lora[r=4]")
    adapters.add_head("a", "classification", num_labels=3)
    adapters.train("a")
    outputs = {}
    for _ in range(2):
        for parameter in adapters["a"].values():
            parameter.data.normal_(std=0.3)
        commit = adapters.push("a", "me/a", private=True)
        outputs[commit] = model(**tiny_inputs("bert")).logits
    assert hub.calls[:2] == [("me/a", True, True), ("me/a", "Add the adapter a", None, None, False)]
    for commit, expected in outputs.items():
        fresh = tiny("bert")
        other = inarch.attach(fresh)
        other.activate(other.load("me/a", revision=commit))
        assert torch.equal(fresh(**tiny_inputs("bert")).logits, expected)
    card = (hub.place / "c0" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: inarch\n") and "lora[r=4]" in card
    assert 'adapters.load("me/a")' in card and "* head: inarch.heads.a" in card


def test_what_the_hub_refuses_is_told(hub):
    adapters = inarch.attach(tiny("bert"))
    adapters.add("a", "lora")
    with pytest.raises(StateError, match="a Hub repository that can be written; got `nobody/x`: PermissionError: 403"):
        adapters.push("a", "nobody/x")


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "gpt2", "", "/home/me/models/vit", "./vit", "."])
def test_a_card_names_the_base_by_its_repository_and_by_no_place_of_a_machine(hub, name):
    model = tiny("bert")
    model.config._name_or_path = name
    adapters = inarch.attach(model)
    adapters.add("a", "lora[r=4]")
    card = (hub.place / adapters.push("a", "me/x") / "README.md").read_text()
    is_repository = name in ("google-bert/bert-base-uncased", "gpt2")
    assert (f"base_model: {name}\n" in card) == is_repository
    assert f"An adapter for `{name if is_repository else 'BertModel'}`" in card
    assert "/home/me" not in card

"""Adapter folders: what is written is read back, and everything else is refused with the model unchanged."""

import errno
import json
import os
import pickle
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import inarch
from inarch import convert, grafted, state
from inarch.core.errors import SetupError, StateError
from inarch.testing import tiny, tiny_inputs


@pytest.fixture
def saved(tmp_path):
    """A model with a trained adapter and head, the folder it was saved to, and its output."""
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    adapters.add("task", "seq_bn[reduction_factor=4]|lora[init_weights=bert]")
    adapters.train("task")
    with torch.no_grad():
        for parameter in (*adapters["task"].values(), *adapters.head("task").values()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapters.save("task", tmp_path / "task")
    return model, tmp_path / "task", model(**tiny_inputs("vit-classifier")).logits


def snapshot(model):
    """Everything that can be observed of a model."""
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        inarch.attach(model).names,
        inarch.attach(model).setup,
    )


def assert_same(before, after):
    """Two snapshots are equal, tensors bit for bit."""
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for key, tensor in before[0].items():
        assert torch.equal(tensor, after[0][key]), key


def fresh():
    """The same base model, newly made, with its head moved away."""
    model = tiny("vit-classifier")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    return model


def test_an_adapter_and_its_head_load_into_a_fresh_model_bit_for_bit(saved):
    _, folder, output = saved
    model = fresh()
    adapters = inarch.attach(model)
    assert adapters.load(folder, name="other") == "other"
    assert not torch.equal(model(**tiny_inputs("vit-classifier")).logits, output)
    adapters.activate("other")
    assert torch.equal(model(**tiny_inputs("vit-classifier")).logits, output)
    assert not any(parameter.requires_grad for parameter in adapters["other"].values())


def test_keys_name_positions_not_modules(saved):
    _, folder, _ = saved
    keys = load_file(folder / state.TENSORS).keys()
    assert {key for key in keys if key.startswith("image0.0.")} == {
        "image0.0.self_attention.lora.q.A",
        "image0.0.self_attention.lora.q.B",
        "image0.0.self_attention.lora.v.A",
        "image0.0.self_attention.lora.v.B",
        "image0.0.mlp.bottleneck.down.weight",
        "image0.0.mlp.bottleneck.down.bias",
        "image0.0.mlp.bottleneck.up.weight",
        "image0.0.mlp.bottleneck.up.bias",
    }
    assert {key for key in keys if key.startswith("head.")} == {"head.classifier.weight", "head.classifier.bias"}


def test_the_record_says_what_is_needed_to_use_the_adapter(saved):
    _, folder, _ = saved
    record = json.loads((folder / state.RECORD).read_text())
    assert record["format_version"] == 2
    assert record["base"]["model_type"] == "vit"
    assert record["base"]["model_class"] == "ViTForImageClassification"
    assert record["head"]["labels"] == [f"LABEL_{i}" for i in range(5)]
    assert set(record["versions"]) == {"inarch", "torch", "transformers"}
    assert "image0.0.mlp.up.weight" in record["base"]["fingerprint"]["parts"]


def test_only_the_head_can_be_left_out(saved):
    _, folder, _ = saved
    model = fresh()
    before = model.classifier.weight.clone()
    inarch.attach(model).load(folder, head=False)
    assert torch.equal(model.classifier.weight, before)


def test_saving_over_an_adapter_replaces_it_and_over_anything_else_is_refused(saved, tmp_path):
    model, folder, _ = saved
    inarch.attach(model).save("task", folder)
    assert sorted(file.name for file in folder.iterdir()) == [state.TENSORS, state.RECORD]
    other = tmp_path / "work"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(StateError, match="holds thesis.txt. Choose another folder"):
        inarch.attach(model).save("task", other)
    assert (other / "thesis.txt").read_text() == "years"
    with pytest.raises(StateError, match="holds a file"):
        inarch.attach(model).save("task", other / "thesis.txt")


def test_a_link_to_a_folder_stays_one_and_what_it_points_at_is_replaced(saved, tmp_path):
    model, folder, _ = saved
    before, link = (folder / state.TENSORS).read_bytes(), tmp_path / "link"
    link.symlink_to(folder)
    adapters = inarch.attach(model)
    with torch.no_grad():
        next(iter(adapters["task"].values())).add_(1)
    adapters.save("task", link)
    assert link.is_symlink()
    assert (folder / state.TENSORS).read_bytes() != before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "task"]


def test_a_folder_of_the_home_is_named_alike_by_save_and_load(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    adapters = inarch.attach(saved[0])
    adapters.save("task", "~/one")
    adapters.save_setup("~/two", "task")
    assert sorted(entry.name for entry in (tmp_path / "home").iterdir()) == ["one", "two"]
    assert adapters.load("~/one", name="again") == "again"
    assert inarch.attach(fresh()).load_setup("~/two") == "task"


def test_the_folder_that_the_process_is_in_is_not_replaced_under_it(saved, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for place in (".", here):
        with pytest.raises(StateError, match="the folder that the process is in.*Name a folder in it"):
            inarch.attach(saved[0]).save("task", place)
    assert list(here.iterdir()) == []


def test_a_place_that_the_system_does_not_take_is_refused_by_name(saved, tmp_path):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for place in (tmp_path / ("x" * 300), tmp_path / "round" / "task"):
        with pytest.raises(StateError, match=r"must be writable; got .*(name too long|symbolic links|[Ll]oop)"):
            inarch.attach(saved[0]).save("task", place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(None, "anything with a `to_dict`; got Processor"), ({"size": {1}}, "kept as JSON; got Processor beside `task`")],
)
def test_a_processor_that_json_cannot_hold_is_refused_by_name(settings, message, saved, tmp_path):
    class Processor:
        if settings is not None:
            to_dict = staticmethod(lambda: settings)

    with pytest.raises(StateError, match=message):
        inarch.attach(saved[0]).save("task", tmp_path / "new", processor=Processor())
    assert not (tmp_path / "new").exists()


@pytest.fixture
def pair(tmp_path):
    """A setup of two adapters with values of their own, and its folder."""
    adapters, folder = inarch.attach(tiny("vit")), tmp_path / "setup"
    for name in ("a", "b"):
        adapters.add(name)
    adapters.save_setup(folder, inarch.Stack("a", "b"))
    return adapters, folder


def test_a_setup_whose_second_adapter_does_not_fit_changes_nothing(pair):
    _, folder = pair
    file = folder / "adapters" / "b" / state.TENSORS
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key][:1].clone()}, file)
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "lora")
    before = {key: value.clone() for key, value in adapters["a"].items()}
    with pytest.raises(StateError, match="has shape"):
        adapters.load_setup(folder, overwrite=True)
    assert adapters.names == ("a",)
    assert all(torch.equal(value, before[key]) for key, value in adapters["a"].items())


def test_a_setup_is_saved_when_all_of_its_adapters_can_be(pair):
    adapters, folder = pair
    before = (folder / "adapters" / "a" / state.TENSORS).read_bytes()
    (folder / "adapters" / "b" / "notes.txt").write_text("mine")
    with torch.no_grad():
        next(iter(adapters["a"].values())).add_(1)
    with pytest.raises(StateError, match="which holds adapter.safetensors, inarch.json, notes.txt"):
        adapters.save_setup(folder, inarch.Stack("a", "b"))
    assert (folder / "adapters" / "a" / state.TENSORS).read_bytes() == before


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4])  # the tensors and the record of each, then the setup
def test_a_disk_that_fills_up_leaves_the_old_setup_as_it_was(pair, writes, monkeypatch):
    adapters, folder = pair
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in adapters.names:
        with torch.no_grad():
            next(iter(adapters[name].values())).add_(1)
    done = []

    def filling(write):
        def wrapped(self, *args, **kwargs):
            if len(done) == writes:
                write(self, args[0][:1], **kwargs)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done.append(self)
            return write(self, *args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for method in ("write_bytes", "write_text"):
            patch.setattr(Path, method, filling(getattr(Path, method)))
        place = folder / "adapters" / ("b" if writes < 2 else "a") if writes < 4 else folder
        with pytest.raises(StateError, match=f"must be writable; got `{place}`: No space left on device"):
            adapters.save_setup(folder, inarch.Stack("b", "a"))
    assert len(done) == writes
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "setup.json"]
    adapters.save_setup(folder, inarch.Stack("b", "a"))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert {path.name for path in after if after[path] != before[path]} == {"setup.json", state.TENSORS}


def test_a_full_disk_leaves_the_old_adapter_and_no_draft(saved, tmp_path, monkeypatch):
    model, folder, _ = saved
    before = (folder / state.TENSORS).read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StateError, match="No space left on device. Nothing was changed there"):
        inarch.attach(model).save("task", folder)
    assert (folder / state.TENSORS).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["task"]


def test_a_failed_rename_puts_the_old_adapter_back(saved, monkeypatch):
    model, folder, _ = saved
    before = (folder / state.TENSORS).read_bytes()
    renames = []
    rename = os.rename

    def fail_second(self, target):
        renames.append(self)
        if len(renames) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(self, target)

    monkeypatch.setattr("inarch.core.drafts._exchange", lambda *_: False)
    monkeypatch.setattr("pathlib.Path.rename", fail_second)
    with pytest.raises(StateError, match="Input/output error"):
        inarch.attach(model).save("task", folder)
    assert (folder / state.TENSORS).read_bytes() == before
    assert len(renames) == 3


class Bomb:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncate(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(file, tmp_path):
    data = bytearray(file.read_bytes())
    data[12:20] = b"\xff" * 8
    file.write_bytes(data)


def oversize(file, tmp_path):
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])


def empty(file, tmp_path):
    file.write_bytes(b"")


def disguise_pickle(file, tmp_path):
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))


def disguise_archive(file, tmp_path):
    torch.save({"a": Bomb(tmp_path / "boom")}, file)


def remove(file, tmp_path):
    file.unlink()


def lose_key(file, tmp_path):
    tensors = load_file(file)
    del tensors["image0.1.mlp.bottleneck.up.bias"]
    save_file(tensors, file)


def gain_key(file, tmp_path):
    save_file(load_file(file) | {"image0.9.mlp.bottleneck.up.bias": torch.zeros(3)}, file)


def reshape(file, tmp_path):
    tensors = load_file(file)
    tensors["image0.1.mlp.bottleneck.up.bias"] = torch.zeros(7)
    save_file(tensors, file)


DAMAGE = {
    truncate: "must be a whole safetensors file",
    corrupt: "must be a whole safetensors file",
    oversize: "begins with the length of its header, at most",
    empty: "begins with the length of its header, at most .* got nothing in 0 bytes",
    disguise_pickle: "got a pickle or zip archive at .* It was not opened",
    disguise_archive: "got a pickle or zip archive at .* It was not opened",
    remove: "An adapter folder holds `adapter.safetensors`",
    lose_key: "`image0.1.mlp.bottleneck.up.bias` is missing",
    gain_key: "`image0.9.mlp.bottleneck.up.bias` is unexpected",
    reshape: r"`image0.1.mlp.bottleneck.up.bias` has shape \(7,\), the model wants \(32,\)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_gives_one_error_and_leaves_the_model_unchanged(damage, saved, tmp_path):
    _, folder, _ = saved
    damage(folder / state.TENSORS, tmp_path)
    model = fresh()
    adapters = inarch.attach(model)
    adapters.add("mine", "lora")
    adapters.train("mine")
    before = snapshot(model)
    with pytest.raises(StateError, match=DAMAGE[damage]):
        adapters.load(folder)
    assert_same(before, snapshot(model))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "got no `inarch.json`"),
        ("{", "must be readable JSON"),
        ("[]", "got None"),
        ('{"format_version": 99}', "reads adapter format 2; got 99"),
        ('{"format_version": 1}', "reads adapter format 2; got 1"),
        ('{"format_version": 2}', "got none for config, sites, base"),
        ("[" * 100_000, "must be readable JSON"),
    ],
)
def test_a_damaged_record_is_refused(text, message, saved):
    _, folder, _ = saved
    if text is None:
        (folder / state.RECORD).unlink()
    else:
        (folder / state.RECORD).write_text(text)
    with pytest.raises(StateError, match=message):
        inarch.attach(fresh()).load(folder)


def test_the_same_architecture_with_other_weights_is_another_base(saved):
    _, folder, _ = saved
    model = tiny("vit-classifier", seed=1)
    adapters = inarch.attach(model)
    before = snapshot(model)
    with pytest.raises(StateError, match="The weights of an adapter's base and of the model must agree"):
        adapters.load(folder)
    assert_same(before, snapshot(model))
    assert adapters.load(folder, other_base="allow") == "task"


def test_another_architecture_is_named(saved):
    _, folder, _ = saved
    with pytest.raises(StateError, match="first `image0.0.self_attention`: .* absent in BertModel"):
        inarch.attach(tiny("bert")).load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_the_same_base(dtype, saved):
    _, folder, _ = saved
    model = fresh().to(dtype)
    assert inarch.attach(model).load(folder) == "task"


def test_a_head_of_another_size_is_refused(saved):
    from transformers import ViTForImageClassification

    _, folder, _ = saved
    base = tiny("vit-classifier")
    config = base.config
    config.num_labels = 7
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(base.vit.state_dict())
    adapters = inarch.attach(model)
    with pytest.raises(StateError, match="got 5 in .* and 7 in ViTForImageClassification"):
        adapters.load(folder)
    assert adapters.load(folder, head=False) == "task"


def test_a_head_that_is_not_there_is_named(saved):
    _, folder, _ = saved
    base = tiny("vit-classifier").vit
    with pytest.raises(StateError, match="got `classifier` of .* for ViTModel"):
        inarch.attach(base).load(folder)


def test_an_adapter_of_the_base_loads_under_a_task_head(tmp_path):
    classifier = tiny("vit-classifier")
    base = tiny("vit-classifier").vit
    adapters = inarch.attach(base)
    adapters.add("a", "seq_bn")
    adapters.save("a", tmp_path / "a")
    assert inarch.attach(classifier).load(tmp_path / "a") == "a"


def test_a_taken_name_is_refused_and_can_be_overwritten(saved):
    model, folder, _ = saved
    adapters = inarch.attach(model)
    with pytest.raises(SetupError, match="got `task` again"):
        adapters.load(folder)
    assert adapters.load(folder, overwrite=True) == "task"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "`nowhere/at/all`, where nothing is. Give the folder"),
        ("./nowhere", "`./nowhere`, where nothing is. Give the folder"),
        ("somebody/unknown-adapter", "no such folder is here, and the Hub could not be reached"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, message):
    with pytest.raises(StateError, match=message):
        inarch.attach(tiny("vit")).load(source)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A Hub with one repository, in a folder; gives that folder and what was asked of it."""
    remote, local, asked = saved[1], tmp_path / "snapshots" / "c0ffee", []

    def is_free():
        found = grafted.LOCK.acquire(blocking=False)
        if found:
            grafted.LOCK.release()
        return found

    def snapshot_download(repository, *, allow_patterns, revision):
        free = []
        other = threading.Thread(target=lambda: free.append(is_free()))
        other.start()
        other.join()
        assert free == [True], "a download must not keep other threads from their models"
        asked.append((repository, tuple(allow_patterns), revision))
        local.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            if (remote / file).exists():
                shutil.copy(remote / file, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return remote, asked


def test_of_a_hub_repository_the_record_is_fetched_first_then_the_weights_of_that_revision(saved, hub):
    _, asked = hub
    adapters = inarch.attach(fresh())
    assert adapters.load("owner/name") == "task"
    assert asked == [
        ("owner/name", (state.RECORD, *convert.RECORDS), None),
        ("owner/name", (state.TENSORS,), "c0ffee"),
    ]


def test_weights_of_what_cannot_be_read_are_not_fetched(saved, hub):
    remote, asked = hub
    (remote / state.RECORD).write_text('{"format_version": 99}')
    with pytest.raises(StateError, match="reads adapter format 2; got 99"):
        inarch.attach(fresh()).load("owner/name")
    (remote / state.RECORD).unlink()
    with pytest.raises(StateError, match="adapter format 2"):  # from the snapshot that is there
        inarch.attach(fresh()).load("owner/name")
    assert [revision for _, _, revision in asked] == [None, None]


def test_a_repository_without_an_adapter_is_refused_by_name(saved, hub):
    remote, asked = hub
    (remote / state.RECORD).unlink()
    with pytest.raises(StateError, match="got no `inarch.json` and nothing of those in `owner/name`"):
        inarch.attach(fresh()).load("owner/name")
    assert len(asked) == 1


def test_a_taken_name_costs_no_download(saved, hub):
    adapters = inarch.attach(saved[0])
    with pytest.raises(SetupError, match="got `task` again"):
        adapters.load("owner/name", name="task")
    assert not hub[1]


@pytest.mark.parametrize("stored", ["adapter.safetensors", "pytorch_adapter.bin"])
def test_of_a_foreign_repository_the_safe_file_is_preferred(stored, saved, hub):
    remote, asked = hub
    for file in (state.RECORD, state.TENSORS):
        (remote / file).unlink()
    (remote / "adapter_config.json").write_text('{"name": "a", "model_type": "bert", "config": {}}')
    (remote / stored).write_bytes(b"")
    with pytest.raises(StateError, match="the model types of an adapter's base|The model types"):
        inarch.attach(fresh()).load("owner/name")
    wanted = [files for _, files, _ in asked[1:] if "adapter" in files[0]]
    assert wanted == [("adapter.safetensors",), ("pytorch_adapter.bin",)][: 1 if "safe" in stored else 2]


def test_a_copied_folder_is_as_good(saved, tmp_path):
    _, folder, output = saved
    shutil.copytree(folder, tmp_path / "copy")
    model = fresh()
    adapters = inarch.attach(model)
    adapters.load(tmp_path / "copy")
    adapters.activate("task")
    assert torch.equal(model(**tiny_inputs("vit-classifier")).logits, output)

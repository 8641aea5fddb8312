"""Loading labelled images: the source is recognised, divided fairly, and refused with words that help."""

import csv
import logging

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inarch.core.errors import DataError
from inarch.data import folders, load_data
from inarch.data.examples import Examples, ImageData, divide, hold_out, quotas


def picture(path, colour=0):
    """A tiny image at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, colour, colour)).save(path)


def classes(root, **counts):
    """A folder of images by class."""
    for name, count in counts.items():
        for number in range(count):
            picture(root / name / f"{number:03}.png", number)
    return root


def names(examples, root):
    """The files of some examples, relative to their folder."""
    return [str(examples[index][0].relative_to(root)) for index in range(len(examples))]


# --- holding out


@given(st.lists(st.integers(0, 6), min_size=2, max_size=300), st.floats(0.01, 0.99), st.integers(0, 5))
def test_held_out_shares_are_fair(drawn, share, seed):
    """Every class keeps an image on each side, no share is off by more than one, and nothing is lost or doubled."""
    targets = [*drawn, *sorted(set(drawn))]  # at least two of each class
    kept, held = hold_out(targets, share, seed)
    assert sorted(kept + held) == list(range(len(targets)))
    for target in set(targets):
        total = targets.count(target)
        out = sum(targets[index] == target for index in held)
        assert 1 <= out <= total - 1
        assert abs(out - share * total) <= 1
    num_classes = len(set(targets))
    assert len(held) == round(share * len(targets)) or abs(len(held) - share * len(targets)) <= num_classes


@given(st.dictionaries(st.integers(0, 20), st.integers(20, 60), min_size=1), st.floats(0.1, 0.5))
def test_quotas_add_up_to_the_share(counts, share):
    """With enough images in each class the sum is exact."""
    assert sum(quotas(counts, share).values()) == round(share * sum(counts.values()))


@given(st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True).map(tuple), min_size=2, max_size=60))
def test_with_several_labels_each_stays_in_training(targets):
    """No label is held out altogether."""
    kept, held = hold_out(targets, 0.3, 0)
    assert sorted(kept + held) == list(range(len(targets)))
    assert len(held) <= max(1, round(0.3 * len(targets)))
    assert {label for index in held for label in targets[index]} <= {
        label for index in kept for label in targets[index]
    }


def test_the_division_depends_on_the_seed_alone():
    """The same seed gives the same images, another seed others; a new class does not move those of the old ones."""
    targets = [0, 1] * 50
    assert hold_out(targets, 0.2, 1) == hold_out(targets, 0.2, 1)
    assert hold_out(targets, 0.2, 1) != hold_out(targets, 0.2, 2)
    more = hold_out([*targets, *[2] * 50], 0.2, 1)
    assert [index for index in more[1] if index < 100] == hold_out(targets, 0.2, 1)[1]


def test_the_division_is_the_same_in_every_version():
    """Pinned, because a result on held-out images is only comparable with one on the same."""
    assert hold_out([0, 1] * 10, 0.2, 0)[1] == PINNED_HELD_OUT


def test_nothing_or_everything_can_be_held_out():
    """The two extremes have no condition, not even two images a class."""
    assert hold_out([0, 1], 0, 0) == ([0, 1], [])
    assert hold_out([0, 1], 1, 0) == ([], [0, 1])


# --- the data themselves


def test_labels_of_several_become_vectors():
    """A multi-label example is a vector with a 1 for each of its labels."""
    examples = Examples([b"", b""], [(0, 2), ()], 3)
    assert examples[0][1].tolist() == [1, 0, 1]
    assert examples[1][1].tolist() == [0, 0, 0]
    assert examples[0][1].dtype == np.float32


def test_a_trained_model_keeps_its_label_ids(tmp_path):
    """Data with fewer labels, in another order, are moved to the ids of the model."""
    data = load_data(str(classes(tmp_path, cat=2, dog=2)), validation=1)
    moved = data.with_labels(["dog", "emu", "cat"])
    assert [moved.labels[moved.validation[index][1]] for index in range(4)] == ["cat", "cat", "dog", "dog"]
    several = ImageData(name="x", task="multi_label", labels=["a", "b"], train=Examples([b""], [(0, 1)], 2),
                        validation=Examples([], [], 2))  # fmt: skip
    assert several.with_labels(["b", "c", "a"]).train[0][1].tolist() == [1, 0, 1]


def test_a_label_the_model_lacks_is_refused(tmp_path):
    """An unknown label is named, with the nearest one the model knows."""
    data = load_data(str(classes(tmp_path, cat=2, dog=2)))
    with pytest.raises(DataError, match="must be one the model knows; got `dog` in `.*`. Did you mean `dogs`"):
        data.with_labels(["cat", "dogs"])


# --- digits


def test_digits_are_scikit_learns():
    """All 1,797 scans, in RGB and in full range, 400 of them held out, by class as evenly as can be."""
    data = load_data("digits")
    assert (len(data.train), len(data.validation)) == (1397, 400)
    assert data.labels == [str(number) for number in range(10)]
    image, label = data.train[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and isinstance(label, int)
    assert max(data.train[index][0].max() for index in range(50)) == 255
    assert {data.validation.targets.count(target) for target in range(10)} <= {39, 40, 41}
    assert (data.mirror_safe, data.crop_safe, data.task, data.name) == (False, 0.85, "single_label", "digits")


def test_the_digits_held_out_do_not_depend_on_the_seed():
    """Results on digits can be compared whatever the seed, unless a share is asked for."""
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert all(np.array_equal(first.validation[index][0], second.validation[index][0]) for index in range(400))
    assert sum(first.validation.images.indices) == PINNED_DIGITS
    assert len(load_data("digits", validation=0.1).validation) == 140


# --- a folder by class


def test_a_folder_by_class_is_divided(tmp_path):
    """A tenth of every class is held out, at least one image; ids follow the sorted names."""
    data = load_data(str(classes(tmp_path, b=30, a=5)))
    assert data.labels == ["a", "b"]
    assert (len(data.train), len(data.validation)) == (31, 4)
    assert {data.validation.targets.count(0), data.validation.targets.count(1)} == {1, 3}
    assert not set(names(data.train, tmp_path)) & set(names(data.validation, tmp_path))
    assert all(data.labels[data.train[index][1]] == data.train[index][0].parent.name for index in range(31))
    assert data.mirror_safe
    assert data.name == tmp_path.name


def test_the_order_of_the_file_system_changes_nothing(tmp_path):
    """Two copies made in another order are divided alike."""
    first, second = classes(tmp_path / "1", a=10, b=10), tmp_path / "2"
    for name in ("b", "a"):
        for number in reversed(range(10)):
            picture(second / name / f"{number:03}.png")
    assert names(load_data(str(first)).validation, first) == names(load_data(str(second)).validation, second)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test"])
def test_a_divided_folder_keeps_its_division(tmp_path, name, caplog):
    """`train` beside a validation part by any of its names is used as it is."""
    classes(tmp_path / "train", a=2, b=2)
    classes(tmp_path / name, b=1)
    data = load_data(str(tmp_path))
    assert data.labels == ["a", "b"]
    assert names(data.validation, tmp_path) == [f"{name}/b/000.png"]
    assert len(data.train) == 4
    assert ("so it is no test of that" in caplog.text) == (name.lower() == "test")


def test_of_two_validation_parts_the_test_part_is_left(tmp_path, caplog):
    """`val` is validated on, `test` is left alone, and that is said."""
    for part in ("train", "val", "test"):
        classes(tmp_path / part, a=2, b=2)
    assert all(name.startswith("val/") for name in names(load_data(str(tmp_path)).validation, tmp_path))
    assert "test` is not used" in caplog.text


def test_a_share_leaves_the_own_validation_part_alone(tmp_path, caplog):
    """With a share, part of `train` is validated on, and the rest can serve as a test set."""
    for part in ("train", "val"):
        classes(tmp_path / part, a=4, b=4)
    data = load_data(str(tmp_path), validation=0.25)
    assert all(name.startswith("train/") for name in names(data.validation, tmp_path))
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert "val` is not used" in caplog.text


def test_train_without_a_validation_part_is_divided(tmp_path):
    """A lone `train` is the folder of classes."""
    classes(tmp_path / "train", a=4, b=4)
    assert load_data(str(tmp_path)).labels == ["a", "b"]


def test_a_class_can_be_called_train(tmp_path):
    """Beside other classes, `train` is a vehicle."""
    assert load_data(str(classes(tmp_path, train=2, bus=2))).labels == ["bus", "train"]


def test_a_folder_with_only_a_test_part_is_refused(tmp_path):
    """`test` is not mistaken for a class."""
    classes(tmp_path / "test", a=2, b=2)
    with pytest.raises(DataError, match="must have one to train on; got only `test` in .*name the folder with the"):
        load_data(str(tmp_path))


def test_parts_without_classes_are_refused(tmp_path):
    """`train` and `test` full of loose images are not two classes."""
    classes(tmp_path, train=3, test=3)
    with pytest.raises(DataError, match="must have a folder for each class; got 3 images in `.*train`"):
        load_data(str(tmp_path))


def test_a_class_without_images_to_train_on_is_refused(tmp_path):
    """What is validated must have been taught."""
    classes(tmp_path / "train", a=2, b=2)
    classes(tmp_path / "val", a=2, c=2)
    with pytest.raises(DataError, match="must have images to train on; got `c` only in `.*val`"):
        load_data(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    """The message shows how images are laid out."""
    with pytest.raises(DataError, match=r"must have a folder for each class; got none in `.*`. Sort the images into"):
        load_data(str(tmp_path))


def test_loose_images_are_refused(tmp_path):
    """Images without class folders are counted."""
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="a folder for each class; got 1 image in"):
        load_data(str(tmp_path))


def test_one_class_is_refused_to_train_on(tmp_path):
    """There is nothing to tell apart; to evaluate on, one class is enough."""
    classes(tmp_path, a=3)
    with pytest.raises(DataError, match="at least 2 classes to be told apart; got only `a`"):
        load_data(str(tmp_path))
    assert len(load_data(str(tmp_path), validation=1).validation) == 3


def test_a_class_without_images_is_refused(tmp_path):
    """Each empty class is named, also when its files are no images."""
    classes(tmp_path, a=2, b=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"Every class must have an image; got none in `.*c`. Add images"):
        load_data(str(tmp_path))


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    """The class is named; without holding out it is fine."""
    classes(tmp_path, a=1, b=5)
    with pytest.raises(DataError, match="at least 2 images, one to train and one to validate on; got 1 in `a`"):
        load_data(str(tmp_path))
    assert len(load_data(str(tmp_path), validation=0).train) == 6


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Its classes are not silently missing."""
    root = classes(tmp_path / "root", a=2, b=2)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(root), "iterdir", refuse)
    with pytest.raises(DataError, match="A folder must be readable; got `Permission denied` at `.*root`"):
        load_data(str(root))


def test_other_files_are_announced_and_ignored(tmp_path, caplog):
    """Hidden files and folders, notes and loose images do no harm."""
    caplog.set_level(logging.INFO)
    classes(tmp_path, a=2, b=2)
    picture(tmp_path / ".cache" / "x.png")
    picture(tmp_path / "loose.png")
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "a" / "notes.txt").write_text("")
    data = load_data(str(tmp_path))
    assert data.labels == ["a", "b"]
    assert len(data.train) + len(data.validation) == 4
    assert "notes.txt" in caplog.text and "loose.png" in caplog.text and "DS_Store" not in caplog.text


def test_linked_classes_are_followed_and_loops_are_not(tmp_path, caplog):
    """A class may be a link to elsewhere, but not back to a folder it lies in."""
    root = classes(tmp_path / "root", a=2, b=2)
    classes(tmp_path / "elsewhere", c=2)
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "loop").symlink_to(tmp_path)
    assert load_data(str(root)).labels == ["a", "b", "c"]
    assert "links back" in caplog.text


def cut(path):
    """Cut an image file short, so that its header is good and its end is missing."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])


def test_bad_images_are_all_named(tmp_path):
    """Every bad image is found before training starts: the first ten by name, the others by number."""
    classes(tmp_path, a=4, b=4)
    cut(tmp_path / "a" / "cut.jpg")
    with pytest.raises(DataError, match=r"An image must be whole and readable; got .* at `.*cut.jpg`. .*`skip_bad`"):
        load_data(str(tmp_path))
    for number in range(12):
        (tmp_path / "b" / f"bad{number:02}.png").write_text("bad")
    with pytest.raises(
        DataError, match=r"got 13 that are not:\n.*cut.jpg`\n(.*bad0\d.png`\n){9}  ... and 3 more\nMend"
    ):
        load_data(str(tmp_path))


def test_bad_images_can_be_skipped(tmp_path, caplog):
    """With `skip_bad` they are left out and named in a warning; a class with nothing else is still refused."""
    classes(tmp_path, a=4, b=4)
    cut(tmp_path / "a" / "cut.jpg")
    data = load_data(str(tmp_path), skip_bad=True)
    assert len(data.train) + len(data.validation) == 8
    assert "cut.jpg" in caplog.text
    (tmp_path / "c").mkdir()
    cut(tmp_path / "c" / "cut.jpg")
    with pytest.raises(DataError, match="must have an image; got none in `.*c`"):
        load_data(str(tmp_path), skip_bad=True)


def test_of_very_many_images_only_the_headers_are_read(tmp_path, monkeypatch):
    """Beyond the limit a truncated image is found at use, in the same words, unless bad ones are to be skipped."""
    monkeypatch.setattr(folders, "NUM_DECODED_AHEAD", 3)
    classes(tmp_path, a=4, b=4)
    cut(tmp_path / "a" / "cut.jpg")
    data = load_data(str(tmp_path))
    assert len(data.train) + len(data.validation) == 9
    assert len(load_data(str(tmp_path), skip_bad=True).train) == 6
    (tmp_path / "b" / "bad.png").write_text("bad")
    with pytest.raises(DataError, match=r"got a file that is none of .* at `.*bad.png`"):
        load_data(str(tmp_path))


# --- a folder and a table


def table(root, header, *lines):
    """A CSV of labels beside a folder of images."""
    path = root.parent / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return str(path)


@pytest.fixture
def root(tmp_path):
    """A folder of eight images."""
    for number in range(8):
        picture(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def lines(*cells):
    """A line for each of the eight images, with the same further cells."""
    return [[f"{number}.png", *cells] for number in range(8)]


@pytest.mark.parametrize("column", ["image", "file", "filename", "Image"])
@pytest.mark.parametrize("separator", [";", "|", " ; "])
def test_a_table_of_several_labels(root, column, separator):
    """Names with a separator between them, none at all included."""
    rows = [[f"{number}.png", separator.join(["b", "a"][: number % 3])] for number in range(8)]
    data = load_data(str(root), labels=table(root, [column, "labels"], *rows))
    assert (data.task, data.labels) == ("multi_label", ["a", "b"])
    found = {names(part, root)[index]: part[index][1].tolist() for part in (data.train, data.validation)
             for index in range(len(part))}  # fmt: skip
    assert found["0.png"] == [0, 0] and found["1.png"] == [0, 1] and found["2.png"] == [1, 1]
    assert (len(data.train), len(data.validation)) == (7, 1)


def test_a_table_with_a_column_for_each_label(root):
    """The order of the columns is the order of the labels."""
    rows = [[f"{number}.png", number % 2, 1] for number in range(8)]
    data = load_data(str(root), labels=table(root, ["image", "z", "a"], *rows), validation=0)
    assert (data.task, data.labels) == ("multi_label", ["z", "a"])
    assert data.train[3][1].tolist() == [1, 1] and data.train[4][1].tolist() == [0, 1]


def test_a_table_with_one_label_each(root):
    """A column `label` makes it a single-label task."""
    rows = [[f"{number}.png", "ab"[number % 2]] for number in range(8)]
    data = load_data(str(root), labels=table(root, ["image", "label"], *rows), validation=0)
    assert (data.task, data.train[3][1]) == ("single_label", 1)


def test_a_table_can_divide(root, caplog):
    """A column `split` says what is validated on; with a share it is left alone."""
    rows = [[f"{number}.png", "ab"[number % 2], "val" if number < 3 else "train"] for number in range(8)]
    path = table(root, ["image", "label", "split"], *rows)
    data = load_data(str(root), labels=path)
    assert names(data.validation, root) == ["0.png", "1.png", "2.png"]
    assert len(data.train) == 5
    assert len(load_data(str(root), labels=path, validation=0.4).validation) == 2
    assert "not used" in caplog.text


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["picture", "labels"], lines("a"), "must name one column of images .* got `picture`, `labels` at"),
        (["image"], lines(), "none of them twice; got `image` at"),
        (["image", "a", "a"], lines(1, 1), "none of them twice; got"),
        (["image", "labels"], [], "must have a line for each image; got none"),
        (["image", "labels"], [*lines("a")[:7], ["7.png"]], "got 1 instead of 2 at line 9"),
        (["image", "labels"], lines("a;;b"), "Labels must be different names .*; got `a;;b` at line 2"),
        (["image", "labels"], lines("a;a"), "Labels must be different names"),
        (["image", "labels"], lines(""), "must name at least 1 labels; got none"),
        (["image", "label"], lines("a"), "must name at least 2 labels; got `a`"),
        (["image", "label"], lines(""), "Every image must have a label; got an empty cell at line 2"),
        (["image", "a"], lines(2), "must have 0 or 1; got `2` in `a` at line 2"),
        (["image", "a", "b"], lines(1, 0), "Every label must be on an image to train on; got none for `b`"),
        (["image", "labels", "split"], lines("a", "x"), "must be `train` or `validation`; got `x` at line 2"),
        (["image", "labels"], [["../0.png", "a"], *lines("a")[1:]], "by its path below `.*`; got `../0.png` at line 2"),
        (["image", "labels"], [*lines("a"), ["0.png", "b"]], r"must be named once; got 1 named more than once at"),
        (["image", "labels"], lines("a")[1:], r"got 1 images that are there but not named:\n.*0.png\nCorrect"),
        (["image", "labels"], [*lines("a"), ["9.png", "b"]], r"got 1 images that are named but missing:\n.*9.png\n"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_refused(root, header, rows, message):
    """Each mistake is named with its line."""
    with pytest.raises(DataError, match=message):
        load_data(str(root), labels=table(root, header, *rows))


def test_a_table_that_disagrees_with_the_folder_can_be_cut(root, caplog):
    """With `skip_bad` the images in both are used, without the bad ones."""
    cut(root / "3.png")
    path = table(root, ["image", "labels"], *lines("a")[1:], ["9.png", "a"])
    data = load_data(str(root), labels=path, skip_bad=True, validation=0)
    assert names(data.train, root) == [f"{number}.png" for number in (1, 2, 4, 5, 6, 7)]
    assert "9.png" in caplog.text and "0.png" in caplog.text and "3.png" in caplog.text


def test_a_label_on_one_image_is_trained_on(root):
    """What only one image shows is not held out; if that is all of them, nothing can be."""
    path = table(root, ["image", "labels"], *[[f"{number}.png", f"l{number}"] for number in range(8)])
    with pytest.raises(DataError, match="only if each of its labels is on another one; got none of 8 images"):
        load_data(str(root), labels=path)


def test_a_table_in_another_encoding_is_refused(root):
    """Text that is not UTF-8 is not guessed at."""
    path = root.parent / "labels.csv"
    path.write_bytes("image,labels\n0.png,\xe4".encode("latin-1"))
    with pytest.raises(DataError, match="must be a CSV in UTF-8; got `'utf-8' codec"):
        load_data(str(root), labels=str(path))


def test_a_table_with_a_byte_order_mark_is_read(root):
    """What spreadsheets write is read."""
    path = root.parent / "labels.csv"
    path.write_text("\n".join(["image,labels", *(",".join(line) for line in lines("a"))]), encoding="utf-8-sig")
    assert load_data(str(root), labels=str(path)).labels == ["a"]


# --- the `datasets` library


def saved(path, *, column="label", feature=None, values=(0, 1), more=(), parts=None):
    """A small data set of the `datasets` library, saved."""
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(8)]
    feature = feature or datasets.ClassLabel(names=["a", "b"])
    content = {"picture": images, column: list(values) * (8 // len(values))}
    features = {"picture": datasets.Image(), column: feature}
    for name, kind, value in more:
        content[name], features[name] = [value] * 8, kind
    data = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    (datasets.DatasetDict(dict.fromkeys(parts, data)) if parts else data).save_to_disk(str(path))
    return str(path)


def test_a_saved_data_set_is_divided(tmp_path):
    """Its images are decoded by ours, its labels named by its features."""
    data = load_data(saved(tmp_path / "d"))
    assert (data.labels, data.task, data.name) == (["a", "b"], "single_label", "d")
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert [data.train[index][1] for index in range(6)] == data.train.targets
    assert data.train[0][0].name.startswith("d, row ")


def test_a_saved_data_set_keeps_its_division(tmp_path, caplog):
    """Of its parts one is trained on and one validated on."""
    data = load_data(saved(tmp_path / "d", parts=["train", "validation", "test"]))
    assert (len(data.train), len(data.validation)) == (8, 8)
    assert "`test` is not used" in caplog.text
    assert len(load_data(str(tmp_path / "d"), validation=0.25).train) == 6


@pytest.mark.parametrize(
    ("feature", "values", "labels", "task"),
    [
        (datasets.Value("string"), ("dog", "cat"), ["cat", "dog"], "single_label"),
        (datasets.Value("int64"), (10, 9), ["9", "10"], "single_label"),
        (datasets.List(datasets.ClassLabel(names=["x", "y"])), ([0, 1], []), ["x", "y"], "multi_label"),
        (datasets.List(datasets.Value("string")), (["p"], ["q", "p"]), ["p", "q"], "multi_label"),
    ],
)
def test_labels_of_every_type_are_read(tmp_path, feature, values, labels, task):
    """Text and integers are sorted into labels; lists of them make a multi-label task."""
    data = load_data(saved(tmp_path / "d", feature=feature, values=values), validation=0)
    assert (data.labels, data.task) == (labels, task)
    if task == "multi_label":
        wanted = [[labels.index(value) if isinstance(value, str) else value for value in cell] for cell in values]
        assert [list(np.flatnonzero(data.train[index][1])) for index in (0, 1)] == [sorted(cell) for cell in wanted]


def test_fine_and_coarse_columns(tmp_path):
    """Fine labels unless coarse ones are asked for."""
    more = [("coarse_label", datasets.ClassLabel(names=["x", "y", "z"]), 1)]
    path = saved(tmp_path / "d", column="fine_label", more=more)
    assert load_data(path).labels == ["a", "b"]
    assert load_data(path, labels="coarse", validation=0).labels == ["x", "y", "z"]
    assert load_data(path, label_column="coarse_label", validation=0).labels == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"more": [("breed", datasets.ClassLabel(names=["x"]), 0)]}, {},
         "must have one column of labels; got `label`, `breed` in `d`. Choose one with `label_column`"),
        ({"column": "size", "feature": datasets.Value("int64")}, {}, "got none among `picture`, `size` in `d`"),
        ({}, {"label_column": "lable"}, "must name a column; got `lable` for `d`. Did you mean `label`"),
        ({}, {"label_column": "picture"}, "must hold text, integers or `ClassLabel`, or lists of them; got"),
        ({}, {"image_column": "label"}, "must name a column of images; got `label` for `d`. Known: `picture`"),
        ({"parts": ["a", "b"]}, {}, "must call one of them `train`; got `a`, `b` in `d`"),
        ({"values": (0, -1)}, {}, "got `-1` in `label` at row 1 of `d`"),
        ({"feature": datasets.Value("string"), "values": ("a", None)}, {}, "got `None` in `label` at row 1"),
        ({"feature": datasets.Value("string"), "values": ("a",)}, {}, "got 8 images of `a` in `d`"),
    ],
)  # fmt: skip
def test_a_saved_data_set_that_does_not_fit_is_refused(tmp_path, options, arguments, message):
    """Each reason names the columns, parts or rows."""
    with pytest.raises(DataError, match=message):
        load_data(saved(tmp_path / "d", **options), **arguments)


def test_a_label_only_in_validation_is_refused(tmp_path):
    """What is validated must have been taught."""
    feature = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("string")})
    image = Image.new("RGB", (4, 4))
    parts = {part: datasets.Dataset.from_dict({"picture": [image] * 2, "label": labels}, features=feature)
             for part, labels in (("train", ["a", "b"]), ("test", ["a", "c"]))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="labels of those to train on; got `c` in `label` at row 1 of `d`"):
        load_data(str(tmp_path / "d"))


def test_a_saved_data_set_without_images_is_refused(tmp_path):
    """The columns that are there are named."""
    datasets.Dataset.from_dict({"text": ["x"], "label": [0]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="must have a column of images; got `text`, `label` in `d`"):
        load_data(str(tmp_path / "d"))


def test_the_first_of_several_image_columns_is_used(tmp_path, caplog):
    """And the choice is announced; another can be named."""
    path = saved(tmp_path / "d", more=[("mask", datasets.Image(), Image.new("L", (1, 1)))])
    assert len(load_data(path, image_column="mask").train) == 6
    assert "first is used" not in caplog.text
    load_data(path)
    assert "`picture`, `mask`, the first is used" in caplog.text


def test_bad_rows_are_named_or_skipped(tmp_path, caplog):
    """A row without an image, and one with half of one, are bad images."""
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    cells = [{"bytes": data, "path": None} for data in [png(good)] * 4 + [png(good)[:-200]]] + [None]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 3}, features=features)
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"got 2 that are not:\n.* at `d, row 4`\n.* at `d, row 5`"):
        load_data(str(tmp_path / "d"))
    assert len(load_data(str(tmp_path / "d"), skip_bad=True, validation=0).train) == 4
    assert "row 5" in caplog.text


def png(image):
    """The bytes of a PNG."""
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_unseen_labels_are_announced(tmp_path, caplog):
    """A label that the type names and no image shows does no harm, but is said."""
    load_data(saved(tmp_path / "d", feature=datasets.ClassLabel(names=["a", "b", "c"])))
    assert "No image in `d` shows `c`" in caplog.text


def test_a_damaged_saved_data_set_is_refused(tmp_path):
    """One line, without the library's traceback."""
    path = saved(tmp_path / "d")
    (tmp_path / "d" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="A saved data set must be whole; got `.*` at `.*d`") as caught:
        load_data(path)
    assert caught.value.__context__ is None


def test_a_data_set_of_the_hub(monkeypatch, tmp_path):
    """The id, and after a colon the configuration, go to the library."""
    asked = []
    data = datasets.load_from_disk(saved(tmp_path / "d"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or data)
    assert load_data("owner/pets").name == "owner/pets"
    load_data("owner/pets:tiny")
    assert asked == [(("owner/pets",), {"name": None}), (("owner/pets",), {"name": "tiny"})]


def test_an_unreachable_data_set_is_one_sentence():
    """Offline or unknown: no chain of the library's errors."""
    with pytest.raises(
        DataError, match="Hub; got `owner/nowhere`: no such folder is here, and the Hub could not be reached"
    ) as caught:
        load_data("owner/nowhere")
    assert caught.value.__context__ is None


# --- which source it is


def test_a_source_of_no_known_form_is_refused_with_all_forms(tmp_path):
    """Nothing there, and another sort of file."""
    with pytest.raises(
        DataError, match=r"got nothing at `.*nowhere`(.|\n)*digits(.|\n)*cifar-100(.|\n)*save_to_disk(.|\n)*Hub"
    ):
        load_data(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"got another sort of file at `.*notes.txt`"):
        load_data(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "coarse"}, "`labels=` is for CIFAR-100 and data sets with such a column only; got `coarse` with"),
        ({"labels": "corse"}, "must be `auto`, `fine`, `coarse` or the path of a CSV; got `corse`.* mean `coarse`"),
        ({"image_column": "x"}, "`image_column` is for data sets with columns only; got `x` with `digits`"),
        ({"label_column": "x"}, "`label_column` is for data sets with columns only"),
        ({"label_column": "x", "labels": "fine"}, "3 problems"),
        ({"validation": 1.5}, "must be a share from 0 to 1; got 1.5"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options, message):
    """An option has an effect or is an error."""
    with pytest.raises(DataError, match=message):
        load_data("digits", **options)


def test_a_table_is_for_folders(root):
    """A CSV of labels beside another source is refused."""
    with pytest.raises(
        DataError, match="A CSV in `labels=` is for a folder of images only; got `.*labels.csv` with `digits`"
    ):
        load_data("digits", labels=table(root, ["image", "labels"], *lines("a")))


def test_divide_uses_the_own_part():
    """Without a share the source's own division stands."""
    train, own = Examples([b""] * 4, [0, 0, 1, 1], 2), Examples([b""], [1], 2)
    assert divide("x", ["a", "b"], train, own, share=None, seed=0) == (train, own)


PINNED_HELD_OUT = [7, 12, 14, 15]
PINNED_DIGITS = 364093


# --- fewer images to train on


def test_fewer_images_are_trained_on_in_the_shares_of_the_labels_and_as_many_validated_on(tmp_path):
    root = classes(tmp_path, many=40, few=20, rare=2)
    whole = load_data(str(root), validation=0.5)
    made = load_data(str(root), validation=0.5, num_train=10)
    assert len(made.train) == 10
    counts = {label: made.train.targets.count(number) for number, label in enumerate(made.labels)}
    assert counts == {"many": 6, "few": 3, "rare": 1}
    assert names(made.validation, root) == names(whole.validation, root)
    assert set(names(made.train, root)) < set(names(whole.train, root))


def test_exactly_so_many_images_are_trained_on_whatever_the_labels_are(tmp_path):
    """Of many labels the shares come out by one or two more or less."""
    root = classes(tmp_path, **{f"c{n}": n + 2 for n in range(6)})
    for number in range(6, 22):
        made = load_data(str(root), validation=0.2, num_train=number)
        assert len(made.train) == number
        assert set(made.train.targets) == set(range(6))


@pytest.mark.parametrize("number", [1, 32])
def test_as_many_images_as_there_are_labels_at_least_and_no_more_than_there_are(tmp_path, number):
    root = classes(tmp_path, many=40, few=20, rare=2)
    with pytest.raises(DataError, match=r"`num_train` must be at least the 3 labels and at most the 31 images"):
        load_data(str(root), validation=0.5, num_train=number)

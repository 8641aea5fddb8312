"""What a model reads: exactly its own processing, and variations that depend on seed, epoch and index alone."""

import io
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from inarch.core.errors import ConfigError, DataError
from inarch.data import load_data
from inarch.data.examples import Examples, ImageData
from inarch.data.images import EncodedImage
from inarch.data.preprocessing import Geometry, Preprocessing
from inarch.data.transforms import (
    Augmentation,
    FinishedSamples,
    ImageDataset,
    _random_box,
    batches,
    collate,
    sample_generator,
    vary,
)

PROCESSORS = {
    "vit": ViTImageProcessorPil,
    "vit-32": lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}),
    "vit-oblong": lambda: ViTImageProcessorPil(size={"height": 33, "width": 57}, do_normalize=False),
    "vit-unscaled": lambda: ViTImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False),
    "vit-as-it-is": lambda: ViTImageProcessorPil(do_resize=False),
    "clip": CLIPImageProcessorPil,
    "clip-padded": lambda: CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 48, "width": 50}),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
    "deit": DeiTImageProcessorPil,
    "beit": BeitImageProcessorPil,
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
    "convnext-384": ConvNextImageProcessorPil,
}
SIZES = [(8, 8), (32, 32), (31, 77), (200, 61), (640, 480), (3, 1), (1, 40)]


def noise(width, height, seed=0):
    """A random image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def small_processor(width=16):
    """A processor that is quick."""
    return ViTImageProcessorPil(size={"height": width, "width": width})


def examples(count=12, size=(10, 8)):
    """Random images of two classes."""
    return Examples([noise(*size, seed=number) for number in range(count)], [n % 2 for n in range(count)], 2)


VARIED = Augmentation(crop=0.6, flip=True)


# --- processing


@pytest.mark.parametrize("name", PROCESSORS)
def test_processing_agrees_with_the_processor(name):
    """Whatever the size of the image, the result is the processor's own to 1e-6."""
    processor = PROCESSORS[name]()
    ours = Preprocessing(processor)
    assert ours.is_direct == (name not in ("convnext", "convnext-384", "clip-padded"))
    for size in SIZES:
        image = noise(*size)
        wanted = processor(images=[image], return_tensors="pt")["pixel_values"][0].float()
        got = ours(image)
        assert got.dtype == torch.float32 and got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=0, atol=1e-6)
        assert ours.shape is None or got.shape == ours.shape


def test_the_fast_way_is_the_same_bit_for_bit():
    """Not only close: a table made by the processor gives its very numbers."""
    processor = PROCESSORS["vit"]()
    image = noise(50, 60)
    assert torch.equal(
        Preprocessing(processor)(image), processor(images=[image], return_tensors="pt")["pixel_values"][0]
    )


def test_the_shape_is_known_where_it_is_fixed():
    """Processors that resize to a size or crop have one shape, one that leaves the size has none."""
    shapes = {name: Preprocessing(PROCESSORS[name]()).shape for name in ("vit", "clip", "convnext", "vit-as-it-is")}
    assert shapes == {"vit": (3, 224, 224), "clip": (3, 224, 224), "convnext": (3, 64, 64), "vit-as-it-is": None}


class Odd:
    """A processor that is nobody's: it has fields, and does something else."""

    size = {"height": 8, "width": 8}  # noqa: RUF012
    do_resize, do_center_crop, resample = True, False, 2

    def __call__(self, images, *, return_tensors, **_):
        pixels = np.asarray(images[0].resize((8, 8), 2)).transpose(2, 0, 1).astype(np.float32)
        return {"pixel_values": torch.from_numpy(pixels + pixels.mean())[None]}


def test_a_processor_that_does_something_else_is_called_itself():
    """Its fields are believed only after its answers agree."""
    ours = Preprocessing(Odd())
    assert not ours.is_direct and ours.geometry == Geometry()
    assert torch.equal(ours(noise(9, 9)), Odd()([noise(9, 9)], return_tensors="pt")["pixel_values"][0])


class Strict:
    """A processor without fields that takes no options."""

    def __call__(self, images, *, return_tensors):
        return {"pixel_values": torch.zeros(1, 3, images[0].height, images[0].width, dtype=torch.float64)}


def test_a_processor_without_fields_is_called_itself():
    """Nothing is asked of a processor but to be called."""
    ours = Preprocessing(Strict())
    assert not ours.is_direct and ours.shape is None
    assert ours(noise(5, 4)).shape == (3, 4, 5) and ours(noise(5, 4)).dtype == torch.float32


def test_a_processor_of_other_things_is_refused():
    """Several tensors for one image are not for a classifier."""

    def patches(**_):
        return {"pixel_values": torch.zeros(1, 5, 3, 8, 8)}

    with pytest.raises(
        DataError, match=r"one tensor \(1, C, H, W\) of one image; got \(1, 5, 3, 8, 8\) from `function`"
    ):
        Preprocessing(patches)


def test_an_image_that_the_processor_refuses_is_named():
    """The processor's reason and the source; no chain of errors."""
    ours = Preprocessing(PROCESSORS["clip"]())
    source = EncodedImage(b"", "panorama")
    with pytest.raises(
        DataError, match="got `an image 500000 x 1, too long to be resized to 224 across` at `panorama`"
    ) as caught:
        ours.named(Image.new("RGB", (500_000, 1)), source)
    assert caught.value.__context__ is None


# --- variations


@given(st.integers(1, 70), st.integers(1, 70), st.floats(0.01, 1), st.floats(1, 4), st.integers(0, 10**6))
def test_every_crop_fits_and_keeps_its_share(width, height, crop, stretch, index):
    """The box lies in the image, its area is at least the share asked for and its ratio within the limit."""
    box = _random_box(
        (width, height), Augmentation(crop=crop, stretch=stretch, flip=False), sample_generator(0, 0, index)
    )
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (right - left) * (bottom - top) >= crop * width * height * (1 - 1e-9) - 1e-9
    change = (right - left) / (bottom - top) / (width / height)
    assert 1 / stretch * (1 - 1e-6) <= change <= stretch * (1 + 1e-6)


def test_crops_cover_the_range():
    """Areas reach from the smallest share to everything, and half of the images are mirrored."""
    areas, mirrored = [], 0
    for index in range(2000):
        generator = sample_generator(3, 1, index)
        left, top, right, bottom = _random_box((100, 50), VARIED, generator)
        areas.append((right - left) * (bottom - top) / 5000)
        mirrored += generator.random() < 0.5
    assert min(areas) < 0.61 and max(areas) > 0.99 and abs(np.mean(areas) - 0.8) < 0.02
    assert abs(mirrored - 1000) < 100


def test_turning_mirroring_off_changes_no_crop():
    """Each image is the same or mirrored."""
    image, geometry = noise(20, 30), Geometry(size=(16, 16))
    for index in range(20):
        plain = vary(image, Augmentation(crop=0.5, flip=False), sample_generator(0, 0, index), geometry)
        varied = vary(image, Augmentation(crop=0.5, flip=True), sample_generator(0, 0, index), geometry)
        mirrored = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert varied.tobytes() in (plain.tobytes(), mirrored.tobytes())


def test_a_variation_has_the_size_that_processing_asks_for():
    """So that an image is resized once, not twice."""
    generator = random.Random(0)
    assert vary(noise(8, 8), VARIED, generator, Geometry(size=(32, 16))).size == (32, 16)
    assert min(vary(noise(80, 60), VARIED, generator, Geometry(shortest=24, crop=(20, 20))).size) == 24
    width, height = vary(noise(80, 60), VARIED, generator, Geometry()).size
    assert width < 80 and height < 60


def test_without_anything_to_vary_an_image_stays():
    """A crop of everything is the image."""
    image = noise(9, 7)
    assert vary(image, Augmentation(crop=1, flip=False), random.Random(0), Geometry()) is image


def test_the_random_numbers_are_pinned():
    """A training that is resumed with another version of Python or of ours goes on with the same variations."""
    assert [
        round(sample_generator(0, 1, 2).random(), 6),
        round(sample_generator(7, 0, 0).random(), 6),
    ] == PINNED_NUMBERS


def test_the_choices_left_to_the_data():
    """Digits are not mirrored and hardly cropped; what the user says stands."""
    digits = load_data("digits")
    photos = ImageData(name="x", task="single_label", labels=["a", "b"], train=examples(), validation=examples())
    assert (Augmentation().suited(digits).crop, Augmentation().suited(digits).flip) == (0.85, False)
    assert (Augmentation().suited(photos).crop, Augmentation().suited(photos).flip) == (0.6, True)
    assert (Augmentation(crop=0.3, flip=True).suited(digits).crop, Augmentation(flip=True).suited(digits).flip) == (
        0.3,
        True,
    )
    assert Augmentation(crop=1, flip=False).is_off() and not VARIED.is_off()


def test_an_augmentation_out_of_range_is_refused():
    """The message names the field and its range."""
    with pytest.raises(ConfigError, match="`Augmentation.crop` must be at most 1; got 2"):
        Augmentation(crop=2)
    with pytest.raises(ConfigError, match="`Augmentation.stretch` must be at least 1; got 0.5"):
        Augmentation(stretch=0.5)


# --- samples


def test_a_sample_is_what_a_model_reads():
    """A float tensor and the id of the label, or a vector of floats for several."""
    sample = ImageDataset(examples(), small_processor())[3]
    assert sample["pixel_values"].shape == (3, 16, 16) and sample["pixel_values"].dtype == torch.float32
    assert sample["labels"] == 1
    several = Examples([noise(4, 4)], [(0, 2)], 3)
    assert ImageDataset(several, small_processor())[0]["labels"].tolist() == [1.0, 0.0, 1.0]


def test_samples_without_augmentation_are_the_processors():
    """With and without the cache, the first time and the second."""
    processor, some = small_processor(), examples()
    for cache_bytes in (0, 2**20):
        dataset = ImageDataset(some, processor, cache_bytes=cache_bytes)
        for index in (5, 0, 5):
            wanted = processor(images=[some[index][0]], return_tensors="pt")["pixel_values"][0]
            assert torch.equal(dataset[index]["pixel_values"], wanted)


def test_a_sample_changed_in_place_is_not_changed_for_good():
    """The cache hands out copies."""
    dataset = ImageDataset(examples(), small_processor())
    before = dataset[0]["pixel_values"].clone()
    dataset[0]["pixel_values"].zero_()
    assert torch.equal(dataset[0]["pixel_values"], before)


def test_an_image_is_processed_once_where_all_fit(monkeypatch):
    """Not again in the next epoch."""
    dataset = ImageDataset(examples(), small_processor())
    calls = []
    monkeypatch.setattr(Preprocessing, "__call__", lambda *_: calls.append(1) or torch.zeros(3, 16, 16))
    for _ in range(3):
        assert len([dataset[index] for index in range(len(dataset))]) == 12
    assert len(calls) == 12


def test_an_index_beyond_the_end_is_refused():
    """And a negative one counts from the end, to the same sample."""
    dataset = ImageDataset(examples(), small_processor(), augmentation=VARIED)
    assert torch.equal(dataset[-1]["pixel_values"], dataset[11]["pixel_values"])
    with pytest.raises(IndexError):
        dataset[12]


def test_an_augmentation_that_is_not_suited_is_refused():
    """A choice left to the data needs the data."""
    with pytest.raises(DataError, match=r"must be suited to its data; .* Pass `augmentation.suited\(data\)`"):
        ImageDataset(examples(), small_processor(), augmentation=Augmentation())


@settings(max_examples=15)
@given(st.integers(0, 5), st.integers(0, 5), st.permutations(range(6)))
def test_seed_epoch_and_index_determine_a_sample(seed, epoch, order):
    """Whatever was read before, in whatever order, by whichever data set."""
    some = examples(6)
    first = ImageDataset(some, PROCESSOR, augmentation=VARIED, seed=seed)
    second = ImageDataset(some, PROCESSOR, augmentation=VARIED, seed=seed)
    first.set_epoch(epoch)
    wanted = [first[index]["pixel_values"] for index in range(6)]
    second.set_epoch(epoch + 1)
    changed = [second[index]["pixel_values"] for index in range(6)]
    second.set_epoch(epoch)
    for index in order:
        assert torch.equal(second[index]["pixel_values"], wanted[index])
    assert sum(torch.equal(one, other) for one, other in zip(wanted, changed, strict=True)) <= 1


def read_epoch(loader):
    """All samples of an epoch, by index."""
    return torch.cat([batch["pixel_values"] for batch in loader])


@pytest.mark.parametrize("persistent", [True, False])
def test_the_epoch_reaches_the_workers(persistent):
    """Workers that persist and workers made anew give what the main process gives, in every epoch."""
    some = examples()
    alone = ImageDataset(some, PROCESSOR, augmentation=VARIED, seed=1)
    dataset = ImageDataset(some, PROCESSOR, augmentation=VARIED, seed=1)
    loader = DataLoader(dataset, batch_size=5, num_workers=2, persistent_workers=persistent, collate_fn=collate)
    seen = []
    for epoch in (0, 1, 2, 1):
        alone.set_epoch(epoch)
        dataset.set_epoch(epoch)
        seen.append(read_epoch(loader))
        assert torch.equal(seen[-1], read_epoch(DataLoader(alone, batch_size=3, collate_fn=collate)))
    assert torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


def test_the_epoch_reaches_workers_that_are_sent_the_data_set():
    """A worker that is started afresh, not forked, is sent a data set that shares epoch and cache with this one."""
    dataset = ImageDataset(examples(), small_processor())
    sent = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    dataset.set_epoch(7)
    assert int(sent._epoch) == 7
    sent[3]
    assert 3 in dataset._finished


def test_workers_fill_one_cache():
    """What a worker has processed the main process need not."""
    dataset = ImageDataset(examples(), small_processor())
    read_epoch(DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=collate))
    assert dataset._finished.is_filled.all()


def test_a_cache_too_large_is_not_made():
    """Nor one for samples that change or differ in size."""
    assert ImageDataset(examples(), small_processor(), cache_bytes=12 * 4 * 3 * 256 - 1)._finished is None
    assert ImageDataset(examples(), small_processor(), cache_bytes=12 * 4 * 3 * 256)._finished is not None
    assert ImageDataset(examples(), small_processor(), augmentation=VARIED)._finished is None
    assert ImageDataset(examples(), PROCESSORS["vit-as-it-is"]())._finished is None


def test_without_shared_memory_the_cache_is_private(monkeypatch):
    """A small container costs speed, not the training."""

    def refuse(self):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    cache = FinishedSamples(2, (1,))
    assert 0 not in cache
    cache[0] = torch.ones(1)
    assert 0 in cache and cache[0].item() == 1


def test_decoded_images_are_kept_within_the_limit():
    """With augmentation an image file is decoded once if as many of its size fit."""
    stream = io.BytesIO()
    noise(10, 8).save(stream, "PNG")
    some = Examples([EncodedImage(stream.getvalue(), str(n)) for n in range(4)], [0, 1, 0, 1], 2)
    kept = ImageDataset(some, small_processor(), augmentation=VARIED, cache_bytes=4 * 240)
    dropped = ImageDataset(some, small_processor(), augmentation=VARIED, cache_bytes=4 * 240 - 1)
    assert torch.equal(kept[1]["pixel_values"], dropped[1]["pixel_values"])
    assert (list(kept._decoded), list(dropped._decoded)) == ([1], [])
    assert pickle.loads(pickle.dumps(kept))._decoded == {}


def test_a_bad_image_is_named_from_a_worker():
    """An image that breaks at use gives the same words through a data loader."""
    some = Examples([noise(4, 4), EncodedImage(b"x", "row 1")], [0, 1], 2)
    samples = iter(DataLoader(ImageDataset(some, small_processor()), num_workers=1, collate_fn=collate))
    next(samples)
    with pytest.raises(DataError, match="An image must be whole and readable; got a file that is none of .* `row 1`"):
        next(samples)
    samples._shutdown_workers()  # the error holds on to them until the garbage is collected, which then takes seconds


def test_a_batch_of_several_labels_is_float():
    """As the loss of a multi-label task takes them; ids are integers, and labels may be missing."""
    pixels = torch.zeros(3, 2, 2)
    several = collate([{"pixel_values": pixels, "labels": torch.tensor([1.0, 0.0])}] * 2)
    assert several["labels"].dtype == torch.float32 and several["labels"].shape == (2, 2)
    single = collate([{"pixel_values": pixels, "labels": 1}] * 2)
    assert single["labels"].dtype == torch.int64 and single["pixel_values"].shape == (2, 3, 2, 2)
    assert collate([{"pixel_values": pixels}]).keys() == {"pixel_values"}


def test_images_of_several_sizes_make_no_batch():
    """The message says what to set on the processor."""
    dataset = ImageDataset(Examples([noise(4, 4), noise(5, 4)], [0, 1], 2), PROCESSORS["vit-as-it-is"]())
    with pytest.raises(
        DataError, match=r"images of one size; got \(3, 4, 4\) and \(3, 4, 5\) from the image processor"
    ):
        collate([dataset[0], dataset[1]])


# --- batches to predict


def files(folder, count):
    """Image files."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        noise(6, 5, seed=number).save(path)
    return paths


def test_batches_keep_the_order_and_the_sources(tmp_path):
    """Every image once, with its path, processed as the processor does."""
    paths, processor = files(tmp_path, 5), small_processor()
    found = list(batches(paths, processor, 2))
    picked = list(batches(Examples(paths, [0] * 5, 2).pick([4, 0]).images, processor, 2))
    assert [sources for sources, _ in picked] == [[paths[4], paths[0]]]
    assert [sources for sources, _ in found] == [paths[:2], paths[2:4], paths[4:]]
    wanted = processor(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([pixel_values for _, pixel_values in found]), wanted)


def test_batches_are_read_when_asked_for(tmp_path):
    """Only the batch in use is read: an image that comes later may not even be there yet."""
    paths = files(tmp_path, 2)
    stream = batches([*paths, tmp_path / "late.png"], small_processor(), 2)
    assert len(next(stream)[0]) == 2
    noise(6, 5).save(tmp_path / "late.png")
    assert next(stream)[0] == [tmp_path / "late.png"]


def test_bad_images_in_batches_are_refused_or_left_out(tmp_path, caplog):
    """All bad images of the batch are named; with `skip_bad` the others come, and no batch is empty."""
    paths = files(tmp_path, 4)
    paths[1].write_text("bad")
    paths[2].write_text("bad")
    paths[3].write_text("bad")
    with pytest.raises(DataError, match="got a file that is none of .* at `.*1.png`"):
        list(batches(paths, small_processor(), 2))
    with pytest.raises(DataError, match=r"got 3 that are not:\n.*1.png`\n.*2.png`\n.*3.png`\nMend or remove"):
        list(batches(paths, small_processor(), 4))
    assert [sources for sources, _ in batches(paths, small_processor(), 2, skip_bad=True)] == [paths[:1]]
    assert "3.png" in caplog.text


def test_threads_end_with_the_stream(tmp_path):
    """Whoever stops early leaves nothing running."""
    before = threading.active_count()
    stream = batches(files(tmp_path, 4), small_processor(), 1)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_nothing_heavy_is_imported_before_it_is_needed():
    """Reading images needs neither the library of data sets nor scikit-learn nor transformers."""
    code = (
        "import sys; import inarch.data, inarch.data.transforms; "
        "print([name for name in ('datasets', 'sklearn', 'torchvision') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert answer.stdout.strip() == "[]"


PROCESSOR = Preprocessing(small_processor())
PINNED_NUMBERS = [0.708028, 0.862028]

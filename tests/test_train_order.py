"""The order of the training images, and its division among processes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from inarch.train.order import IGNORED, Blank, Order, SlicedBatches, WithBlanks, num_batches


def slices(number, batch, processes, accumulation, epoch=0):
    """By process: the slices it sees."""
    made = []
    for process in range(processes):
        batches = SlicedBatches(
            Order(number, seed=3), batch, processes=processes, process=process, accumulation=accumulation
        )
        batches.set_epoch(epoch)
        made.append(list(batches))
        assert len(made[-1]) == len(batches) == num_batches(range(number), batch) * accumulation
    return made


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_any_number_of_processes_sees_the_same_batches(number, processes, accumulation, size, epoch):
    batch = size * processes * accumulation
    (alone,) = slices(number, batch, 1, 1, epoch)
    together = slices(number, batch, processes, accumulation, epoch)
    for step, whole in enumerate(alone):
        parts = [
            index
            for part in range(accumulation)
            for mine in together
            for index in mine[step * accumulation + part]
            if not isinstance(index, Blank)
        ]
        assert parts == whole
    assert all(mine for process in together for mine in process)
    assert all(len(mine) <= size for process in together for mine in process)


@given(st.integers(1, 50))
def test_an_epoch_sees_every_image_once(number):
    (batches,) = slices(number, 8, 1, 1)
    assert sorted(index for batch in batches for index in batch) == list(range(number))


def test_the_order_is_a_function_of_seed_and_epoch():
    order = Order(40, seed=0)
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(Order(40, seed=1)) != first


def test_epochs_of_one_seed_are_not_those_of_the_next():
    later = Order(40, seed=0)
    later.set_epoch(1)
    assert list(later) != list(Order(40, seed=1))


def test_a_blank_is_a_sample_whose_labels_no_loss_counts():
    class Samples:
        labels = (3, torch.tensor([1.0, 0.0]))

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"pixel_values": torch.ones(1), "labels": self.labels[index]}

    samples = WithBlanks(Samples())
    assert len(samples) == 2
    assert samples[0]["labels"] == 3
    assert samples[Blank(0)]["labels"] == IGNORED
    assert samples[Blank(1)]["labels"].tolist() == [IGNORED, IGNORED]
    assert samples[1]["labels"].tolist() == [1, 0]

from __future__ import annotations

import logging
from collections import UserDict

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.errors import CalibrationError, GraphError, OptionError
from fxprune.graph.call import Inputs


def numbered(count: int, *, size: int = 4) -> Tensor:
    """Images whose every pixel is their number."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, size, size).clone()


def numbers(inputs: Inputs) -> list[int]:
    return [int(value) for value in inputs.tensors()[0][:, 0, 0, 0]]


def test_a_short_loader_is_taken_whole_and_in_order() -> None:
    images = draw(list(numbered(10).split(4)), limit=50)
    assert numbers(images.inputs) == list(range(10))
    assert images.size == len(images) == 10


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_draw_is_random_seeded_and_independent_of_the_batch_size(batch_size: int) -> None:
    everything = numbered(100)
    drawn = numbers(draw(everything.split(batch_size), limit=20, seed=3).inputs)
    assert drawn == numbers(draw(everything, limit=20, seed=3).inputs)
    assert len(set(drawn)) == 20
    assert max(drawn) > 60
    assert drawn != numbers(draw(everything, limit=20, seed=4).inputs)


def test_every_image_is_about_equally_likely_to_be_drawn() -> None:
    counts = torch.zeros(40)
    for seed in range(400):
        counts[numbers(draw(numbered(40, size=1).split(8), limit=10, seed=seed).inputs)] += 1
    # 100 expected each, standard deviation 8.7
    assert counts.min() > 60 and counts.max() < 140


def test_an_endless_loader_is_read_only_so_far() -> None:
    batches = 0

    def endless():
        nonlocal batches
        while True:
            batches += 1
            yield numbered(5)

    assert draw(endless(), limit=10).size == 10
    assert batches == 40


class Counting(Dataset):
    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.full((3, 4, 4), float(index)), 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_below_a_loader_is_read_only_where_drawn(shuffle: bool) -> None:
    dataset = Counting()
    images = draw(DataLoader(dataset, batch_size=8, shuffle=shuffle), limit=30, seed=1)
    assert numbers(images.inputs) == dataset.read == numbers(draw(Counting(), limit=30, seed=1).inputs)
    assert len(dataset.read) == 30
    assert dataset.read[-1] > 500


def test_a_sampler_of_the_users_own_is_obeyed() -> None:
    weights = [0.0] * 99 + [1.0]
    loader = DataLoader(
        TensorDataset(numbered(100)), batch_size=10, sampler=WeightedRandomSampler(weights, 100)
    )
    assert set(numbers(draw(loader, limit=20).inputs)) == {99}


def test_neither_drawing_nor_streaming_touches_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    list(draw(numbered(30), limit=10).stream(4, 5, 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_labels_are_ignored_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        images = draw([(numbered(2), torch.zeros(2)), [numbered(2), torch.zeros(2)]])
    assert images.size == 4
    assert len(images.inputs.tensors()) == 1
    assert [record.message for record in caplog.records if "ignored" in record.message] == [
        "Batches have 2 parts: the first is the input, the rest (labels) is ignored."
    ]


@pytest.mark.parametrize("key", ["pixel_values", "image", "x"])
def test_known_keys_hold_the_images(key: str) -> None:
    images = draw([UserDict({key: numbered(2), "labels": torch.zeros(2)})])
    assert images.inputs.kwargs == {}
    assert numbers(images.inputs) == [0, 1]


def test_a_mapping_of_the_networks_inputs_becomes_keywords_in_one_order() -> None:
    mask = torch.ones(2, 5, dtype=torch.int64)
    images = draw([{"pixels": numbered(2), "mask": mask}], names={"pixels": True, "mask": True})
    other = draw([{"mask": mask, "pixels": numbered(2)}], names={"pixels": True, "mask": True})
    assert list(images.inputs.kwargs) == ["pixels", "mask"]
    assert images.inputs.kwargs["mask"].dtype == torch.int64
    assert images.fingerprint() == other.fingerprint()


def test_unknown_keys_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"'foo', 'bar'.*input_fn"):
        draw([{"foo": numbered(2), "bar": numbered(2)}])


def test_two_known_keys_are_ambiguous() -> None:
    with pytest.raises(CalibrationError, match="2 of the known keys"):
        draw([{"image": numbered(2), "x": numbered(2)}])


def test_what_input_fn_returns_is_taken_literally() -> None:
    batch = {"a": numbered(3), "n": torch.arange(3)}
    assert draw([batch], input_fn=lambda b: b["a"]).inputs.kwargs == {}
    pair = draw([batch], input_fn=lambda b: (b["a"], b["n"])).inputs
    assert len(pair.args) == 2 and pair.batch_size == 3
    nested = draw([batch], input_fn=lambda b: {"a": b["a"], "more": [b["n"], "same", 3]}).inputs
    assert nested.kwargs["more"][1:] == ["same", 3]
    assert torch.equal(nested.kwargs["more"][0], torch.arange(3))


@pytest.mark.parametrize(
    ("input_fn", "message"),
    [
        (lambda b: b["nothing"], "input_fn failed on batch 0"),
        (lambda b: [b], "returned a value of type list"),
    ],
)
def test_a_wrong_input_fn_is_reported(input_fn, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        draw([{"a": numbered(2)}], input_fn=input_fn)


def failing():
    yield numbered(2)
    raise ValueError("disk on fire")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batch"),
        (iter(()), "no batch"),
        (7, "not an iterable"),
        ("images", "is a str"),
        ({"x": numbered(2)}, "is a dict"),
        (numbered(0), r"Batch 0 is empty"),
        ([numbered(2), numbered(0)], "Batch 1 is empty"),
        ([numbered(2).to(torch.uint8)], r"torch.uint8.*convert and normalise"),
        ([numbered(2), numbered(2) / 0], r"Batch 1 holds NaN.*image 0, 1"),
        ([numbered(2), numbered(2, size=5)], r"batch 1 holds \(3, 5, 5\), batch 0 \(3, 4, 4\).*[Rr]esize"),
        ([numbered(2), numbered(2).double()], "torch.float64"),
        ([numbered(2), {"x": numbered(2)}, torch.ones(3)], r"mixed sizes|batch dimension"),
        ([torch.ones(3)], "need a batch dimension"),
        ([["a", "b"]], "list of str"),
        ([[]], "type list"),
        (failing(), "failed at batch 1: ValueError: disk on fire"),
    ],
)
def test_bad_loaders_are_refused_in_words(loader: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        draw(loader)


def test_mixed_sizes_within_a_batch_suggest_resizing() -> None:
    class Mixed(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(3, 4 + index, 4)

    with pytest.raises(CalibrationError, match=r"batch 0: .*Resize and crop"):
        draw(DataLoader(Mixed(), batch_size=2))


def test_structures_and_constants_must_agree_between_batches() -> None:
    with pytest.raises(CalibrationError, match="built differently"):
        draw([0, 1], input_fn=lambda b: (numbered(2),) if b == 0 else (numbered(2), numbered(2)))
    with pytest.raises(CalibrationError, match="holds 1 where batch 0 holds 0"):
        draw([0, 1], input_fn=lambda b: (numbered(2), b))
    with pytest.raises(CalibrationError, match="2, 3 images"):
        draw([0], input_fn=lambda b: (numbered(2), numbered(3)))


def test_a_limit_below_one_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="limit is 0"):
        draw([numbered(2)], limit=0)


def test_buffers_that_a_loader_reuses_do_no_harm() -> None:
    def reusing():
        buffer = torch.empty(2, 3, 4, 4)
        for start in (0, 2):
            buffer.copy_(numbered(4)[start : start + 2])
            yield buffer

    assert numbers(draw(reusing()).inputs) == [0, 1, 2, 3]


def test_batches_cover_the_set_in_order_and_again() -> None:
    images = CalibrationSet(Inputs((numbered(7),)))
    for _ in range(2):
        assert [numbers(batch) for batch in images.batches(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert numbers(images.example()) == [0]
    assert numbers(images.example(3)) == [0, 1, 2]


def test_the_stream_reshuffles_drops_the_rest_and_repeats_by_seed() -> None:
    images = CalibrationSet(Inputs((numbered(10),)))
    first = [numbers(batch) for batch in images.stream(4, 6, seed=5)]
    assert first == [numbers(batch) for batch in images.stream(4, 6, seed=5)]
    assert first != [numbers(batch) for batch in images.stream(4, 6, seed=6)]
    assert all(len(batch) == 4 for batch in first) and len(first) == 6
    for epoch in range(3):
        assert len(set(first[2 * epoch] + first[2 * epoch + 1])) == 8
    assert first[:2] != first[2:4]


def test_a_stream_of_large_batches_uses_the_whole_set() -> None:
    images = CalibrationSet(Inputs((numbered(3),)))
    assert [sorted(numbers(batch)) for batch in images.stream(64, 2, seed=0)] == [[0, 1, 2]] * 2
    assert list(images.stream(64, 0, seed=0)) == []


def test_augmentation_does_not_change_which_images_come_together() -> None:
    images = CalibrationSet(Inputs((numbered(8),)))

    def negate(inputs: Inputs, generator: torch.Generator) -> Inputs:
        torch.rand(3, generator=generator)
        return inputs.map(torch.neg)

    plain = [numbers(batch) for batch in images.stream(4, 4, seed=1)]
    augmented = [numbers(batch) for batch in images.stream(4, 4, seed=1, augment=negate)]
    assert augmented == [[-value for value in batch] for batch in plain]


def test_split_is_disjoint_complete_and_seeded() -> None:
    images = CalibrationSet(Inputs((numbered(10),)))
    first, second = images.split(0.3, seed=2)
    assert (first.size, second.size) == (3, 7)
    assert sorted(numbers(first.inputs) + numbers(second.inputs)) == list(range(10))
    assert numbers(images.split(0.3, seed=2)[0].inputs) == numbers(first.inputs)
    assert [part.size for part in images.split(0.001, seed=0)] == [1, 9]


def test_joined_sets_hold_the_images_of_both_in_order() -> None:
    first, second = (
        CalibrationSet(Inputs((images,), {"scale": torch.tensor(2.0)}))
        for images in (numbered(5)[:2], numbered(5)[2:])
    )
    both = first.joined(second)
    assert numbers(both.inputs) == [0, 1, 2, 3, 4] and both.size == 5
    assert torch.equal(both.inputs.kwargs["scale"], torch.tensor(2.0))
    assert numbers(first.inputs) == [0, 1]


def test_impossible_splits_and_batches_are_refused() -> None:
    images = CalibrationSet(Inputs((numbered(1),)))
    with pytest.raises(OptionError):
        images.split(1.0, seed=0)
    with pytest.raises(CalibrationError, match="cannot be split"):
        images.split(0.5, seed=0)
    with pytest.raises(OptionError):
        next(images.batches(0))
    with pytest.raises(OptionError):
        next(images.stream(4, -1, 0))


def test_the_fingerprint_sees_bytes_types_and_structure() -> None:
    def mark(*args: object, **kwargs: object) -> str:
        return CalibrationSet(Inputs(args, kwargs)).fingerprint()

    images = numbered(3)
    changed = images.clone()
    changed[2, 0, 0, 0] += 1e-3
    marks = [
        mark(images),
        mark(changed),
        mark(images.double()),
        mark(images.bfloat16()),
        mark(x=images),
        mark([images]),
        mark(images, 1),
        mark(images.reshape(3, 3, 16)),
    ]
    assert len(set(marks)) == len(marks)
    assert mark(images.clone()) == marks[0]
    assert mark(images.to(memory_format=torch.channels_last)) == marks[0]
    assert len(marks[0]) == 64


def test_inputs_select_and_move_leave_scalars_alone() -> None:
    scale = torch.tensor(2.0)
    inputs = Inputs((numbered(4), [torch.arange(4), scale]), {"flag": True}).to("cpu")
    chosen = inputs.select(torch.tensor([3, 1]))
    assert numbers(chosen) == [3, 1]
    assert chosen.args[1][0].tolist() == [3, 1]
    assert chosen.args[1][1] is scale and chosen.kwargs == {"flag": True}
    assert chosen.batch_size == 2 and len(chosen.tensors()) == 2


def test_inputs_are_given_all_by_position_or_all_by_name() -> None:
    x, mask = numbered(2), torch.ones(2)
    assert Inputs((x, mask)).given == (x, mask) and Inputs((), {"x": x}).given == {"x": x}
    with pytest.raises(GraphError, match="1 inputs are given by position and mask by name; give all one way"):
        _ = Inputs((x,), {"mask": mask}).given


@pytest.mark.parametrize("shuffle", [False, True])
def test_images_know_where_they_came_from(shuffle: bool) -> None:
    dataset = TensorDataset(numbered(60))
    for loader in (
        list(numbered(60).split(7)),
        numbered(60),
        dataset,
        DataLoader(dataset, 7, shuffle=shuffle),
    ):
        images = draw(loader, limit=25, seed=1)
        assert list(images.places) == numbers(images.inputs)
        assert len(set(images.places)) == 25 and max(images.places) > 25
        for part in images.split(0.2, seed=3):
            assert list(part.places) == numbers(part.inputs)

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from fxprune.calibration.augment import Augmentation, augmentation, cutmix, random_crop_flip
from fxprune.errors import OptionError
from fxprune.graph.call import Calls, Inputs


def mixing() -> Augmentation:
    made = augmentation(crop_flip=True, mix=True)
    assert made is not None
    return made


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def ways(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop of the padded image, and its mirror image: by another road than the code under test."""
    height, width = image.shape[1:]
    padded = functional.pad(image[None], (padding,) * 4, mode="reflect")[0]
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return crops + [crop.flip(2) for crop in crops]


def test_each_result_is_a_crop_of_the_padded_image() -> None:
    images = torch.randn(64, 2, 6, 7, generator=seeded())
    result = random_crop_flip(images, seeded(1), padding=2)
    places = set()
    for image, changed in zip(images, result, strict=True):
        matches = [place for place, way in enumerate(ways(image, 2)) if torch.equal(way, changed)]
        assert len(matches) == 1
        places.add(matches[0])
    # 50 ways, 64 draws: crops and flips both occur, and they differ between images
    assert len(places) > 25
    assert {place // 25 for place in places} == {0, 1}


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.arange(8.0).expand(2000, 1, 8, 8)
    flipped = random_crop_flip(images, seeded(), padding=0)[:, 0, 0, 0] == 7
    assert 900 < int(flipped.sum()) < 1100


def test_the_generator_alone_decides() -> None:
    images = torch.randn(8, 3, 16, 16, generator=seeded())
    assert torch.equal(random_crop_flip(images, seeded(3)), random_crop_flip(images, seeded(3)))
    assert not torch.equal(random_crop_flip(images, seeded(3)), random_crop_flip(images, seeded(4)))


@pytest.mark.parametrize(("height", "padding"), [(32, 4), (224, 28), (4, 1), (8, 1)])
def test_the_default_shift_grows_with_the_image(height: int, padding: int) -> None:
    images = torch.randn(4, 1, height, height, generator=seeded())
    assert torch.equal(
        random_crop_flip(images, seeded()), random_crop_flip(images, seeded(), padding=padding)
    )


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 32, 2), (2, 3, 1, 40)])
def test_tiny_images_keep_their_shape(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, dtype=torch.float64, generator=seeded())
    result = random_crop_flip(images, seeded())
    assert result.shape == images.shape and result.dtype == images.dtype


def test_the_input_is_left_unchanged() -> None:
    images = torch.randn(4, 3, 8, 8, generator=seeded())
    before = images.clone()
    random_crop_flip(images, seeded())
    assert torch.equal(images, before)


@pytest.mark.parametrize("padding", [-1, 8])
def test_a_shift_beyond_the_image_is_refused(padding: int) -> None:
    with pytest.raises(OptionError, match="give 0 to 7"):
        random_crop_flip(torch.zeros(1, 3, 8, 8), seeded(), padding=padding)


def test_only_images_are_taken() -> None:
    with pytest.raises(OptionError, match=r"\(3, 8, 8\)"):
        random_crop_flip(torch.zeros(3, 8, 8), seeded())


def test_a_box_of_each_image_comes_from_another() -> None:
    images = torch.arange(200.0)[:, None, None, None].expand(200, 3, 12, 16)
    mixed = cutmix(images, seeded())
    shares = []
    for index, image in enumerate(mixed):
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        foreign = image[0] != index
        shares.append(float(foreign.float().mean()))
        if foreign.any():
            assert len(image[0][foreign].unique()) == 1
            rows, columns = foreign.any(1), foreign.any(0)
            assert torch.equal(foreign, rows[:, None] & columns)
            for side, extent in ((rows, 12), (columns, 16)):
                places = side.nonzero().flatten()
                assert len(places) == places[-1] - places[0] + 1  # in one piece
                assert extent / 4 <= len(places) <= 3 * extent / 4
    assert 0.22 < sum(shares) / 200 < 0.28
    assert sum(share == 0 for share in shares) < 5  # an image may be drawn as its own partner


def test_boxes_stay_in_their_place() -> None:
    images = torch.randn(6, 2, 9, 9, generator=seeded())
    mixed = cutmix(images, seeded(1))
    assert bool((mixed[:, None] == images[None]).any(1).all())
    assert torch.equal(mixed, cutmix(images, seeded(1)))
    assert not torch.equal(mixed, cutmix(images, seeded(2)))


def test_mixing_takes_images_only() -> None:
    with pytest.raises(OptionError, match=r"\(3, 8, 8\)"):
        cutmix(torch.zeros(3, 8, 8), seeded())
    pixel = torch.randn(4, 3, 1, 1, generator=seeded())
    assert torch.equal(cutmix(pixel, seeded()), pixel)  # no box is that small


def test_the_one_image_tensor_is_changed() -> None:
    images, tokens = torch.randn(4, 3, 8, 8, generator=seeded()), torch.randn(4, 5, 6, generator=seeded())
    inputs = Inputs((tokens,), {"x": images, "scale": 2})
    both = seeded(1)
    expected = {
        (True, False): random_crop_flip(images, seeded(1)),
        (False, True): cutmix(images, seeded(1)),
        (True, True): cutmix(random_crop_flip(images, both), both),
    }
    for (crop_flip, mix), wanted in expected.items():
        augment = augmentation(crop_flip=crop_flip, mix=mix)
        assert augment is not None
        result = augment(inputs, seeded(1))
        assert torch.equal(result.kwargs["x"], wanted)
        assert result.args[0] is tokens and result.kwargs["scale"] == 2
    assert augmentation(crop_flip=False, mix=False) is None


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.int64)),
        (torch.zeros(2, 5, 6),),
        (torch.zeros(2, 8, 8, 3),),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64),),
    ],
    ids=["two frames", "mask", "tokens", "channels last", "integers"],
)
def test_what_may_have_to_stay_aligned_is_left_alone(args: tuple[Tensor, ...]) -> None:
    inputs = Inputs(args)
    assert mixing()(inputs, seeded()) is inputs


def test_each_call_of_several_networks_is_changed_by_itself() -> None:
    one, other, pair = (torch.rand(4, 3, 8, 8, generator=Generator().manual_seed(i)) for i in range(3))
    augment = augmentation(crop_flip=True, mix=False)
    assert augment is not None
    given = Calls.of([Inputs((one,)), Inputs((), {"x": other}), Inputs((pair, pair))])
    changed = augment(given, Generator().manual_seed(5))
    generator = Generator().manual_seed(5)
    first, second, third = changed.calls
    assert torch.equal(first.args[0], random_crop_flip(one, generator))
    assert torch.equal(second.kwargs["x"], random_crop_flip(other, generator))
    assert torch.equal(third.args[0], pair) and isinstance(changed, Calls)

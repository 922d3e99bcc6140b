"""Every data set: what it yields, that only the seed decides it, and what it says when it cannot."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from splits import CPU, GREY, epoch, load, same, sentence

from prune_cli.datasets.digits import FILE, Digits
from prune_cli.datasets.subsets import partition, stratified
from prune_cli.datasets.synthetic import Synthetic
from prune_cli.datasets.tensors import Images, Normalisation, TensorSplit, mirror, random_crop
from prune_cli.errors import UserError
from prune_cli.settings import typed
from prune_cli.targets import resolve
from prune_cli.vision import torchvision

CONFIGS = sorted(Path(__file__).parents[1].glob("conf/dataset/*.yaml"))


# --- the settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fits_its_class_and_explains_every_key(config):
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    target = resolve(values.pop("_target_"))
    assert target(**typed(target, values, "dataset")).name == values["name"]
    lines = config.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and all("  # " in line for line in lines[1:])


# --- subsets ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_a_stratified_subset_has_every_class_in_proportion(labels, data):
    labels = torch.tensor(labels)
    count = data.draw(st.integers(0, len(labels)))
    chosen = stratified(labels, count)
    assert len(chosen) == count and same([chosen], [stratified(labels, count)])
    assert torch.equal(chosen, chosen.unique())
    shares = torch.bincount(labels) * count / len(labels)
    taken = torch.bincount(labels[chosen], minlength=len(shares))
    assert ((taken - shares).abs() < 1).all()


@given(st.floats(0, 0.9), st.integers(1, 50) | st.none())
@settings(deadline=None)
def test_held_out_images_do_not_depend_on_the_limit(validation, limit):
    labels = torch.arange(40) % 4
    train, held_out = partition(labels, validation, limit)
    all_train, all_held_out = partition(labels, validation, None)
    assert set(train.tolist()) <= set(all_train.tolist())
    assert len(train) == min(limit or 40, len(all_train))
    assert (held_out is None) == (validation == 0)
    if validation:
        assert set(held_out.tolist()) <= set(all_held_out.tolist())
        assert sorted(all_train.tolist() + all_held_out.tolist()) == list(range(40))


def test_something_is_left_to_train_on():
    with pytest.raises(UserError) as problem:
        partition(torch.tensor([0, 1]), 0.9, None)
    sentence(problem, "recipe.validation=0.9", "2 training images")


# --- batches ------------------------------------------------------------------------------------


@given(
    st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 7), st.integers(1, 7), st.integers(0, 4), st.integers(0, 99)
)
@settings(deadline=None)
def test_crop_and_mirror_agree_with_one_image_at_a_time(N, C, H, W, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (N, C, H, W), generator=generator).to(torch.uint8)
    offsets = torch.randint(0, 2 * pad + 1, (N, 2), generator=generator)
    chosen = torch.rand(N, generator=generator) < 0.5
    for image, (top, left), flipped, result in zip(
        images.numpy(), offsets.tolist(), chosen.tolist(), mirror(random_crop(images, offsets, pad), chosen).numpy()
    ):
        expected = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))[:, top : top + H, left : left + W]
        assert np.array_equal(result, expected[:, :, ::-1] if flipped else expected)


def test_augmented_batches_are_normalised_windows_of_their_images():
    pixels = torch.arange(1, 251).view(-1, 1, 5, 5).to(torch.uint8)
    split = TensorSplit(Images(pixels, torch.arange(10)), Normalisation((0.5,), (0.25,), CPU), pad=1, flip=True)
    seen = set()
    images, labels = epoch(split, 4, seed=3)
    assert sorted(labels.tolist()) == list(range(10))
    for image, label in zip(images, labels):
        framed = torch.nn.functional.pad(pixels[label].float(), (1, 1, 1, 1))
        candidates = {
            (top, left, flipped): framed[:, top : top + 5, left : left + 5].flip(2 if flipped else ())
            for top in range(3)
            for left in range(3)
            for flipped in (False, True)
        }
        matches = [k for k, v in candidates.items() if torch.allclose((v / 255 - 0.5) / 0.25, image, atol=1e-6)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 5


def test_black_frames_stay_black_as_in_torchvision():
    black = Images(torch.zeros(4, 1, 6, 6, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    images, _ = epoch(TensorSplit(black, Normalisation((0.5,), (0.5,), CPU), pad=2), seed=0)
    assert (images == -1).all()


def test_normalisation_is_torchvisions():
    T = torchvision().transforms
    pixels = torch.randint(0, 256, (6, 5, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = T.Compose([T.ToTensor(), T.Normalize(mean, std)])(Image.fromarray(pixels.numpy()))
    torch.testing.assert_close(Normalisation(mean, std, CPU)(pixels.permute(2, 0, 1)[None])[0], expected)


def test_the_seed_alone_decides_the_batches():
    split = load(Synthetic("s", **GREY, pad=2, flip=True, train_size=40), "").train
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = epoch(split, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, epoch(split, seed=7))
    assert same(first, epoch(split, batch_size=7, seed=7))
    assert not same(first, epoch(split, seed=8))
    plain = epoch(split)
    assert same(plain, epoch(split)) and torch.equal(plain[1], split.labels)
    assert plain[0].dtype == torch.float32 and plain[1].dtype == torch.int64


def test_one_mean_per_channel_or_one_for_all():
    assert load(Synthetic("s", (0.5,), (0.5,)), "").channels == 3
    with pytest.raises(UserError) as problem:
        load(Synthetic("s", (0.5, 0.5), (0.5,)), "")
    sentence(problem, "dataset.mean", "2 values", "3 channel")


# --- digits, synthetic --------------------------------------------------------------------------


def test_digits_are_the_uci_digits_in_a_fixed_split():
    splits = load(Digits("digits", (0.0,), (1.0,)), "/nowhere")
    assert (len(splits.train), len(splits.test), splits.validation) == (1437, 360, None)
    assert (splits.channels, splits.resolution, splits.classes) == (1, 8, 10)
    assert torch.bincount(splits.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    images, _ = epoch(splits.test)
    assert images.min() == 0 and images.max() == 1  # 16 levels
    with np.load(FILE) as stored:
        assert stored["images"].shape == (1797, 8, 8) and stored["images"].max() == 16
        assert stored["test"].sum() == 360


def test_digits_equal_their_source():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(FILE) as stored:
        assert np.array_equal(stored["images"], source.images) and np.array_equal(stored["labels"], source.target)


def test_validation_and_limit_are_stratified_and_stay_the_same():
    digits = Digits("digits", **GREY)
    splits = load(digits, "", validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1293, 144, 360)
    assert set(torch.bincount(splits.validation.labels).tolist()) <= {14, 15}
    assert torch.equal(splits.validation.pixels, load(digits, "", validation=0.1).validation.pixels)
    small = load(digits, "", validation=0.1, limit=20)
    for part in (small.train, small.validation, small.test):
        assert torch.bincount(part.labels).tolist() == [2] * 10


def test_a_network_learns_the_synthetic_images():
    splits = load(Synthetic("s", **GREY, channels=2, resolution=9, classes=3), "")
    assert (splits.channels, splits.resolution, splits.classes) == (2, 9, 3)
    torch.manual_seed(0)
    model = torch.nn.Linear(2 * 81, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for images, labels in splits.train.batches(16, seed=0):
        loss = torch.nn.functional.cross_entropy(model(images.flatten(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = epoch(splits.test)
    assert (model(images.flatten(1)).argmax(1) == labels).float().mean() > 0.9


def test_synthetic_content_decides_its_fingerprint():
    prints = [Synthetic("s", **GREY, **v).fingerprint(Path()) for v in ({}, {"seed": 1}, {"noise": 0.5}, {"pad": 2})]
    assert len(set(prints)) == 3 and prints[0] == prints[3]
    with pytest.raises(UserError) as problem:
        load(Synthetic("s", **GREY, train_size=5), "")
    sentence(problem, "train_size=5", "classes=10")

"""Data, batches and training of the accuracy benchmark: fair between methods, faithful to torchvision, and resumable."""

import pytest
import torch
from classification.batches import PADDING, Batches, channel_statistics, evaluation_images
from classification.data import Labelled, Pool, choose, load_task
from classification.methods import Variants, parse_method
from classification.models import SmallResNet, build_model
from classification.training import Training, accuracy, learning_rate, train
from torchvision.transforms.v2 import functional as F

from image_folders import picture

MEAN, STD = torch.full((3,), 0.5), torch.full((3,), 0.25)


def pool_of(count=12, size=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Pool(images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


def batches_of(method, pool=None, steps=3, seed=0, sgid=None, batch_size=4, size=8):
    pool = pool or pool_of()
    method = parse_method(method, Variants.for_model("tiny"))
    return Batches(
        pool, range(len(pool)), method, sgid, batch_size=batch_size, steps=steps, size=size,
        seed=seed, mean=MEAN, std=STD,
    )  # fmt: skip


def to_uint8(pixels):
    return ((pixels * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)) * 255).round().to(torch.uint8)


def test_a_parquet_folder_is_a_task(task_folder):
    task = load_task(str(task_folder))
    assert (len(task.train), len(task.test)) == (12, 9)
    assert task.train.images.shape == (12, 3, 32, 32)
    assert task.train.classes[0] == "airplane"
    assert Labelled(task.train, [4, 2])[0][1] == int(task.train.labels[4])


def test_class_folders_are_a_task_with_names_in_words(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("tabby_cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            picture(number, 20, 30).save(tmp_path / part / name / "one.png")
    task = load_task(str(tmp_path))
    assert task.train.classes == ("dog", "tabby cat")
    assert task.test.labels.tolist() == [0, 1]
    assert torch.equal(task.train.images[1], F.pil_to_tensor(picture(0, 20, 30)))


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder with fewshot\.parquet"):
        load_task(str(tmp_path))


def test_images_are_drawn_by_class_and_nested():
    labels = torch.tensor([0, 1, 2] * 10)
    few, more = choose(labels, 2, seed=5), choose(labels, 4, seed=5)
    assert labels[few].bincount().tolist() == [2, 2, 2]
    assert set(few) < set(more)
    assert choose(labels, 2, seed=6) != few
    assert sorted(choose(labels, None, seed=5)) == list(range(30))
    with pytest.raises(ValueError, match="class 0 has 10 images; 11 were asked for"):
        choose(labels, 11, seed=0)


def test_small_images_are_padded_cropped_and_flipped_each_in_its_own_way():
    pool = pool_of(count=4)
    batches = batches_of("none", pool, steps=40)
    padded = F.pad(pool.images, [PADDING], padding_mode="reflect")
    seen = set()
    for step in range(40):
        pixels, _ = batches[step]
        for image, index in zip(pixels, batches.order[step].tolist(), strict=True):
            shown = to_uint8(image)
            found = _places(shown, padded[index])
            assert found, "not a crop of the padded original"
            seen.update(found)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(2 * PADDING + 1))
    assert {flip for _, _, flip in seen} == {False, True}
    assert len(seen) > 80  # of 162: images of one batch have places of their own


def _places(shown, padded):
    places = []
    for top in range(2 * PADDING + 1):
        for left in range(2 * PADDING + 1):
            window = padded[:, top : top + 8, left : left + 8]
            places += [(top, left, flip) for flip in (False, True) if torch.equal(shown, window.flip(2) if flip else window)]
    return places


def test_all_methods_see_the_same_images_cropped_in_the_same_way():
    plain = batches_of("none")
    for name in ("randaugment", "mixup", "randomerasing"):
        other = batches_of(name)
        assert torch.equal(plain.order, other.order)
    erased, labels = batches_of("randomerasing")[1]
    pixels, same_labels = plain[1]
    assert torch.equal(labels, same_labels)
    kept = erased != 0  # what is not erased is what `none` shows
    assert torch.equal(erased[kept], pixels[kept])
    assert not kept.all()


def test_policies_are_applied_to_each_image_as_torchvision_does():
    batches, plain = batches_of("randaugment"), batches_of("none")
    pixels, _ = batches[2]
    with torch.random.fork_rng(devices=[]):
        batches._seed(2, 2)
        expected = torch.stack([batches.policy(to_uint8(image)) for image in plain[2][0]])
    assert torch.equal(torch.stack([to_uint8(image) for image in pixels]), expected)


def test_mixed_batches_have_soft_labels():
    _, labels = batches_of("mixup")[0]
    assert labels.shape == (4, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_a_batch_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = batches_of("augmix")[2][0]
    torch.rand(7)
    state = torch.random.get_rng_state()
    again = batches_of("augmix")
    again[0]
    assert torch.equal(again[2][0], first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(batches_of("augmix", seed=1)[2][0], first)


def test_every_image_is_shown_once_an_epoch():
    order = batches_of("none", steps=6).order
    assert sorted(order[:3].flatten().tolist()) == sorted(order[3:].flatten().tolist()) == list(range(12))


def test_large_images_are_cropped_and_resized():
    images = [F.pil_to_tensor(picture(seed, 40, 30)) for seed in range(4)]
    pool = Pool(images, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    pixels, _ = batches_of("trivialaugment", pool, size=16)[0]
    assert pixels.shape == (4, 3, 16, 16)
    assert evaluation_images(pool, [0, 3], 16).shape == (2, 3, 16, 16)
    mean, std = channel_statistics(pool, range(4), 16)
    assert mean.shape == std.shape == (3,)
    assert 0 < float(mean.min()) < 1


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, 60, 0.2) for step in range(60)]
    assert max(rates) == pytest.approx(0.2)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.02)
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    training = Training(steps=5, batch_size=4, size=8, dtype="float32")

    class Cut(Batches):
        def __getitem__(self, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    whole = train(training, batches_of("randaugment", steps=5), seed=1)
    checkpoint = tmp_path / "running" / "run.pt"
    batches = batches_of("randaugment", steps=5)
    batches.__class__ = Cut
    with pytest.raises(KeyboardInterrupt):
        train(training, batches, seed=1, checkpoint=checkpoint, checkpoint_seconds=-1.0)
    assert torch.load(checkpoint, weights_only=True)["step"] == 3
    batches.__class__ = Batches
    resumed = train(training, batches, seed=1, checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_small_network_learns_what_can_be_learned():
    """Twelve pictures by heart: a bug in loss, labels, or evaluation would show."""
    pool = pool_of(count=12, size=16)
    training = Training(steps=60, batch_size=12, size=16, lr=0.05, weight_decay=0.0, dtype="float32")
    batches = batches_of("none", pool, steps=60, batch_size=12, size=16)
    model = train(training, batches, seed=0)
    assert accuracy(model, training, pool, range(12), MEAN, STD) >= 75
    assert sum(weight.numel() for weight in SmallResNet(10).parameters()) == 696_234


def test_models_are_found_by_name():
    assert build_model("resnet18", 7).fc.out_features == 7
    with pytest.raises(ValueError, match="no pre-trained weights"):
        build_model("small-resnet", 3, pretrained=True)
    timm = pytest.importorskip("timm")
    assert isinstance(build_model("timm/resnet10t", 5), type(timm.create_model("resnet10t")))

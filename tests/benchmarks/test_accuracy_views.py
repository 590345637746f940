"""Label agreement and diversity, with judges that can be followed by hand."""

import pytest
import torch
from classification.judging import judge_views, load_judge, randaugment_views
from torchvision.transforms.v2 import functional as F

from image_folders import picture


def solid(red, green):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[0], image[1] = red, green
    return image


def by_colour(images):
    """Class 1 for what is more green than red; red and green as features."""
    means = torch.stack([image.float().mean((1, 2))[:2] for image in images])
    return (means[:, 1] > means[:, 0]).long(), means


def test_views_are_counted_and_compared_within_their_original():
    red, green, mixed = solid(200, 0), solid(0, 200), solid(200, 200)
    found = judge_views(by_colour, [[red, red], [red, green], [mixed, mixed]], [0, 0, 1])
    assert found.agreement == pytest.approx(3 / 6)  # green is wrong, and mixed counts as red, twice
    assert found.distance == pytest.approx((0 + 1 + 0) / 3, abs=1e-6)  # red and green are at right angles
    assert 1.0 < found.vendi < 2.0  # red, red, mixed
    assert judge_views(by_colour, [[red], [red]], [0, 0]).vendi == pytest.approx(1.0)


def test_each_original_must_have_as_many_views():
    for views in ([], [[]], [[solid(1, 1)], [solid(1, 1)] * 2]):
        with pytest.raises(ValueError, match="as many pictures"):
            judge_views(by_colour, views, [0] * len(views))


def test_randaugments_views_are_repeatable_and_leave_the_random_state_alone():
    images = [F.pil_to_tensor(picture(seed, 16, 16)) for seed in range(3)]
    state = torch.random.get_rng_state()
    first, second = (randaugment_views(images, 2, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(views) for views in first] == [2, 2, 2]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert any(not torch.equal(a, b) for a, b in first)


def test_a_judge_is_read_from_safetensors(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="judges CIFAR-10's classes"):
        load_judge(str(tmp_path / "judge.safetensors"), ["cat", "dog"])
    import classifier  # load_judge has put its folder on the path
    from data import CLASSES

    torch.manual_seed(0)
    model = classifier.Classifier()
    save_file(model.state_dict(), tmp_path / "judge.safetensors")
    judge = load_judge(str(tmp_path / "judge.safetensors"), CLASSES)
    images = [F.pil_to_tensor(picture(seed, 32, 32)) for seed in range(3)]
    classes, features = judge(images)
    model.eval()
    with torch.no_grad():
        expected = model(classifier.normalize(torch.stack(images))).argmax(1)
    assert torch.equal(classes, expected)
    assert features.shape == (3, 192)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_a_clip_can_judge():
    images = [F.pil_to_tensor(picture(seed, 32, 32)) for seed in range(2)]
    classes, features = load_judge("clip:tiny", ["frog", "ship"])(images)
    assert classes.shape == (2,)
    assert set(classes.tolist()) <= {0, 1}
    assert len(features) == 2

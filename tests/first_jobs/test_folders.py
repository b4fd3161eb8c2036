"""What folders mean, in the layouts that people and published data sets have."""

import pytest

from raydetect.errors import SpecError
from raydetect.first_jobs.folders import is_mask, meaning, read_folders


def test_visa_has_categories_a_folder_of_normal_images_and_masks() -> None:
    names = [f"{product}/Data/Images/Normal/{i}.JPG" for product in ("candle", "pcb1") for i in range(3)]
    names += [f"{product}/Data/Images/Anomaly/0.JPG" for product in ("candle", "pcb1")]
    names += [f"{product}/Data/Masks/Anomaly/0.png" for product in ("candle", "pcb1")]
    found = read_folders(names, "x")
    assert found.train == found.test == "{category}/Data/Images/{defect}/{name}.JPG"
    assert found.categories == ("candle", "pcb1") and found.normal_names == ()
    assert (found.num_normal, found.num_anomalous) == (6, 2)
    assert found.mask == "{category}/Data/Masks/{defect}/{name}.png"


def test_mvtec_ad2_has_public_tests_and_masks_below_them() -> None:
    names = ["can/train/good/0.png", "can/train/good/1.png", "can/validation/good/0.png"]
    names += ["can/test_public/good/0.png", "can/test_public/bad/1.png", "can/test_public/ground_truth/bad/1_mask.png"]
    found = read_folders(names, "x")
    assert found.train == "train/{defect}/{name}.png" and found.test == "test_public/{defect}/{name}.png"
    assert found.mask == "test_public/ground_truth/{defect}/{name}_mask.png"
    assert found.normal_folder == "can/train/good" and found.num_normal == 2 and found.num_anomalous == 1


def test_btad_says_ok_and_ko() -> None:
    names = ["01/train/ok/0.bmp", "02/train/ok/1.bmp", "01/test/ko/0.bmp", "01/ground_truth/ko/0.png"]
    found = read_folders(names, "x")
    assert found.train == "{category}/train/{defect}/{name}.bmp"
    assert found.mask == "{category}/ground_truth/{defect}/{name}.png"


def test_words_that_the_default_does_not_know_are_named() -> None:
    found = read_folders(["pass/a.png", "Fail/b.png"], "x")
    assert found.normal_names == ("pass",) and found.train == "{defect}/{name}.png"
    one_left = read_folders(["parts/a.png", "parts/b.png", "ng/c.png"], "x")
    assert one_left.normal_names == ("parts",) and one_left.num_normal == 2


def test_several_suffixes_are_left_to_the_name() -> None:
    found = read_folders(["good/a.png", "good/b.jpg", "bad/c.png"], "x")
    assert found.test == "{defect}/{name}"


def test_train_and_test_without_labels() -> None:
    found = read_folders(["train/a.png", "train/b.png", "test/c.png"], "x")
    assert found.train == "train/{name}" and found.test == "test/{name}" and found.normal_folder == "train"
    assert found.num_normal == 2 and "none says good or bad" in found.why


def test_words_beside_the_meaning_of_a_folder_change_nothing() -> None:
    names = ["training-images/a.jpg", "training-images/b.jpg", "test-images/c.jpg", "mask-images/c.png"]
    found = read_folders(names, "x")
    assert found.train == "training-images/{name}" and found.test == "test-images/{name}" and found.num_normal == 2
    found = read_folders(["Good Images/a.png", "Good Images/b.png", "bad_imgs/c.png"], "x")
    assert found.train == "{defect}/{name}.png" and found.normal_names == ("Good Images",) and found.num_normal == 2
    assert found.num_anomalous == 1


def test_files_that_are_named_bad_are_warned_of() -> None:
    names = ["train/normal-1.jpg", "train/anomaly-1.jpg", "train/Defect_2.jpg", "test/anomaly-3.jpg"]
    why = read_folders(names, "x").why
    assert "BUT 2 of 3 have names that say bad, such as anomaly-1.jpg: move those" in why
    assert "BUT 1 of 2 has a name that says bad, such as ng 1.png" in read_folders(["1.png", "ng 1.png"], "x").why
    assert "BUT" not in read_folders(["1.png", "badge.png", "good.png"], "x").why


@pytest.mark.parametrize(
    ("folder", "word"),
    [("Training-Images", "training"), ("trainset", "train"), ("img_good", "good"), ("images", "images"), ("ok", "ok"),
     ("test data", "test"), ("offset", "off"), ("goodness", "goodness")],
)  # fmt: skip
def test_the_meaning_of_a_folder(folder: str, word: str) -> None:
    assert meaning(folder) == word


def test_folders_of_unknown_meaning_are_named_and_all_images_count_as_good() -> None:
    found = read_folders(["monday/a.png", "tuesday/b.png"], "x")
    assert found.train is None and found.loose_groups == ("monday", "tuesday") and found.num_normal == 2


def test_good_parts_in_further_folders() -> None:
    found = read_folders(["good/1/a.png", "good/2/b.png", "bad/1/c.png"], "x")
    assert found.train is None and found.normal_folder == "good"
    assert (found.num_normal, found.num_anomalous) == (2, 1)
    with pytest.raises(SpecError, match=r"several folders .*\(a/good, b/good\)"):
        read_folders(["a/good/1/x.png", "b/good/2/y.png"], "x")


@pytest.mark.parametrize(("name", "expected"), [("gt/a.png", True), ("a/Masks/b.png", True), ("mask.png", False)])
def test_masks(name: str, expected: bool) -> None:
    assert is_mask(name) is expected

"""Every law that depends on the numbers of a detector, tested with its networks in bfloat16."""

import pytest
import torch

from tests.contracts import cases
from tests.contracts import test_laws as laws
from tests.contracts.cases import CASES, IN_BFLOAT16, Case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("case", IN_BFLOAT16, ids=lambda case: case.id),
]

test_scores_have_the_right_shapes_and_are_finite = laws.test_scores_have_the_right_shapes_and_are_finite
test_finds_planted_defects = laws.test_finds_planted_defects
test_scores_do_not_depend_on_the_batch = laws.test_scores_do_not_depend_on_the_batch
test_scoring_is_pure = laws.test_scoring_is_pure
test_fit_does_not_depend_on_batches_or_order = laws.test_fit_does_not_depend_on_batches_or_order
test_fit_is_repeatable_with_any_number_of_shards = laws.test_fit_is_repeatable_with_any_number_of_shards
test_a_second_fit_forgets_the_first = laws.test_a_second_fit_forgets_the_first
test_saved_detector_scores_bit_identically_without_pickle = (
    laws.test_saved_detector_scores_bit_identically_without_pickle
)
test_any_image_size_works_or_is_rejected = laws.test_any_image_size_works_or_is_rejected


def test_the_stored_tensors_and_scores_are_float32_but_of_other_numbers(case: Case) -> None:
    half = laws.brief(case)
    whole = cases.fit_briefly(CASES[IN_BFLOAT16.index(case)], shard_images=100, seed=laws.SEED)
    kinds = {name: (value.dtype, value.shape) for name, value in whole.tensors().items()}
    found = {name: (value.dtype, value.shape) for name, value in half.tensors().items()}
    assert {name: dtype for name, (dtype, _) in found.items()} == {name: dtype for name, (dtype, _) in kinds.items()}
    images = cases.test_images(3)[0]
    scores = [cases.score(detector, images) for detector in (half, whole)]
    assert not torch.equal(*(each.image_score_B for each in scores))
    assert not torch.equal(*(each.anomaly_map_BHW for each in scores))
    levels = scores[0].image_score_B
    assert not torch.equal(levels, levels.bfloat16().float())  # not rounded to 8 bits at the end

"""No default slips away from its paper, and no parameter is added without saying whose value it has."""

from dataclasses import fields

import pytest

from raydetect.detectors._registry import build_detector, list_models
from tests.contracts.published import COMMON, OURS, PUBLISHED


@pytest.mark.parametrize("name", list_models())
def test_every_default_is_the_published_one_or_named_as_ours(name: str) -> None:
    params = build_detector(name, {}, preset="paper").params
    published, ours = PUBLISHED[name], OURS[name]
    assert not published.keys() & ours
    assert published.keys() | ours | COMMON == {field.name for field in fields(params)} | COMMON
    assert {parameter: getattr(params, parameter) for parameter in published} == published

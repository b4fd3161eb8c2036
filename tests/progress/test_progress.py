"""Displays of progress: words, units, rates, time left, and a line whenever nothing was said for a while."""

import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from raydetect.progress import activity, displays
from raydetect.progress.activity import ACTIVITY, doing, told
from raydetect.progress.displays import FitDisplay, ScoreDisplay
from raydetect.progress.texts import rate_text


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_phase_says_what_it_counts_how_fast_and_how_long_it_will_take(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with FitDisplay() as display:
        display.on_progress("start workers", 0, None)
        display.on_progress("collect images", 16, 240)
        clock.now += 10
        display.on_progress("collect images", 64, 240)
        clock.now += 10
        display.on_progress("collect images", 160, 240)
    assert said(capsys) == [
        "start workers",
        "collect: 16 of 240 images",
        "collect: 80 of 240 images, 6.4 images/s, 25 s left",
        "collect: 240 of 240 images, 11.2 images/s",
    ]


def test_nothing_said_for_a_while_is_followed_by_what_is_being_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    ACTIVITY.printed = clock.now
    with doing("listing the archive"):
        clock.now += activity.SILENT_SECONDS - 0.1
        ACTIVITY.remind()
        assert said(capsys) == []
        clock.now += 0.2
        ACTIVITY.remind()
        ACTIVITY.remind()
        assert said(capsys) == ["listing the archive ... 4 s"]
        with FitDisplay() as display:
            display.on_progress("read images", 3, None)
            clock.now += 6
            ACTIVITY.remind()
            assert said(capsys) == ["read: 3 images", "read: 3 images ... 6 s"]
        clock.now += 5
        ACTIVITY.remind()
        assert said(capsys) == ["listing the archive ... 15 s"]
    clock.now += 60
    ACTIVITY.remind()
    assert said(capsys) == []


def test_a_slow_command_is_never_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(activity, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(activity, "TICK_SECONDS", 0.05)
    with told("preparing"):
        time.sleep(0.7)
    lines = said(capsys)
    assert 2 <= len(lines) <= 4 and set(lines) <= {"preparing ... 0 s", "preparing ... 1 s"}
    time.sleep(0.4)
    assert said(capsys) == []


def test_scoring_says_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ACTIVITY.printed = clock.now
    chunk: Any = SimpleNamespace(images=20, bad=1, flagged=2, facts=SimpleNamespace(seconds=0.5))
    with ScoreDisplay(0, 4, 4000) as display:
        clock.now += 5
        ACTIVITY.remind()
        assert said(capsys) == ["starting workers and loading the detector ... 5 s"]
        display.scored(chunk)
        assert said(capsys) == ["0 of 4 shards, 20 images, 1 bad, 2 flagged"]  # too early for a rate
        clock.now += 9.5
        display.committed(1000)
        assert said(capsys) == ["1 of 4 shards, 20 images, 2.0 images/s, 1 bad, 2 flagged, 30 s left"]


@pytest.mark.parametrize(
    ("count", "seconds", "text"), [(64, 0.001, ""), (0, 5, ""), (50, 2, "25.0 images/s"), (64000, 2, "32,000 images/s")]
)
def test_rates_of_moments_are_not_shown(count: int, seconds: float, text: str) -> None:
    assert rate_text(count, seconds, "images") == text


def test_lines_go_to_standard_error_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    ACTIVITY.line("read: 3 images")
    assert stream.getvalue() == "read: 3 images\n"


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_without_widgets_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], widgets: bool
) -> None:
    monkeypatch.setattr(displays, "Console", lambda **_: SimpleNamespace(is_jupyter=True))
    monkeypatch.setattr(displays, "find_spec", lambda name: object() if widgets else None)
    assert displays._can_be_live() is widgets
    if not widgets:
        with FitDisplay() as display:
            display.on_progress("read images", 3, None)
        assert said(capsys) == ["read: 3 images"]

"""What a person sees of training without a terminal."""

from types import SimpleNamespace

import pytest

from nestune.training import progress
from nestune.training.progress import PLAIN_LINES, ProgressBar


def test_a_line_that_is_said_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "backend: torch on cpu (auto: [bold] no Apple silicon) " + "x" * 200
    with ProgressBar(8) as bar:
        bar.say(text)
    assert capsys.readouterr().err == text + "\n"


@pytest.mark.parametrize("taken", [0, 60])
def test_every_tenth_of_all_steps_has_a_line_also_of_a_training_that_goes_on(
    capsys: pytest.CaptureFixture[str], taken: int
) -> None:
    with ProgressBar(100, taken=taken) as bar:
        for step in range(taken + 1, 101):
            bar.show(step, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" · ")[0] for line in lines] == [f"step {step}/100" for step in range(taken + 10, 101, 10)]
    assert len(lines) == PLAIN_LINES - taken // 10


def test_the_time_left_is_that_of_the_steps_taken_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now_s))
    with ProgressBar(100, taken=60) as bar:
        now_s += 50
        bar.show(70, "loss 1")
    # 30 steps to go, at 5 s a step.
    assert capsys.readouterr().err == "step 70/100 · loss 1 · 150 s left\n"

"""The power law of a learning curve: laws are found from their points, and what points allow none is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fastlm.train.power_law import fit

SIZES = [1.1e5, 2.3e5, 4.9e5, 1.04e6]


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.3])
@pytest.mark.parametrize("exponent", [0.08, 0.25, 0.6])
def test_a_law_is_found_from_its_points(floor: float, exponent: float) -> None:
    truth = lambda n: floor + 1.7 * (n / 1e6) ** -exponent
    for count in (3, 4):
        law = fit(SIZES[:count], [truth(n) for n in SIZES[:count]])
        for ahead in (1.0, 2.0, 4.0):
            assert law(ahead * SIZES[3]) == pytest.approx(truth(ahead * SIZES[3]), rel=2e-3)
        assert law.b == pytest.approx(exponent, rel=0.05)
    two = fit(SIZES[:2], [truth(n) for n in SIZES[:2]])
    assert [two(n) for n in SIZES[:2]] == pytest.approx([truth(n) for n in SIZES[:2]])


def test_noise_of_half_a_percent_stays_small_at_twice_the_text() -> None:
    draw, off = np.random.default_rng(11), []
    for _ in range(100):
        losses = [(1.0 + 1.4 * (n / 1e6) ** -0.25) * (1 + 0.005 * draw.standard_normal()) for n in SIZES[1:]]
        off.append(fit(SIZES[1:], losses)(2.08e6) / (1.0 + 1.4 * 2.08**-0.25) - 1)
    assert np.median(np.abs(off)) < 0.02


def test_losses_that_do_not_fall_promise_nothing() -> None:
    for losses in ([2.0, 2.0], [2.0, 2.1], [2.0, 2.1, 2.2], [2.0, 2.0, 2.0]):
        law = fit(SIZES[: len(losses)], losses)
        assert law(1e9) == pytest.approx(np.mean(losses), rel=0.02)
        assert law(1e9) >= 2.0 - 1e-9
    assert "(n / " in str(fit(SIZES, [3.0, 2.5, 2.2, 2.0]))


REFUSED = [
    ([1.0], [2.0]),
    ([2.0, 1.0], [2.0, 1.0]),
    ([1.0, 1.0], [2.0, 1.0]),
    ([1.0, 2.0], [0.0, 1.0]),
    ([1.0, 2.0], [2.0]),
    ([0.0, 2.0], [2.0, 1.0]),
    ([1.0, 2.0], [float("nan"), 1.0]),
]


@pytest.mark.parametrize("sizes, losses", REFUSED)
def test_what_no_law_goes_through_is_refused(sizes: list[float], losses: list[float]) -> None:
    with pytest.raises(ValueError, match="two points or more, of growing sizes"):
        fit(sizes, losses)

"""Combinations entry by entry: against PEFT's functions, closed forms and the laws that they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.compose import entrywise
from graft.compose.entrywise.dare import dare, dropped
from graft.compose.entrywise.dare_ties import dare_ties
from graft.compose.entrywise.magnitude import magnitude, trimmed
from graft.compose.entrywise.ties import elected, ties

merge_utils = pytest.importorskip("peft.utils.merge_utils")


@st.composite
def changes(draw, least=1):
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(draw(st.integers(least, 4)))]


def density_of(own, share):
    """A density at which PEFT, which rounds down, keeps as many entries as we do."""
    size = own[0].numel()
    return min((max(1, round(share * size)) + 0.25) / size, 1.0)


quick = settings(max_examples=40, deadline=None)


@quick
@given(changes(), st.floats(0.05, 0.95))
def test_ties_and_magnitude_are_those_of_peft(own, share):
    density, ones = density_of(own, share), torch.ones(len(own), dtype=torch.float64)
    torch.testing.assert_close(ties(own, density=density), merge_utils.ties(own, ones, density))
    torch.testing.assert_close(magnitude(own, density=density), merge_utils.magnitude_prune(own, ones, density))


@quick
@given(changes(), st.floats(0.1, 1), st.integers(0, 1000))
def test_dare_is_that_of_peft_for_the_same_masks(own, density, seed):
    torch.manual_seed(seed)
    masks = [(torch.rand(c.shape) < density).double() for c in own]
    for function, peft in ((dare, merge_utils.task_arithmetic), (dare_ties, merge_utils.ties)):
        torch.manual_seed(seed)
        ours = function(own, density=density)
        kept, ones = [m * c / density for m, c in zip(masks, own)], torch.ones(len(own), dtype=torch.float64)
        with pytest.warns(UserWarning) if function is dare_ties else torch.no_grad():  # a density of 1 does not prune
            theirs = peft(kept, ones, **({"density": 1.0} if function is dare_ties else {}))
        torch.testing.assert_close(ours, theirs)


def test_the_mean_of_many_dares_is_the_sum():
    torch.manual_seed(0)
    own = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    many = torch.stack([dare(own, density=0.3) for _ in range(20_000)])
    deviation = (sum(c.square() for c in own) * (1 / 0.3 - 1) / len(many)).sqrt()
    assert ((many.mean(0) - sum(own)).abs() < 5 * deviation).all()
    share = (dropped(torch.ones(200, 200), 0.3) > 0).float().mean()
    assert abs(share - 0.3) < 0.01


@quick
@given(changes(), st.floats(0.05, 1))
def test_what_is_trimmed_is_smaller_than_what_stays(own, density):
    kept = trimmed(own[0], density)
    chosen = kept != 0
    assert chosen.sum() == round(density * kept.numel())
    assert torch.equal(kept[chosen], own[0][chosen])
    if 0 < chosen.sum() < chosen.numel():
        assert own[0][chosen].abs().min() >= own[0][~chosen].abs().max()


@quick
@given(changes())
def test_an_elected_entry_is_the_mean_of_those_that_agree(own):
    result = elected(own)
    for place in range(result.numel()):
        values = [c.flatten()[place].item() for c in own]
        agree = [v for v in values if v * sum(values) > 0]
        assert result.flatten()[place].item() == pytest.approx(sum(agree) / len(agree) if agree else 0.0)


@quick
@given(changes(2), st.floats(0.05, 1), st.sampled_from(["ties", "magnitude"]), st.floats(0.1, 3))
def test_order_does_not_matter_and_scale_and_sign_go_through(own, density, name, scale):
    function = entrywise.find(name)
    result = function(own, density=density)
    torch.testing.assert_close(function(own[::-1], density=density), result)
    torch.testing.assert_close(function([-scale * c for c in own], density=density), -scale * result)


def test_what_cancels_is_zero():
    one = torch.tensor([[1.0, -2.0]])
    assert not elected([one, -one]).any()


def test_every_file_is_found_and_explains_its_options():
    assert entrywise.names() == ["dare", "dare_ties", "magnitude", "ties"]
    for name in entrywise.names():
        for option in graft.core.hyper.keywords(entrywise.find(name)).values():
            assert option.doc and option.kinds and option.ranges

"""Who was asked for a loss, who answered, and what becomes of the answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.saved import Saved
from slap_stream.errors import FeedbackError
from slap_stream.selection.awaiting import Awaiting, check_feedback, find_questions, match_oldest
from slap_stream.selection.feedback import Answers
from slap_stream.selection.moments import Moments
from slap_stream.selection.state import Lookup
from tests import reference
from tests.laws import as_json
from tests.strategies import Array

COLUMNS, SKETCH_DIM = 3, 4


def rows_of(ids: Array) -> Array:
    """(n, COLUMNS) design rows that are a function of the id."""
    return (ids[:, None] * [1.0, 2.0, -0.5]).astype(np.float32)


LOOKUP = Lookup(num_samples=2**20, num_strata=8, rows_of=rows_of)


def ask(awaiting: Awaiting, step: int, *ids: int) -> None:
    """Ask for the losses of ids."""
    names = np.array(ids, np.int64)
    awaiting.ask(step, names, rows_of(names), names % 8)


@settings(max_examples=150)
@given(
    wanted=st.lists(st.integers(0, 4), max_size=8),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=10),
)
def test_matching_equals_its_twin(wanted: list[int], asked: list[tuple[int, int]]) -> None:
    table = np.array(asked, np.int64).reshape(-1, 2)
    index, known = match_oldest(np.array(wanted, np.int64), table[:, 0], table[:, 1])
    expected = reference.match_oldest(wanted, table[:, 0].tolist(), table[:, 1].tolist())
    assert known.tolist() == [match is not None for match in expected]
    assert index.tolist() == [match or 0 for match in expected]
    # No question is answered twice.
    assert len(set(index[known].tolist())) == np.count_nonzero(known)


def test_the_last_whole_batch_is_none_of_which_nothing_could_be_used() -> None:
    awaiting = Awaiting(4)
    assert awaiting.last_whole(3) is None
    for step, ids in enumerate(([1, 2, 3], [4, 5, 6], [7, 8, 9])):
        ask(awaiting, step, *ids)
    # Nothing of the last can be used, nor of the one before it; others stand in for them.
    for step, ids in ((2, [3, 1]), (1, [2])):
        last = awaiting.last_whole(3)
        assert last is not None
        assert last[0].tolist() == [[4, 5, 6], [7, 8, 9]][step - 1]
        ask(awaiting, step, *ids)
    # The first one is forgotten by now.
    last = awaiting.last_whole(3)
    assert last is not None
    assert last[0].tolist() == [2, 2, 2]
    assert last[1].tolist() == rows_of(last[0]).tolist()
    assert last[2].tolist() == [2, 2, 2]


def open_ids(awaiting: Awaiting) -> list[int]:
    """Ids whose losses are still awaited, in the order asked."""
    return [n for asked in awaiting.still_open() for n in asked.sample_id[asked.open].tolist()]


def close(ids: list[int], *lanes: Awaiting) -> None:
    """Answer these ids."""
    for match in find_questions(np.array(ids), lanes, "ids"):
        match.close()


def test_questions_are_open_until_answered_and_forgotten_when_old() -> None:
    awaiting = Awaiting(depth=2)
    assert open_ids(awaiting) == []
    ask(awaiting, 0, 1, 2)
    ask(awaiting, 1, 3)
    ask(awaiting, 2, 4, 5, 4)
    assert open_ids(awaiting) == [3, 4, 5, 4]
    close([5, 3], awaiting)
    assert open_ids(awaiting) == [4, 4]
    close([4], awaiting)
    assert open_ids(awaiting) == [4]
    assert awaiting.last() is not None, "answered or not"


def test_what_was_not_asked_for_lately_or_is_answered_is_refused_and_closes_nothing() -> None:
    lanes = [Awaiting(depth=4), Awaiting(depth=4)]
    ask(lanes[0], 3, 7, 8)
    ask(lanes[1], 1, 9, 7)
    close([7], *lanes)
    with pytest.raises(FeedbackError, match=r"got 2 others, first \[7, 5\]; the last 4 are"):
        close([7, 7, 9, 5], *lanes)
    assert [open_ids(lane) for lane in lanes] == [[7, 8], [9]]


def two_lanes(questions: list[tuple[int, list[int]]]) -> list[Awaiting]:
    """Lanes that have asked in turn, each at steps that rise by one to three."""
    lanes = [Awaiting(depth=4), Awaiting(depth=4)]
    for number, (late, ids) in enumerate(questions):
        ask(lanes[number % 2], number // 2 * 2 + late, *ids)
    return lanes


@settings(max_examples=150)
@given(
    questions=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 5), max_size=3)), max_size=6
    ),
    answered=st.integers(0, 5),
    backwards=st.booleans(),
)
def test_answers_go_to_the_oldest_question_over_all_lanes_searched_for_or_not(
    questions: list[tuple[int, list[int]]], answered: int, backwards: bool
) -> None:
    lanes = two_lanes(questions)
    for _ in range(answered):
        # Whole batches in the order asked need no search, unless their steps differ.
        oldest = [asked for lane in lanes for asked in lane.still_open()[:1]]
        ids = np.concatenate(
            [np.zeros(0, np.int64), *(asked.sample_id[asked.open] for asked in oldest)]
        )[:: -1 if backwards else 1]
        places = [
            (place, id(asked), position)
            for place, lane in enumerate(lanes)
            for asked in lane.still_open()
            for position in np.flatnonzero(asked.open).tolist()
        ]
        of_id = {id(asked): asked for lane in lanes for asked in lane.still_open()}
        expected = reference.match_oldest(
            ids.tolist(),
            [int(of_id[asked].sample_id[position]) for _, asked, position in places],
            [of_id[asked].step for _, asked, _ in places],
        )
        found: dict[int, tuple[int, int, int]] = {}
        for match in find_questions(ids, lanes, "ids"):
            answers = np.arange(len(ids))[match.of].tolist()
            positions = np.arange(len(match.asked.sample_id))[match.at].tolist()
            for answer, position in zip(answers, positions, strict=True):
                found[answer] = match.lane, id(match.asked), position
            names, x, _ = match.close()
            np.testing.assert_array_equal(names, ids[match.of])
            np.testing.assert_array_equal(x, rows_of(names))
        assert found == {n: places[match or 0] for n, match in enumerate(expected)}
        left = [place for n, place in enumerate(places) if n not in expected]
        assert sum(len(open_ids(lane)) for lane in lanes) == len(left)


@pytest.mark.parametrize(
    ("ids", "losses"), [([1, 2], [0.5]), ([[1]], [[0.5]]), ([1.0], [0.5]), (["a"], [0.5])]
)
def test_feedback_of_another_shape_or_kind_is_refused(ids: list[int], losses: list[float]) -> None:
    with pytest.raises(FeedbackError, match=r"ids and losses must be \(n,\) whole numbers and"):
        check_feedback(ids, losses)


def test_questions_survive_a_checkpoint() -> None:
    awaiting = Awaiting(depth=3)
    ask(awaiting, 4, 7, 8, 9)
    ask(awaiting, 5)
    ask(awaiting, 6, 7, 1)
    close([8, 9], awaiting)
    state = as_json(awaiting.state_dict())
    again = Awaiting(depth=3)
    ask(again, 0, 99)
    again.load_state_dict(Saved(state), LOOKUP)
    assert as_json(again.state_dict()) == state
    assert open_ids(again) == open_ids(awaiting) == [7, 7, 1]
    for match in find_questions(np.array([1, 7, 7]), [again], "ids"):
        names, x, source = match.close()
        np.testing.assert_array_equal(x, rows_of(names))
        np.testing.assert_array_equal(source, names % 8)
    assert open_ids(again) == []
    # Answering the copy leaves the state that it came from alone.
    assert as_json(awaiting.state_dict()) == state


def test_questions_of_a_longer_memory_are_taken_over_all() -> None:
    longer, shorter = Awaiting(depth=5), Awaiting(depth=2)
    for step in range(4):
        ask(longer, step, 10 + step)
    shorter.load_state_dict(Saved(as_json(longer.state_dict())), LOOKUP)
    assert open_ids(shorter) == [10, 11, 12, 13]
    # Each new one takes the place of the oldest.
    ask(shorter, 4, 14)
    assert open_ids(shorter) == [11, 12, 13, 14]


def test_weights_belong_to_questions_and_survive_a_checkpoint() -> None:
    awaiting = Awaiting(depth=2)
    names = np.array([4, 5, 6])
    awaiting.ask(0, names, rows_of(names), names % 8, np.array([1.0, 2.5, 4.0]))
    ask(awaiting, 1, 5)
    again = Awaiting(depth=2)
    again.load_state_dict(Saved(as_json(awaiting.state_dict())), LOOKUP)
    for one in (awaiting, again):
        found = find_questions(np.array([5, 6, 5]), [one], "ids")
        assert [match.asked.weight[match.at].tolist() for match in found] == [[2.5, 4.0], [1.0]]


def test_no_questions_survive_a_checkpoint_too() -> None:
    again = Awaiting(depth=3)
    again.load_state_dict(Saved(as_json(Awaiting(depth=3).state_dict())), LOOKUP)
    assert open_ids(again) == []


def answers_of(*, sketched: bool) -> Answers:
    """Three answers, then three of which one has a usable sketch."""
    answers = Answers(columns=COLUMNS, sketch_dim=SKETCH_DIM)
    first, second = np.array([1, 2, 3]), np.array([4, 5, 6])
    answers.add(first, rows_of(first), np.array([0.5, 1.5, 2.5]))
    sketches = np.array([[0, 0, 0, 0], [1, np.nan, 0, 0], [3, 0, 4, 0]], np.float32)
    answers.add(second, rows_of(second), np.ones(3), sketches if sketched else None)
    return answers


@pytest.mark.parametrize("sketched", [True, False])
def test_answers_add_up_without_sketches_that_have_no_direction(sketched: bool) -> None:
    answers = answers_of(sketched=sketched)
    assert len(answers) == 6
    expected = Moments.zeros(columns=COLUMNS, sketch_dim=SKETCH_DIM)
    expected.add_losses(rows_of(np.arange(1, 6)), np.array([0.5, 1.5, 2.5, 1.0, 1.0]))
    if sketched:
        unit = np.array([[0.6, 0.0, 0.8, 0.0]], np.float32)
        expected.add_sketched(rows_of(np.array([6])), np.ones(1), unit)
    else:
        expected.add_losses(rows_of(np.array([6])), np.ones(1))
    for name, total in answers.moments().to_dict().items():
        np.testing.assert_allclose(total, expected.to_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sketched", [True, False])
def test_answers_survive_a_checkpoint_bit_by_bit(sketched: bool) -> None:
    answers = answers_of(sketched=sketched)
    state = as_json(answers.state_dict())
    again = Answers(columns=COLUMNS, sketch_dim=SKETCH_DIM)
    again.load_state_dict(Saved(state), LOOKUP)
    assert as_json(again.state_dict()) == state
    late = np.array([9])
    for one in (answers, again):
        one.add(late, rows_of(late), np.array([3.0]), np.ones((1, SKETCH_DIM), np.float32))
    for name, total in answers.moments().to_dict().items():
        np.testing.assert_array_equal(again.moments().to_dict()[name], total)


def test_a_refresh_clears_the_answers() -> None:
    answers = answers_of(sketched=True)
    answers.clear()
    assert len(answers) == 0
    assert not any(np.any(total) for total in answers.moments().to_dict().values())
    again = answers_of(sketched=True)
    again.load_state_dict(Saved(as_json(answers.state_dict())), LOOKUP)
    assert len(again) == 0

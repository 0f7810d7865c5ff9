import random

import pytest

from lightning_oft.data.vision.splits import stratified_split

NAMES = [f"{'ab'[i % 3 == 0]}/{i}.png" for i in range(90)]
LABELS = [int(i % 3 == 0) for i in range(90)]


def test_parts_are_a_partition() -> None:
    parts = stratified_split(NAMES, LABELS, (0.1, 0.2))
    assert sorted(i for part in parts for i in part) == list(range(90))


def test_every_class_is_cut_in_the_same_proportion() -> None:
    parts = stratified_split(NAMES, LABELS, (0.1, 0.2))
    assert [[sum(LABELS[i] == label for i in part) for label in (0, 1)] for part in parts] == [
        [6, 3],
        [12, 6],
        [42, 21],
    ]


def test_order_found_in_does_not_matter() -> None:
    order = list(range(90))
    random.Random(0).shuffle(order)
    shuffled = stratified_split([NAMES[i] for i in order], [LABELS[i] for i in order], (0.2,))
    assert [{NAMES[order[i]] for i in part} for part in shuffled] == [
        {NAMES[i] for i in part} for part in stratified_split(NAMES, LABELS, (0.2,))
    ]


def test_seed_decides() -> None:
    assert stratified_split(NAMES, LABELS, (0.2,), 1) == stratified_split(NAMES, LABELS, (0.2,), 1)
    assert stratified_split(NAMES, LABELS, (0.2,), 1) != stratified_split(NAMES, LABELS, (0.2,), 2)


def test_a_class_of_one_stays_in_training() -> None:
    assert stratified_split(["a", "b"], [0, 1], (0.5, 0.4)) == [[], [], [0, 1]]


@pytest.mark.parametrize("fractions", [(-0.1,), (1.0,), (0.5, 0.5)])
def test_impossible_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="leave a training set"):
        stratified_split(NAMES, LABELS, fractions)

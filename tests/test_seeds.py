"""Randomness by name."""

from feddistill.federation.answer_files import draws
from feddistill.seeds import derive, generator


def test_names_decide():
    drawn = {derive(seed, "round", r, c) for seed in (0, 1) for r in range(20) for c in ("a", "b")}
    assert len(drawn) == 80
    assert all(0 <= d < 2**31 for d in drawn)


def test_seeds_are_the_same_on_every_machine():
    assert derive(0, "round", 1, "train") == 644594925


def test_generators_draw_the_same():
    assert generator(0, "x").random() == generator(0, "x").random()


def test_each_shard_of_an_answer_has_its_own_draws():
    assert len({draws(0, 1, "client-0", shard) for shard in range(3)}) == 3

"""Messages: everything that is wrong at once, in lines that stay readable whatever they name."""

import pytest

from lmeraser_jax.errors import UserError, join_limited, raise_all, shorten


def test_all_problems_are_raised_at_once():
    raise_all([])
    for problems, heading, text in (
        (["a"], "", "a"),
        (["a", "b"], "", "several things are wrong:\n- a\n- b"),
        (["a"], "why:", "why:\n- a"),
    ):
        with pytest.raises(UserError) as caught:
            raise_all(problems, heading)
        assert str(caught.value) == text
    with pytest.raises(UserError) as caught:
        raise_all([str(i) for i in range(50)], "why:", limit=2)
    assert str(caught.value) == "why:\n- 0\n- 1\n- ... (50 lines in all)"


def test_a_long_list_is_cut_and_counted():
    assert join_limited(range(3)) == "0, 1, 2" and join_limited(range(3), 3) == "0, 1, 2" and join_limited([]) == ""
    assert join_limited(iter("abcd"), 2) == "a, b, ... (4 in all)"


def test_a_value_is_one_short_line_whatever_it_holds():
    assert shorten("a b") == "a b" and shorten([1, "a"]) == "[1, 'a']" and shorten("é" * 80) == "é" * 80
    assert shorten("x" * 10**7, 4) == "xxxx... (10000000 characters)"
    assert shorten("a\nb\u202e") == "'a\\nb\\u202e'" and shorten("\ud800") == "'\\ud800'"
    assert shorten(10**5000) == "a large int"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shorten(deep) == "a large list"
    while deep:  # let it go without a deep recursion
        deep = deep[0]

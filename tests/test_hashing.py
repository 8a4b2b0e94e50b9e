"""Names for things: equal things get equal names, different things different ones, and hashes order stably."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from lmeraser_jax.hashing import (
    arrays_digest,
    canonical_json,
    digest,
    keyed_hash,
    parse_strict_json,
    philox,
    seed_words,
)


# JSON
def test_canonical_json_ignores_the_order_of_keys_only():
    one = {"b": [1, {"y": 2.5, "x": None}], "a": "ü"}
    other = {"a": "ü", "b": [1, {"x": None, "y": 2.5}]}
    assert canonical_json(one) == canonical_json(other) == '{"a":"ü","b":[1,{"x":null,"y":2.5}]}'
    assert digest(one) == digest(other) and digest([1, 2]) != digest([2, 1])
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_canonical_json_reads_back_exactly():
    value = {"rate": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "text": 'a"\\\n', "none": None, "yes": True}
    assert json.loads(canonical_json(value)) == value == parse_strict_json(canonical_json(value))


def test_canonical_json_refuses_what_is_not_finite():
    for value in (math.nan, math.inf, [1.0, -math.inf], {"a": {"b": math.nan}}):
        with pytest.raises(ValueError):
            digest(value)


def test_json_of_others_has_one_meaning_or_is_refused():
    assert parse_strict_json('{"a": [1, {"b": null}], "c": "ü"}') == {"a": [1, {"b": None}], "c": "ü"}
    for text, reason in (
        ("{", "Expecting"),
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ('{"b": {"a": 1, "a": 1}}', "a key occurs twice"),
        ("[NaN]", "not JSON compliant"),
        ('{"a": -Infinity}', "not JSON compliant"),
        ('"\\ud800"', "surrogates not allowed"),
        ("1" * 5000, "digits"),
        ("[" * 100_000, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_strict_json(text)


# keyed hashes
def test_a_hash_depends_on_the_seed_and_on_every_name():
    names = (("ab", "c"), ("a", "bc"), ("abc",), ("", "abc"), ("abc", ""), ("ä",))
    assert len({keyed_hash(seed, *group) for seed in (0, 1, "x") for group in names}) == 18
    assert keyed_hash(0, "a") == keyed_hash(0, "a") == keyed_hash("0", "a") and len(keyed_hash(0, "a")) == 16


def test_hashes_are_pinned():
    """Changing the hash would silently move every sample, order and holdout of existing workdirs."""
    assert keyed_hash(7, "sample", "digit-0001").hex() == "6d81b17caebf85ee741ffd5a6d29ba61"
    assert seed_words("digit-0001").tolist() == [3654164559, 296508776]


def test_the_words_of_a_name_are_two_uint32():
    words = seed_words("a")
    assert words.shape == (2,) and words.dtype == np.uint32
    assert len({seed_words(f"record-{i}").tobytes() for i in range(200)}) == 200


def test_a_random_stream_depends_on_its_seed_and_names_and_on_no_other_stream():
    one, other = philox(5, "order", "k", "1"), philox(5, "order", "k", "1")
    np.testing.assert_array_equal(one.permutation(1000), other.permutation(1000))
    streams = [philox(5, "order", "k"), philox(6, "order", "k"), philox(5, "order", "l"), philox(5, "orderk")]
    assert len({stream.integers(2**62) for stream in streams}) == 4
    one, other = philox(0, "a"), philox(0, "b")
    one.integers(2**62, size=100)
    assert other.integers(2**62) == philox(0, "b").integers(2**62)


# arrays
def test_a_digest_of_arrays_ignores_the_order_of_keys_and_the_layout(rng):
    a, b = rng.normal(size=(3, 4)), np.arange(5)
    assert arrays_digest({"a": a, "b": b}) == arrays_digest({"b": b, "a": np.asfortranarray(a)})
    assert arrays_digest({"a": a.T}) == arrays_digest({"a": a.T.copy()})


def test_a_digest_of_arrays_sees_everything_else():
    base, values = np.arange(6, dtype=np.int32), np.arange(4)
    changed = base.copy()
    changed[-1] ^= 1
    brain, half = values.astype(ml_dtypes.bfloat16), values.astype(np.float16)
    arrays = [base, base.view(np.float32), base.view(np.uint32), base.reshape(2, 3), base.reshape(3, 2), changed]
    arrays += [np.asarray(np.float32(3)), np.array([3], np.float32), np.zeros(2), -np.zeros(2)]
    arrays += [brain, half, brain.view(np.float16), half.view(ml_dtypes.bfloat16)]
    variants = [{"a": array} for array in arrays]
    variants += [
        {},
        {"b": base},
        *({"a": base[:cut], "b": base[cut:]} for cut in (3, 4, 6)),
        {"a": base, "b": base[:1]},
    ]
    assert len({arrays_digest(variant) for variant in variants}) == len(variants)
    assert arrays_digest({"a": brain}) == arrays_digest({"a": brain.copy()})

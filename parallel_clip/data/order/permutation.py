"""Random permutations of range(n), computed for single numbers: nothing is stored, however large n
is.

A Feistel network over pairs (high, low) with 0 <= high < a, 0 <= low < b and a * b just above n:
each round adds to one of them a random function of the other, which can be undone, so the network
is a permutation of a * b numbers; one that comes out at n or above goes through again until it does
not (cycle walking). Black and Rogaway (2002), "Ciphers with Arbitrary Finite Domains". The random
function is the finalizer of SplitMix64: Steele, Lea and Flood (2014), "Fast Splittable Pseudorandom
Number Generators".
"""

import hashlib

import numpy as np

_ROUNDS = 10
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def name_to_int(*name: int | str) -> int:
    """A 128-bit integer from a name such as (seed, "window", 3): equal on every machine."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def key_of(*name: int | str) -> np.uint64:
    """64 bits from a name."""
    return np.uint64(name_to_int(*name) % 2**64)


def subkey(key: np.ndarray | np.uint64, number: np.ndarray) -> np.ndarray:
    """A key for each (key, number), uint64 as the two broadcast."""
    return _mixed(np.atleast_1d(key) + np.asarray(number).astype(np.uint64) * _GAMMA)


def permuted(places: np.ndarray, size: int | np.ndarray, key: np.uint64 | np.ndarray) -> np.ndarray:
    """The images of `places` under the permutation of range(size) that `key` names.

    places: int64 [n], 0 <= place < size; size and key: one for all, or one for each. -> int64 [n]
    """
    places = np.asarray(places, np.int64)
    size = np.broadcast_to(np.asarray(size, np.int64), places.shape)
    key = np.broadcast_to(key, places.shape)
    result = places.copy()
    walking = np.arange(len(places))
    while len(walking):
        through = _network(result[walking], size[walking], key[walking])
        result[walking] = through
        walking = walking[through >= size[walking]]
    return result


def _network(numbers: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass of the network, in range(a * b)."""
    a = np.ceil(np.sqrt(size)).astype(np.int64)  # of any size near the root: both sides agree
    b = -(-size // a)
    high, low = numbers // b, numbers % b
    for number in range(0, _ROUNDS, 2):
        high = (high + _random(key, number, low, a)) % a
        low = (low + _random(key, number + 1, high, b)) % b
    return high * b + low


def _random(key: np.ndarray, number: int, value: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A random function of `value`, another one for each key and round."""
    bits = _mixed(subkey(key, np.int64(number)) + value.astype(np.uint64))
    return (bits % below.astype(np.uint64)).astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = bits + _GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX[1]
    return bits ^ (bits >> np.uint64(31))

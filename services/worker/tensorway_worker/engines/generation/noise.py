"""Noise for draws that depends on (seed, position, token id) and on nothing else.

SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) makes a 64-bit key of seed and position; Wellons'
`lowbias32` (github.com/skeeto/hash-prospector) mixes the token id, then the id with the key. All of it is integer arithmetic that gives the
same on every device; the two logarithms after it may differ in the last bit between a CPU and a GPU.
"""

from __future__ import annotations

from typing import Final

import torch

#: 2^64 / golden ratio, odd: SplitMix64's step.
_GOLDEN: Final = 0x9E3779B97F4A7C15


def gumbel(seed: torch.Tensor, position: torch.Tensor, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, from about -2.8 to 22.2, of every token of each row. int64 [r] twice -> float32 [r, vocabulary]

    With u the 31 hashed bits as a share of 1, it is -log(-log(1 - u)): the tokens that may win have a small u, where a float32 tells all
    2^31 values apart.
    """
    key = _split_mix(_split_mix(seed) + position * _signed(_GOLDEN))
    first, second = key.to(torch.int32).to(device).unsqueeze(1), (key >> 32).to(torch.int32).to(device).unsqueeze(1)
    ids = _low_bias(torch.arange(vocabulary, dtype=torch.int32, device=device))
    mixed = torch.bitwise_xor(ids, first).mul_(0x7FEB352D)
    mixed.bitwise_xor_(_shifted(mixed, 15)).add_(second).mul_(_signed(0x846CA68B, 32))
    mixed.bitwise_xor_(_shifted(mixed, 16)).bitwise_and_(0x7FFFFFFF)
    share = mixed.to(torch.float32).mul_(-(2.0**-31)).sub_(2.0**-32).clamp_min_(-(1 - 2.0**-24))
    return share.log1p_().neg_().log_().neg_()


def _low_bias(numbers: torch.Tensor) -> torch.Tensor:
    """Wellons' `lowbias32`. int32 [n] -> int32 [n]"""
    mixed = numbers ^ _shifted(numbers, 16)
    mixed = mixed.mul_(0x7FEB352D)
    mixed = mixed ^ _shifted(mixed, 15)
    mixed = mixed.mul_(_signed(0x846CA68B, 32))
    return mixed ^ _shifted(mixed, 16)


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts int32 to the right as if it were unsigned."""
    return (numbers >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _split_mix(numbers: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function. int64 [r], its bits taken as unsigned -> int64 [r]"""
    mixed = numbers + _signed(_GOLDEN)
    mixed = (mixed ^ ((mixed >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ ((mixed >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def _signed(number: int, bits: int = 64) -> int:
    """The signed integer of the same bits."""
    return number - (1 << bits) if number >> (bits - 1) else number

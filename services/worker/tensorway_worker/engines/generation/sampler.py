"""Draws the next token of every row of a step at once.

The order is that of transformers' `generate`: repetition penalty, bans, temperature, top-k, top-p, min-p; then the draw.

A draw is the largest of score + Gumbel noise (Gumbel, 1954; "Gumbel-max"), where the noise of a token is a hash of (seed, position, token
id) and of nothing else. So a row draws the same token whoever shares its step, and a stream that goes on elsewhere draws what it would
have drawn. The hash is in `noise.py`.

Everything that is done to a row is done within the row, in an order that does not depend on how many rows there are: no reduction here is
one that torch splits between threads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy
import torch

from tensorway_worker.engines.generation.noise import gumbel
from tensorway_worker.engines.generation.requests import Sampling

#: One row: how it draws, the absolute index (in prompt + answer) of the token to be drawn, token ids that may not be drawn, distinct ids of
#: prompt and answer (needed with a repetition penalty only), top log-probabilities wanted (None: not even the token's own).
RowToDraw = tuple[Sampling, int, Collection[int], Collection[int], int | None]

PREFIX: Final = "~draw."

#: Lower temperatures count as this one: logits divided by it stay finite.
_LEAST_TEMPERATURE: Final = 1e-5
#: How many of the most likely tokens top-p looks at first, before it takes more and at last sorts all.
_TOP_P_LADDER: Final = (64, 512, 4096)
_NO_PAIRS: Final = torch.zeros((2, 0), dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row of a step draws, as tensors that travel between ranks. r: rows. On the CPU, whatever device draws: what is to be done
    is decided by looking at them, which would make a GPU wait."""

    #: Temperature (0: the most likely token), top-p, min-p and repetition penalty. float32 [r, 4]
    floats: torch.Tensor
    #: Top-k (0: all), the bits of the seed, the absolute index of the token to be drawn. int64 [r, 3]
    words: torch.Tensor
    #: (row, token id) of what may not be drawn. int64 [2, m]
    banned: torch.Tensor
    #: (row, token id) of each distinct token so far, of rows with a repetition penalty. int64 [2, h]
    seen: torch.Tensor
    #: Most top log-probabilities that a row wants; -1: none wants any log-probability. int64 [1]
    num_top: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[RowToDraw]) -> SamplingRows:
        """The tensors of `rows`."""
        floats = numpy.array([(s.temperature, s.top_p, s.min_p, s.repetition_penalty) for s, *_ in rows], numpy.float32)
        words = numpy.array([(s.top_k, s.seed, position) for s, position, *_ in rows], numpy.uint64)
        wanted = [row[4] for row in rows if row[4] is not None]
        return cls(
            floats=torch.from_numpy(floats.reshape(-1, 4)),
            words=torch.from_numpy(words.reshape(-1, 3).view(numpy.int64)),
            banned=_pairs([row[2] for row in rows]),
            seen=_pairs([row[3] if row[0].repetition_penalty != 1.0 else () for row in rows]),
            num_top=torch.tensor([max(wanted) if wanted else -1]),
        )

    @classmethod
    def from_tensors(cls, carry: Mapping[str, torch.Tensor]) -> SamplingRows:
        """What `to_tensors` gave, found among others."""
        words, banned, seen, num_top = (carry[PREFIX + name] for name in ("words", "banned", "seen", "num_top"))
        return cls(carry[PREFIX + "floats"].view(torch.float32), words, banned, seen, num_top)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Under names that begin with `~draw.`. All are integers (of floats, the bits): all stages of a pipeline get those as they are."""
        bits = self.floats.view(torch.int32)
        named = (("floats", bits), ("words", self.words), ("banned", self.banned), ("seen", self.seen), ("num_top", self.num_top))
        return {PREFIX + name: tensor for name, tensor in named}

    def only(self, places: torch.Tensor) -> SamplingRows:
        """The rows at `places` (int64 [n]), without what has been done already: bans, penalties, log-probabilities."""
        return SamplingRows(self.floats[places], self.words[places], _NO_PAIRS, _NO_PAIRS, torch.tensor([-1]))

    @property
    def temperature(self) -> torch.Tensor:
        """float32 [r]"""
        return self.floats[:, 0]

    @property
    def top_p(self) -> torch.Tensor:
        """float32 [r]"""
        return self.floats[:, 1]

    @property
    def min_p(self) -> torch.Tensor:
        """float32 [r]"""
        return self.floats[:, 2]

    @property
    def penalty(self) -> torch.Tensor:
        """float32 [r]"""
        return self.floats[:, 3]

    @property
    def top_k(self) -> torch.Tensor:
        """int64 [r]"""
        return self.words[:, 0]

    @property
    def seed(self) -> torch.Tensor:
        """int64 [r]: the bits of an unsigned one."""
        return self.words[:, 1]

    @property
    def position(self) -> torch.Tensor:
        """int64 [r]"""
        return self.words[:, 2]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step drew. r: rows, k: most top log-probabilities that a row wanted."""

    #: int64 [r]
    token: torch.Tensor
    #: Natural logarithm of the token's probability in the model's own distribution. float32 [r]; [0] where no row wants any
    logprob: torch.Tensor
    #: The most likely tokens, most likely first. int64 [r, k]
    top_ids: torch.Tensor
    #: float32 [r, k]
    top_logprobs: torch.Tensor

    @classmethod
    def from_tensors(cls, carry: Mapping[str, torch.Tensor]) -> Sampled:
        """What `to_tensors` gave, found among others."""
        return cls(carry["token"], carry["logprob"], carry["top_ids"], carry["top_logprobs"])

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Under the names of the fields."""
        return {"token": self.token, "logprob": self.logprob, "top_ids": self.top_ids, "top_logprobs": self.top_logprobs}


def sample(logits: torch.Tensor, rows: SamplingRows) -> Sampled:
    """One token for each row.

    Args:
        logits: [r, vocabulary], any floating dtype, on the device that is to draw; left as it is. On the meta device, the result has the
            right shapes (k: 0 where `rows` is on the meta device too).
        rows: on the CPU.

    A row at temperature 0 takes the largest logit after penalty and bans, the first of equal ones. Tokens that tie with the last one that
    top-k or top-p keeps are kept as well (transformers does so for top-k; for top-p it lets the order of its sort decide).
    """
    num_top = -1 if rows.num_top.is_meta else min(int(rows.num_top[0]), logits.shape[-1])
    logprob, top_ids, top_logprobs = _logprobs(logits, num_top)
    if logits.is_meta:
        token = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
    else:
        token = _tokens(_penalised(logits.detach(), rows), rows)
    own = logprob.gather(1, token.unsqueeze(1)).squeeze(1) if num_top >= 0 else logprob
    return Sampled(token, own, top_ids, top_logprobs)


def _logprobs(logits: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of all tokens [r, vocabulary] (or [0]), ids and log-probabilities of the `num_top` most likely ones [r, k]."""
    if num_top < 0:
        empty = logits.new_empty((logits.shape[0], 0), dtype=torch.float32)
        return logits.new_empty(0, dtype=torch.float32), empty.to(torch.int64), empty
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    top_logprobs, top_ids = logprobs.topk(num_top, dim=-1)
    return logprobs, top_ids, top_logprobs


def _penalised(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """float32 scores after penalty and bans; `logits` itself where it is float32 and there are none."""
    if not rows.seen.shape[1] and not rows.banned.shape[1]:
        return logits.float()
    scores = logits.to(torch.float32, copy=True)
    if rows.seen.shape[1]:
        row, token = rows.seen.to(scores.device)
        penalty = rows.penalty.to(scores.device)[row]
        found = scores[row, token]
        scores[row, token] = torch.where(found < 0, found * penalty, found / penalty)
    if rows.banned.shape[1]:
        row, token = rows.banned.to(scores.device)
        scores[row, token] = -torch.inf
    return scores


def _tokens(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Greedy rows take the first of the largest; the noise is made for the other rows only. [r]"""
    is_drawn = rows.temperature.cpu() > 0
    num_drawn = int(is_drawn.sum())
    if num_drawn == len(is_drawn) > 0:
        return _drawn(scores, rows)
    token = scores.argmax(dim=-1)
    if num_drawn:
        places = is_drawn.nonzero().squeeze(1)
        there = places.to(scores.device)
        token[there] = _drawn(scores[there], rows.only(places))
    return token


def _drawn(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Tokens of rows at temperatures above 0. [r, vocabulary] -> [r]"""
    cut = cut_scores(scores, rows)
    return cut.add_(gumbel(rows.seed, rows.position, cut.shape[1], cut.device)).argmax(dim=-1)


def cut_scores(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """What a draw chooses from: scores over temperature, -inf where top-k, top-p or min-p cuts a token off.

    Args:
        scores: float32 [r, vocabulary], after penalty and bans; left as they are.
        rows: at temperatures above 0.
    """
    device = scores.device
    scores = scores / rows.temperature.clamp_min(_LEAST_TEMPERATURE).to(device).unsqueeze(1)
    if bool((rows.top_k > 0).any()):
        _keep_top_k(scores, rows.top_k)
    if bool((rows.top_p < 1).any()):
        _keep_top_p(scores, rows.top_p)
    if bool((rows.min_p > 0).any()):
        least = scores.amax(dim=-1, keepdim=True) + rows.min_p.log().to(device).unsqueeze(1)
        scores.masked_fill_(scores < least, -torch.inf)
    return scores


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> None:
    """Scores below a row's k-th largest become -inf; k = 0 keeps all."""
    vocabulary = scores.shape[1]
    most = min(int(top_k.max()), vocabulary)
    ordered = scores.topk(most, dim=-1).values
    last = ordered.gather(1, (top_k.clamp(1, most) - 1).to(scores.device).unsqueeze(1))
    is_off = (top_k <= 0).to(scores.device).unsqueeze(1)
    scores.masked_fill_(scores < last.masked_fill_(is_off, -torch.inf), -torch.inf)


def _keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> None:
    """Scores of tokens behind those whose probabilities reach a row's `top_p` become -inf; 1 keeps all."""
    vocabulary = scores.shape[1]
    probabilities = scores.softmax(dim=-1)
    least = torch.zeros(len(scores), 1, device=scores.device)
    places = (top_p < 1).nonzero().squeeze(1).to(scores.device)
    # A GPU sorts faster than it tells that a shorter look was enough.
    widths = (*(width for width in _TOP_P_LADDER if width < vocabulary and scores.is_cpu), vocabulary)
    for width in widths:
        ordered = probabilities[places].topk(width, dim=-1).values
        wanted = top_p.to(places.device)[places].unsqueeze(1)
        before = ordered.cumsum(dim=-1) - ordered
        kept = (before < wanted).sum(dim=-1, keepdim=True).clamp_min(1)
        least[places] = ordered.gather(1, kept - 1)
        if width == vocabulary:
            break
        places = places[(kept == width).squeeze(1)]
        if not len(places):
            break
    scores.masked_fill_(probabilities < least, -torch.inf)


def _pairs(ids_of_rows: Sequence[Collection[int]]) -> torch.Tensor:
    """(row, id) of every id. int64 [2, n]"""
    if not any(map(len, ids_of_rows)):
        return _NO_PAIRS
    counts = [len(ids) for ids in ids_of_rows]
    ids = numpy.concatenate([numpy.fromiter(ids, numpy.int64, len(ids)) for ids in ids_of_rows])
    return torch.from_numpy(numpy.stack((numpy.repeat(numpy.arange(len(counts)), counts), ids)))

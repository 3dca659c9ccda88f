"""Which graphs process a number of new tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Consecutive new tokens that one graph processes."""

    begin: int
    end: int
    length: int
    """Of the graph. It is filled up with tokens that do not count."""
    fresh: bool
    """Whether nothing is cached yet."""

    @property
    def filling(self) -> int:
        """How many tokens are filled in."""
        return self.length - (self.end - self.begin)


@dataclass(frozen=True)
class Lengths:
    """The lengths of all graphs, each increasing."""

    prompts: tuple[int, ...]
    """Of fresh calls. Their graphs give the logits of the last token only."""
    steps: tuple[int, ...]
    """Of continuing calls. The first is 1. Each may be filled up."""
    pieces: tuple[int, ...] = ()
    """Of continuing calls that process a long prompt. They are never filled up."""
    fill_left: bool = False
    """Whether fresh calls are filled up at the left. Others are at the right, and continuing calls always."""

    @classmethod
    def of(cls, prompts: tuple[int, ...], steps: tuple[int, ...], max_length: int, recurrent: bool) -> Lengths:
        """Lengths for a model.

        Args:
            prompts: of the prompts, increasing.
            steps: of what follows, increasing.
            max_length: of whole sequences.
            recurrent: whether each token changes a state. Then a filled-in token is masked, which models do at the left
                of a prompt only, and a continuing call has one token.
        """
        if recurrent:
            return cls(prompts, (1,), fill_left=True)
        steps = tuple(sorted({1, *steps}))
        return cls(prompts, steps, (prompts[-1],) if max_length > prompts[-1] > steps[-1] else ())

    @property
    def slack(self) -> int:
        """How many tokens more than it shall hold a cache needs room for."""
        if not self.fill_left:
            return self.steps[-1] - 1
        return max(b - a - 1 for a, b in zip((0, *self.prompts), self.prompts, strict=False))

    def plan(self, count: int, kept: int, cached: int) -> list[Piece]:
        """How new tokens are processed.

        Args:
            count: the number of new tokens, at least 1.
            kept: of how many of the last tokens the logits are wanted.
            cached: the number of cached tokens.
        """
        found: list[Piece] = []
        end = count  # of what `pieces` may process
        done = 0
        if not cached:
            end = count - kept + 1  # a fresh graph gives the logits of its last token only
            # The first piece is the incomplete one: what is filled in behind it is overwritten by the next.
            longest = self.prompts[-1]
            first = end if end <= longest else (end % longest if longest in self.pieces else 0) or longest
            found.append(Piece(0, first, next(p for p in self.prompts if p >= first), fresh=True))
            done = first
        while done < count:
            left = (end if done < end else count) - done
            whole = [p for p in self.pieces if p <= left and done < end]
            length = whole[-1] if whole else next((s for s in self.steps if s >= left), self.steps[-1])
            found.append(Piece(done, done + min(left, length), length, fresh=False))
            done = found[-1].end
        return found

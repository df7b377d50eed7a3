"""Stop sequences: found wherever they lie in the text, never shown half."""

from collections.abc import Sequence


class StopMatcher:
    """Watches one generation's text for the first stop sequence to be complete.

    Text that may turn out to be the beginning of a stop sequence is held back until it is clear.
    The outcome does not depend on how the text is split into pieces. Where several sequences end
    at the same character, the longest counts.
    """

    def __init__(self, stop_sequences: Sequence[str], include_stop_text: bool) -> None:
        """Prepare to match.

        Args:
            stop_sequences: none of them empty; none at all is fine.
            include_stop_text: whether the stop sequence itself belongs to the text.

        Raises:
            ValueError: an empty stop sequence, which would be found before anything is said.
        """
        if "" in stop_sequences:
            raise ValueError("a stop sequence is empty")
        self._automata = [_Automaton(sequence) for sequence in stop_sequences]
        self._include_stop_text = include_stop_text
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop sequence that was found, or None."""
        return self._matched

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """Take the next piece of text and return what may be shown now.

        After a match nothing more is returned, whatever is fed.

        Args:
            may_stop: False: a sequence that is complete within this piece does not count.
        """
        if self._matched is not None:
            return ""
        if not self._automata:
            return text
        seen = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = [a.sequence for a in self._automata if a.advance(character)]
            if complete and may_stop:
                return self._finish(seen[:position], max(complete, key=len))
        unclear = max(automaton.matching for automaton in self._automata)
        shown = seen[: len(seen) - unclear]
        self._held = seen[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, when the generation ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _finish(self, text: str, sequence: str) -> str:
        self._matched, self._held = sequence, ""
        return text if self._include_stop_text else text.removesuffix(sequence)


class _Automaton:
    """Knuth, Morris and Pratt's matcher (1977): constant time per character, amortised."""

    def __init__(self, sequence: str) -> None:
        self.sequence = sequence
        self.matching = 0  # characters at the end of the text that begin `sequence`
        self._fallback = [0] * (len(sequence) + 1)  # next shorter beginning, for each `matching`
        border = 0
        for length in range(1, len(sequence)):
            while border and sequence[length] != sequence[border]:
                border = self._fallback[border]
            border += sequence[length] == sequence[border]
            self._fallback[length + 1] = border

    def advance(self, character: str) -> bool:
        """Whether the sequence is complete with this character."""
        matching = self.matching
        while matching and self.sequence[matching] != character:
            matching = self._fallback[matching]
        matching += self.sequence[matching] == character
        complete = matching == len(self.sequence)
        self.matching = self._fallback[matching] if complete else matching
        return complete

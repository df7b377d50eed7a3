"""Features of pictures as vLLM v1 keeps them: one bound for those in use and those left over."""

from collections import OrderedDict

from tessera.router.request import PreparedImage


class EncoderCache:
    """Features by content hash. Those nobody reads any more stay until others need the room."""

    def __init__(self, size: int) -> None:
        self.size = size  # features, one for each prompt token of a picture
        self.used = 0
        self._readers: dict[bytes, set[int]] = {}
        self._idle: OrderedDict[bytes, int] = OrderedDict()  # least recently read first
        self._idle_tokens = 0

    def hold(self, image: PreparedImage, sequence_id: int) -> bool:
        """Keep a picture's features for a sequence, if they are here."""
        readers = self._readers.get(image.content_hash)
        if readers is None:
            return False
        readers.add(sequence_id)
        self._idle_tokens -= self._idle.pop(image.content_hash, 0)
        return True

    def make_room(self, tokens: int) -> bool:
        """Forget idle pictures until `tokens` more features fit; False if they cannot."""
        if self.used - self._idle_tokens + tokens > self.size:
            return False
        while self.used + tokens > self.size:
            content_hash, idle = self._idle.popitem(last=False)
            del self._readers[content_hash]
            self.used -= idle
            self._idle_tokens -= idle
        return True

    def store(self, image: PreparedImage, sequence_id: int) -> None:
        """Note features that a step computes; `make_room` came before."""
        self._readers[image.content_hash] = {sequence_id}
        self.used += image.num_tokens

    def release(self, image: PreparedImage, sequence_id: int) -> None:
        """Note that a sequence reads a picture no more, if it did."""
        readers = self._readers.get(image.content_hash)
        if not readers or sequence_id not in readers:
            return
        readers.remove(sequence_id)
        if not readers:
            self._idle[image.content_hash] = image.num_tokens
            self._idle_tokens += image.num_tokens

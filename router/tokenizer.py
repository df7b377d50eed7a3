"""Text to token ids and back, with pictures in between.

Users may write anything, the image token's own text included. It must never become the image token,
because the number of image tokens decides how many picture features a shard fills in. So the token
is renamed when the tokenizer is loaded, to a name nobody can guess: only `encode_parts` can write
it, and a literal `<image>` is plain text with no escaping.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tessera.router.errors import ValidationError
from tessera.router.model_files import ModelFiles, ModelFilesError, read_json, token_text
from tessera.router.pieces import PieceKind, Pieces, piece_kind
from tessera.router.request import PlacedImage, PreparedImage


class Tokenizer:
    """The tokenizer.json of one model. Thread-safe: only what is remembered of it grows."""

    def __init__(
        self,
        definition: Mapping[str, Any],
        *,
        image_token: str | None = None,
        image_token_id: int | None = None,
        bos_token: str | None = None,
        add_bos_token: bool = False,
        eos_token: str | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        """Take a parsed tokenizer.json into service.

        Args:
            definition: the content of tokenizer.json.
            image_token: text of the token that stands for pictures; None: a text model.
            image_token_id: the id the model knows it by.
            bos_token: the token sequences begin with.
            add_bos_token: whether prompts get it; counts only where `definition` itself has no rule
                (post-processor) for special tokens.
            eos_token: the token that ends a generation.
            eos_ids: more tokens that do.

        Raises:
            ModelFilesError: the definition is damaged, or lacks one of these tokens.
        """
        self.image_token, self.image_token_id = image_token, image_token_id
        self._placeholder = f"<image-{secrets.token_hex(16)}>"
        self._backend = _load(_renamed(definition, image_token, self._placeholder))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._check_image_token()
        eos_id = None if eos_token is None else self._backend.token_to_id(eos_token)
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else set())
        self.bos_id = None if bos_token is None else self._backend.token_to_id(bos_token)
        has_rule = definition.get("post_processor") is not None
        self._prepended = () if has_rule or not add_bos_token else _known(bos_token, self.bos_id)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._pieces = Pieces(self._token_names(), piece_kind(definition.get("decoder")))
        self._described: dict[int, tuple[str, bool, bytes | None]] = {}  # by token id

    @classmethod
    def from_folder(cls, folder: Path, config_path: Path | None = None) -> "Tokenizer":
        """The tokenizer of a model's folder.

        Args:
            config_path: read instead of the folder's tokenizer_config.json.

        Raises:
            ModelFilesError: no tokenizer.json, or files that contradict each other.
        """
        files = ModelFiles.read(folder)
        config = _special_tokens(folder, config_path)
        tokenizer = cls(
            _definition(folder),
            image_token=files.image_token,
            image_token_id=files.image_token_id,
            bos_token=token_text(config.get("bos_token")),
            add_bos_token=bool(config.get("add_bos_token")),
            eos_token=token_text(config.get("eos_token")),
            eos_ids=files.eos_ids,
        )
        tokenizer.check_vocab_size(files.vocab_size)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._pieces)

    @property
    def kind(self) -> PieceKind:
        """How token texts join up."""
        return self._pieces.kind

    def definition(self) -> str:
        """Its tokenizer.json, with the image token under its own name."""
        text: str = self._backend.to_str()
        if self.image_token is None:
            return text
        return text.replace(json.dumps(self._placeholder), json.dumps(self.image_token))

    def encode_parts(self, parts: Sequence[str | object], add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt with a single image token for every part that is no text.

        The text is encoded once, as a whole. With `place_images` the ids equal those of
        transformers' LlavaNextProcessor, which repeats the image token in the text.

        Args:
            parts: texts and pictures in order.
            add_special_tokens: whether the tokenizer's rule (begin-of-sequence) applies; false for
                text that a chat template made, where the template writes it.

        Raises:
            ValidationError: text that is not Unicode, or pictures for a text model.
        """
        if self.image_token_id is None and not all(isinstance(part, str) for part in parts):
            raise ValidationError("this model takes text only; the request holds pictures")
        text = "".join(part if isinstance(part, str) else self._placeholder for part in parts)
        return self._encode(text, add_special_tokens)

    def place_images(
        self, ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
        """The ids with each image token repeated as often as its picture has features.

        Raises:
            ValidationError: there are more or fewer image tokens than pictures.
        """
        return self._expand(ids, images) if images else (tuple(ids), ())

    def encode_with_spans(self, text: str, add_special_tokens: bool) -> list[tuple[int, int, int]]:
        """Token id, first character and end of each token of `text`; (0, 0) for added tokens.

        Raises:
            ValidationError: text that is not Unicode.
        """
        encoding = self._checked_encoding(text, add_special_tokens)
        spans = [(id_, *span) for id_, span in zip(encoding.ids, encoding.offsets, strict=True)]
        prepended = self._prepended if add_special_tokens else ()
        return [*((id_, 0, 0) for id_ in prepended), *spans]

    def truncate_left(
        self, ids: Sequence[int], images: Sequence[PlacedImage], max_tokens: int
    ) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
        """The last `max_tokens` tokens of a prompt, a leading begin-of-sequence token kept.

        Pictures that fall out altogether are dropped.

        Raises:
            ValidationError: a picture would be cut in two.
        """
        if len(ids) <= max_tokens:
            return tuple(ids), tuple(images)
        head = tuple(ids[:1]) if ids[0] == self.bos_id else ()
        first = len(ids) - (max_tokens - len(head))  # of the tokens that stay
        for placed in images:
            if placed.offset < first < placed.offset + placed.image.num_tokens:
                raise ValidationError(
                    f"`truncate`={max_tokens} would cut a picture of {placed.image.num_tokens} "
                    "tokens in two; raise it or leave the picture out"
                )
        shift = first - len(head)
        kept = [p for p in images if p.offset >= first]
        moved = tuple(PlacedImage(placed.image, placed.offset - shift) for placed in kept)
        return head + tuple(ids[first:]), moved

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        if self.image_token is not None and not skip_special:
            text = text.replace(self._placeholder, self.image_token)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token's own text, None if there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return self.image_token_id if token == self.image_token else found

    def special_id(self, token: str) -> int | None:
        """The id of a token that is left out of texts for readers, None for any other text."""
        found = self.token_id(token)
        return found if found is not None and self.is_special(found) else None

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text in which it is not the first; "" outside the vocabulary.

        Bytes where the token is part of a character, or may be.
        """
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """`piece` as text, U+FFFD for bytes that are no character by themselves."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """`piece` as UTF-8."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode("utf-8")

    def token_utf8(self, token_id: int) -> bytes | None:
        """`token_bytes`, or None where a token's text depends on its neighbours."""
        return None if self.kind is PieceKind.OTHER else self.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out of texts for readers."""
        return token_id in self._special_ids

    def describe(self, token_id: int) -> tuple[str, bool, bytes | None]:
        """`token_text`, `is_special` and `token_utf8`, made once for each token."""
        found = self._described.get(token_id)
        if found is None:
            found = self.token_text(token_id), self.is_special(token_id), self.token_utf8(token_id)
            self._described[token_id] = found
        return found

    def check_vocab_size(self, rows: int) -> None:
        """Compare with the rows of the model's embedding.

        Raises:
            ModelFilesError: a token has no row.
        """
        if self.vocab_size > rows:
            raise ModelFilesError(
                f"tokenizer.json has token ids up to {self.vocab_size - 1}, but config.json says "
                f"vocab_size={rows}; the two belong to different models."
            )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._checked_encoding(text, add_special_tokens).ids
        return [*self._prepended, *ids] if add_special_tokens else ids

    def _checked_encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):
            raise ValidationError(
                "the prompt holds half a surrogate pair, which is no text"
            ) from None

    def _expand(
        self, ids: Sequence[int], images: Sequence[PreparedImage]
    ) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
        places = [index for index, id_ in enumerate(ids) if id_ == self.image_token_id]
        if len(places) != len(images):
            raise ValidationError(
                f"the prompt has {len(places)} places for {len(images)} pictures"
            )  # only a normaliser that rewrites special tokens could do that
        expanded: list[int] = []
        placed: list[PlacedImage] = []
        end = 0
        for place, image in zip(places, images, strict=True):
            expanded += ids[end:place]
            placed.append(PlacedImage(image, len(expanded)))
            expanded += [ids[place]] * image.num_tokens
            end = place + 1
        expanded += ids[end:]
        return tuple(expanded), tuple(placed)

    def _check_image_token(self) -> None:
        if self.image_token is None:
            return
        found = self._backend.token_to_id(self._placeholder)
        if found != self.image_token_id:
            has = "no such added token" if found is None else f"it as token {found}"
            raise ModelFilesError(
                f"config.json says that token {self.image_token_id} ({self.image_token!r}) stands "
                f"for pictures, but tokenizer.json has {has}; the two belong to different models."
            )

    def _token_names(self) -> list[str]:
        names = self._backend.get_vocab(with_added_tokens=True)
        if self.image_token is not None:
            names[self.image_token] = names.pop(self._placeholder)
        by_id = dict.fromkeys(range(max(names.values(), default=-1) + 1), "")
        by_id |= {id_: name for name, id_ in names.items()}
        return list(by_id.values())


def _load(definition: Mapping[str, Any]) -> Backend:
    try:
        return Backend.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError(f"tokenizer.json cannot be used: {error}.") from None


def _renamed(definition: Mapping[str, Any], token: str | None, name: str) -> Mapping[str, Any]:
    """`definition` with one added token under another name; unchanged if there is none."""
    added = definition.get("added_tokens") or []
    if token is None or all(entry.get("content") != token for entry in added):
        return definition
    renamed = [e | {"content": name} if e.get("content") == token else e for e in added]
    model = definition.get("model") or {}
    vocab = model.get("vocab")
    if isinstance(vocab, Mapping) and token in vocab:
        vocab = {name if key == token else key: id_ for key, id_ in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [piece, score] in order of ids
        vocab = [[name if piece == token else piece, score] for piece, score in vocab]
    return {**definition, "added_tokens": renamed, "model": {**model, "vocab": vocab}}


def _known(token: str | None, token_id: int | None) -> tuple[int, ...]:
    if token is None or token_id is None:
        raise ModelFilesError(
            f"tokenizer_config.json asks for a begin-of-sequence token ({token!r}) that "
            "tokenizer.json does not have."
        )
    return (token_id,)


def _definition(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise ModelFilesError(
            f"{folder} has a sentencepiece tokenizer.model but no tokenizer.json. Create it with: "
            'python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\" "
            "(needs transformers and sentencepiece)."
        )
    return read_json(path)


def _special_tokens(folder: Path, config_path: Path | None) -> Mapping[str, Any]:
    """tokenizer_config.json, completed by the older special_tokens_map.json."""
    older = read_json(folder / "special_tokens_map.json", {})
    if config_path is not None:
        return older | read_json(config_path)
    return older | read_json(folder / "tokenizer_config.json", {})

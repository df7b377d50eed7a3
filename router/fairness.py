"""Whose turn a request counts for: its bearer token, as a hash that tells nothing about it."""

from hashlib import blake2b

from starlette.datastructures import Headers

ANONYMOUS = ""
"""The key that all requests without a token share."""

KEY_BYTES = 16


def fairness_key(headers: Headers) -> str:
    """What requests of the same client have in common; `waiting.WaitingQueue` is fair between keys.

    Returns:
        32 hexadecimal digits made of the bearer token, which is kept nowhere, or `ANONYMOUS` where
        there is no token or more than one.
    """
    given = headers.getlist("authorization")
    scheme, _, token = given[0].strip().partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        return ANONYMOUS
    return blake2b(token.strip().encode("latin-1"), digest_size=KEY_BYTES).hexdigest()

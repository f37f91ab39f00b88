from __future__ import annotations

import pytest

from errors import BadRequestError
from state_token import StateToken, new_id

ID = "abcdefghijklmnop-_0123"


def test_token_comes_back_as_it_went() -> None:
    """What CVAT carries is the text; parsing it gives the same token."""
    token = StateToken(new_id(), new_id())

    assert StateToken.parse(str(token)) == token
    assert StateToken.parse(f"{ID}.{ID[::-1]}") == StateToken(ID, ID[::-1])


def test_ids_are_unguessable_and_safe_in_urls() -> None:
    """128 bits in 22 characters, none alike."""
    ids = {new_id() for _ in range(1000)}

    assert len(ids) == 1000
    assert {len(id_) for id_ in ids} == {22}
    assert all(StateToken.parse(f"{id_}.{id_}") for id_ in ids)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        True,
        1.5,
        [],
        {"track": ID},
        b"bytes",
        "",
        ".",
        ID,
        f"{ID}.",
        f".{ID}",
        f"{ID}{ID}",
        f"{ID}.{ID}.{ID}",
        f"{ID[:-1]}.{ID}",
        f"{ID}.{ID}x",
        f"{ID}.{ID}\n",
        f" {ID}.{ID}",
        f"{ID[:-1]}é.{ID}",
        f"{ID[:-1]}٣.{ID}",
        f"{ID[:-1]}*.{ID}",
        f"{ID[:-1]}}}.{ID}",
        f"{ID[:-2]}\r\n.{ID}",
        "\ud800" * 22 + f".{ID}",
        pytest.param(f"{ID}." + "a" * 10_000_000, id="endless"),
    ],
)
def test_anything_else_is_no_token(text: object) -> None:
    """A text that is not ours never becomes part of a Redis key."""
    with pytest.raises(
        BadRequestError, match="not a state token of this function; start the track again"
    ):
        StateToken.parse(text)


def test_refusal_does_not_repeat_what_was_sent() -> None:
    """A stranger's text does not reach the log."""
    with pytest.raises(BadRequestError) as refusal:
        StateToken.parse("<script>")

    assert "script" not in str(refusal.value)

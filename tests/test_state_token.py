from __future__ import annotations

import pytest

from errors import BadRequestError
from state_token import StateToken, new_id

ID = "abcdefghijklmnop-_0123"


def test_text_of_a_token_is_parsed_to_the_same_token() -> None:
    """CVAT carries the text."""
    token = StateToken(new_id(), new_id())

    assert StateToken.parse(str(token)) == token
    assert StateToken.parse(f"{ID}.{ID[::-1]}") == StateToken(ID, ID[::-1])


def test_ids_are_unguessable_and_safe_in_urls() -> None:
    """128 bits in 22 characters, all different."""
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
def test_other_values_are_no_tokens(text: object) -> None:
    """Only the characters of ids can become part of a Redis key."""
    with pytest.raises(
        BadRequestError, match="not a state token of this function; start the track again"
    ):
        StateToken.parse(text)


def test_message_does_not_repeat_what_was_sent() -> None:
    """Text of a caller does not reach the log."""
    with pytest.raises(BadRequestError) as refusal:
        StateToken.parse("<script>")

    assert "script" not in str(refusal.value)

"""Count the bytes that Redis clients send and receive."""

from __future__ import annotations

from typing import Any

from testbed.redis_server import RedisServer


class RedisTraffic:
    """The bytes between a Redis server and its clients, those of this counter left out."""

    def __init__(self, server: RedisServer) -> None:
        self._client = server.client()
        self._own = (0, 0)
        self._own = self.since(self.read())

    def read(self) -> tuple[int, int]:
        """Return the bytes that the server received and sent since its start."""
        stats: dict[str, Any] = self._client.info("stats")
        return stats["total_net_input_bytes"], stats["total_net_output_bytes"]

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return the bytes that the server received and sent since an earlier `read`."""
        received, sent = self.read()
        return received - before[0] - self._own[0], sent - before[1] - self._own[1]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

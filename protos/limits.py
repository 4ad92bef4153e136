"""Sizes, times and versions that both sides of the border keep, each with its reason."""

from __future__ import annotations

WIRE_VERSION = 2  # raised when an old reader would misunderstand a new message; new optional fields don't raise it

FINGERPRINT_BYTES = 32  # a whole SHA-256
BUNDLE_ID_BYTES = 8  # of the SHA-256: 2**64 is plenty against accident, and 24 bytes fewer an upload
MAX_FRAMING_BYTES = 32  # of our own around one payload; measured by a test at every field's largest usual value
MAX_REQUEST_ID = (1 << 21) - 1  # a device counts up to it and starts again: the id never costs more than three bytes

MAX_IMAGE_BYTES = 4 << 20  # a 12-megapixel JPEG at quality 90
MAX_MESSAGE_BYTES = MAX_IMAGE_BYTES + 4096  # gRPC refuses larger ones, after decompression, before we see them
MAX_PROBE_BYTES = 64 << 10  # padding of a bandwidth probe: a quarter second at 2 Mbit/s
MAX_LABELS = 100_000  # of a task
MAX_TASKS = 8  # of a bundle, as its manifest may have
MAX_TAPS = 8  # likewise
MAX_RATES = 64  # of a tap; tap and rate are one number on the wire, which for two taps fits into one byte
MAX_BUNDLES = 1000
MAX_ERROR_CHARACTERS = 500

MAX_TOKENS = 1 << 18  # of a session: far above the context of what runs here, far below what hurts
MAX_DRAFT = 64  # tokens of a round; acceptance beyond that is rare, and a round is computed whole
MAX_ROUNDS = 8  # of one session that wait in the cloud: a device that drafts ahead has two or three
MAX_LOGPROBS = 20  # as many as the API that people use allows
MAX_STATES = 256  # hidden states of a round: all of them, each of the largest size, make a quarter of a message
MAX_STATE_BYTES = 4096  # of one, coded: four bits a value for 8192 of them; a bundle's own cap is mostly far below

MAX_BUDGET_MS = 600_000  # nobody waits ten minutes for one photo; keeps a wild number out of the queue's arithmetic
MAX_STREAM_INFLIGHT = 64  # outstanding requests of one stream; above it the service stops reading that stream

# Half-open links: gRPC notices a peer that vanished after keepalive time + HTTP/2 ping timeout. `keepalive_timeout_ms`
# has no effect in the C core; `http2.ping_timeout_ms` has. The service must allow pings as often as devices send them.
KEEPALIVE_MS = 5_000
PING_TIMEOUT_MS = 2_000
HANDSHAKE_TIMEOUT_MS = 5_000  # a client that connects and stays silent

ChannelOptions = list[tuple[str, int | str]]


def client_options() -> ChannelOptions:
    """gRPC channel options of a device."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),  # the agent decides what is worth sending again
    ]


def server_options() -> ChannelOptions:
    """gRPC server options of the cloud service."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.so_reuseport", 0),  # a second service on the same port must fail, not share it
    ]

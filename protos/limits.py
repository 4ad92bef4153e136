"""Sizes, times and versions that device and cloud service agree on, each with its reason."""

from __future__ import annotations

WIRE_VERSION = 3  # raised when an old reader would misunderstand a new message; new optional fields don't raise it

FINGERPRINT_BYTES = 32  # a full SHA-256
BUNDLE_ID_BYTES = 8  # of the SHA-256: 64 bits suffice against accidental collision, and save 24 bytes an upload
MAX_FRAMING_BYTES = 32  # around one payload, without HTTP/2 and gRPC; tested at each field's largest usual value
MAX_REQUEST_ID = (1 << 21) - 1  # a device wraps around here, so that an id never takes more than three bytes

MAX_IMAGE_BYTES = 4 << 20  # a 12-megapixel JPEG at quality 90
MAX_MESSAGE_BYTES = MAX_IMAGE_BYTES + 4096  # gRPC rejects larger messages, measured after decompression
MAX_PROBE_BYTES = 64 << 10  # padding of a bandwidth probe, each way: a quarter of a second at 2 Mbit/s
MAX_LABELS = 100_000  # of a task
MAX_TASKS = 8  # of a bundle, as in its manifest
MAX_TAPS = 8  # of a bundle, as in its manifest
MAX_RATES = 64  # of a tap; tap and rate share one number on the wire, which takes one byte for up to two taps
MAX_BUNDLES = 1000
MAX_ERROR_CHARACTERS = 500
RETRY_PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own name (A6), in the trailing metadata of a call refused for load

MAX_TOKENS = 1 << 18  # of a session: far above the context of supported models, small enough to allocate
MAX_DRAFT = 64  # tokens of a round; longer drafts are rarely accepted, and all of a round's tokens are computed
MAX_SCORED = 512  # tokens of a round with `score`: its reply has 90 kB with the likeliest twenty of each
MAX_ROUNDS = 8  # of one session that may be queued in the cloud; a device that drafts ahead has two or three
MAX_LOGPROBS = 20  # the limit of the OpenAI API
MAX_END_IDS = 64  # that end an answer; models have one to five
TOKENIZER_PART_BYTES = 32 << 10  # of each stream whose device does not read gRPC keeps one, until its connection ends
MAX_STATES = 256  # hidden states of a round; at the largest size they fill a quarter of a message
MAX_STATE_BYTES = 4096  # of one coded hidden state: 8192 values of four bits; a bundle's own limit is usually far lower

MAX_BUDGET_MS = 600_000  # ten minutes: longer than any caller waits, and it bounds the arithmetic of the queue
MAX_STREAM_INFLIGHT = 64  # outstanding requests of one stream; above this the service stops reading from it

# Half-open links: gRPC detects a lost peer after the keepalive time plus the HTTP/2 ping timeout. In the C core
# `keepalive_timeout_ms` has no effect; `http2.ping_timeout_ms` has. The service must accept pings as often as
# devices send them. A proxy may not: by default gRPC says goodbye after a few pings on a stream without data. A device
# half-closes its stream before that; without a call it sends no pings, and the service's keep the connection open.
KEEPALIVE_MS = 5_000
PING_TIMEOUT_MS = 2_000
# gRPC's probes of the bandwidth are pings, too: one that waits until a photo has left a thin link ends the connection.
# Without them windows do not grow, so they begin as large as 25 Mbit/s and 150 ms fill.
WINDOW_BYTES = 1 << 20
IDLE_STREAM_S = 7.5  # at most two pings, checked at most this late
MAX_STREAM_S = 30.0  # of use; then a device opens another, which a balancer may place at a replica that came since
MAX_IDLE_S = 120.0  # the service ends a stream that nothing goes over for so long; a device does long before
GOODBYE_S = 2.0  # for the service's goodbye to arrive and the half-close to return, on the slowest link
MAX_CONNECTION_STREAMS = 256  # a client waits with more, and a proxy opens another connection
HANDSHAKE_TIMEOUT_MS = 5_000  # for a client that connects and sends nothing

ChannelOptions = list[tuple[str, int | str]]


def client_options() -> ChannelOptions:
    """gRPC channel options of a device."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),  # the agent decides what to retry
    ]


def server_options() -> ChannelOptions:
    """gRPC server options of the cloud service."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.so_reuseport", 0),  # a second service on the same port must fail instead of sharing it
    ]

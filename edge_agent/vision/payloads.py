"""What the device sends for one photo: a bottleneck at an operating point, or the whole image.

Knows nothing about the link or the router.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from PIL import Image

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.edge_agent.vision.request import Floats, RequestState
from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import PayloadTooLarge
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import FileFormat, encode_whole
from isthmus.models.vision.manifest import ImageWay, Preprocessing
from isthmus.protos.limits import MAX_IMAGE_BYTES


class PayloadEncoder:
    """Encodes payloads, and records their sizes and latencies in the cost model."""

    def __init__(
        self,
        head: Head,
        codecs: Sequence[ContextualCodec],
        costs: Costs,
        preprocessing: Preprocessing,
        metrics: EdgeMetrics | None,
    ) -> None:
        """`codecs` are one per tap. A whole image is sent no larger than `preprocessing` says."""
        self._head = head
        self._codecs = codecs
        self._costs = costs
        self._preprocessing = preprocessing
        self._metrics = metrics

    def bottleneck(
        self, state: RequestState, planned: OperatingPoint, pixels_CHW: Floats
    ) -> tuple[OperatingPoint, Payload]:
        """A bottleneck at the planned point, or at the next cheaper rate within the byte cap; and the point used.

        Raises PayloadTooLarge if no rate is within the cap.
        """
        tap = planned.tap
        source_CHW = state.features if self._costs.points.after(planned) else pixels_CHW
        assert source_CHW is not None  # a tap after a segment is planned only when that has run
        with state.stage("encode"):
            latent_CHW = self._head.encode(tap, source_CHW, planned.width)
            rate, data = self._codecs[tap].compress(latent_CHW, planned.rate)
        point = planned._replace(rate=rate)
        self._costs.encode_s[tap][point.width].observe(state.stage_ms["encode"] / 1000, time.monotonic())
        self._costs.point_bytes[point].observe(len(data))
        if self._metrics:
            self._metrics.encoded(len(data), *self._costs.points.parts(point))
        return point, Payload(Codec.BOTTLENECK, tap, rate, data)

    def whole_image(self, state: RequestState, image: Image.Image, way: ImageWay) -> Payload:
        """The photo in an image format: no larger than the network's input, with one channel if it is grey.

        Raises PayloadTooLarge.
        """
        with state.stage("encode"):
            payload = image_payload(image, self._preprocessing, way.form, way.quality)
        self._costs.image_encode_s[way.form].observe(state.stage_ms["encode"] / 1000)
        self._costs.bytes_of(way).observe(len(payload.data))
        return payload


def image_payload(image: Image.Image, spec: Preprocessing, form: FileFormat, quality: int) -> Payload:
    """A photo as an image file. Raises PayloadTooLarge."""
    data = encode_whole(image, spec.resize, form, quality, spec.fit)
    if len(data) > MAX_IMAGE_BYTES:
        raise PayloadTooLarge(f"the photo has {len(data)} bytes as {form}, the cap is {MAX_IMAGE_BYTES}")
    return Payload(Codec.IMAGE, 0, 0, data)

"""What the ways on are expected to take: seconds, bytes and money, from the bundle's figures and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.config import EdgeConfig
from edge_agent.policy.estimates import Average, LinkEstimate
from edge_agent.policy.plan import Option
from models.manifest import Manifest
from protos.limits import MAX_FRAMING_BYTES

CLOUD_MACS_PER_S = 20e9  # first guess of the cloud's speed, corrected by the first answer
DEVICE_MACS_PER_S = 10e9  # first guess of the device's
IMAGE_BYTES_PER_PIXEL = 0.1  # first guess for a stored photo
IMAGE_ENCODE_S = 0.005


class Costs:
    """Running averages, shared by all requests of an agent. A lost update under threads costs one observation."""

    def __init__(self, manifest: Manifest, config: EdgeConfig) -> None:
        self._manifest = manifest
        self._config = config
        height, width = manifest.preprocessing.crop
        head_macs = [segment.macs for segment in manifest.segments]
        self._whole_macs = sum(head_macs) + manifest.tail_macs
        self.segment_s = [Average(macs / DEVICE_MACS_PER_S) for macs in head_macs]
        self.encode_s = Average(manifest.bottleneck.encoder_macs / DEVICE_MACS_PER_S)
        self.image_encode_s = Average(IMAGE_ENCODE_S)
        self.image_bytes = Average(height * width * IMAGE_BYTES_PER_PIXEL)
        self.rate_bytes = [Average(rate.mean_bytes) for rate in manifest.bottleneck.rates]
        self.cloud_s_per_mac = Average(1 / CLOUD_MACS_PER_S)
        self.exit_share = [Average(0.3) for _ in head_macs]  # of the inputs that reach an exit

    @property
    def rates(self) -> list[int]:
        """Rates that meet the owner's quality; the best one when none does."""
        rates = self._manifest.bottleneck.rates
        good = [index for index, rate in enumerate(rates) if rate.agreement >= self._config.min_agreement]
        return good or [max(range(len(rates)), key=lambda index: rates[index].agreement)]

    def cloud_s(self, macs: int) -> float:
        return macs * self.cloud_s_per_mac.value

    def split(self, rate: int, link: LinkEstimate) -> Option:
        """Encode and send the bottleneck."""
        up_bytes = self.rate_bytes[rate].value + MAX_FRAMING_BYTES
        cloud_s, device_s = self.cloud_s(self._manifest.tail_macs), self.encode_s.value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._config.prices.usd(up_bytes, cloud_s, device_s)
        return Option("split", f"rate {rate} ({up_bytes:.0f} B)", seconds, usd, rate)

    def offload(self, link: LinkEstimate) -> Option:
        """Store and send the whole photo."""
        up_bytes = self.image_bytes.value + MAX_FRAMING_BYTES
        cloud_s, device_s = self.cloud_s(self._whole_macs), self.image_encode_s.value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._config.prices.usd(up_bytes, cloud_s, device_s)
        return Option("offload", f"whole image ({up_bytes:.0f} B)", seconds, usd)

    def options(self, passed: int, link: LinkEstimate | None) -> Sequence[Option]:
        """The ways on behind `passed` segments; without a link, running on is all there is."""
        last = passed == len(self.segment_s)
        if link is None:
            return [] if last else [Option("continue", "run on", self.segment_s[passed].value, 0.0)]
        here = [self.offload(link)]
        if last:
            return [*here, *(self.split(rate, link) for rate in self.rates)]
        return [*here, self.run_on(passed, link)]

    def run_on(self, passed: int, link: LinkEstimate) -> Option:
        """The next segment, then, unless its exit answers, the best way behind it."""
        behind = self.options(passed + 1, link)
        share = 1 - self.exit_share[passed].value
        device_s = self.segment_s[passed].value
        seconds = device_s + share * min(option.seconds for option in behind)
        usd = self._config.prices.usd(0, 0, device_s) + share * min(option.usd for option in behind)
        return Option("continue", "run on", seconds, usd)

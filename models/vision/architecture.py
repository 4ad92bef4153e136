"""The architecture of a split network, as a manifest describes it: backbone, cuts, exits and bottlenecks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from isthmus.models.bundle.manifest import Name, Part

Side = Annotated[int, Field(ge=1, le=4096)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Shape = tuple[Channels, Side, Side]  # channels, height, width


class TapArchitecture(Part):
    """A bottleneck's size. `after` counts the segments run before it; 0 encodes the image itself.

    `blocks`: for a tap on the image, the number of the backbone's first blocks that the encoder repeats; else 0.
    `rejoin`: the backbone's block that takes the decoded features, from a decoder of dense convolutions; 0 for the
    first one after the last segment, from a decoder of depthwise ones. `own_tail`: from that block on, decoded features
    have separate weights (for the first task only; others have their heads).
    `widths`: shares of the encoder's channels that a request may select, narrowest first, the last 1.
    """

    after: Annotated[int, Field(ge=0, le=8)]
    blocks: Annotated[int, Field(ge=0, le=1000)] = 0
    rejoin: Annotated[int, Field(ge=0, le=1000)] = 0
    own_tail: bool = False
    latent_channels: Channels
    decoder_channels: Channels
    rates: Annotated[int, Field(ge=1, le=64)]
    widths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, max_length=8)] = (1.0,)

    @field_validator("widths")
    @classmethod
    def _widths_rise(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if list(widths) != sorted(set(widths)) or widths[-1] != 1:
            raise ValueError(f"widths {widths} must rise strictly and end with 1")
        return widths

    @model_validator(mode="after")
    def _whole_image_or_features(self) -> TapArchitecture:
        if (self.after == 0) != (self.blocks > 0):
            raise ValueError("blocks must be above 0 for a tap on the image, and 0 for any other")
        if self.after and self.widths != (1.0,):
            raise ValueError("only a tap on the image has several widths")
        return self


ExitBlocks = Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=64)]


class Architecture(Part):
    """Arguments of the builder in `vision.catalog`: backbone, where it is cut, bottlenecks, classes of each task.

    `classes`: of a vector its size. `exit_blocks`: for each cut the later blocks of the backbone that form its exit;
    None where exits are heads.
    """

    builder: Name
    backbone: Name
    classes: Annotated[tuple[Annotated[int, Field(ge=1, le=100_000)], ...], Field(min_length=1, max_length=8)]
    cuts: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=8)]
    taps: Annotated[tuple[TapArchitecture, ...], Field(min_length=1, max_length=8)]
    exit_blocks: Annotated[tuple[ExitBlocks, ...], Field(min_length=1, max_length=8)] | None = None

    @field_validator("cuts")
    @classmethod
    def _cuts_rise(cls, cuts: tuple[int, ...]) -> tuple[int, ...]:
        if list(cuts) != sorted(set(cuts)):
            raise ValueError(f"cuts {cuts} must rise strictly")
        return cuts

    @model_validator(mode="after")
    def _taps_rejoin_before_the_tail(self) -> Architecture:
        for tap in self.taps:
            if tap.rejoin > self.cuts[-1]:
                raise ValueError(f"a tap rejoins at block {tap.rejoin}, the tail starts at {self.cuts[-1]}")
        return self

    @model_validator(mode="after")
    def _exits_start_at_their_cuts(self) -> Architecture:
        if self.exit_blocks is None:
            return self
        if len(self.exit_blocks) != len(self.cuts):
            raise ValueError(f"exit_blocks has {len(self.exit_blocks)} exits for {len(self.cuts)} cuts")
        for cut, blocks in zip(self.cuts, self.exit_blocks, strict=True):
            if blocks[0] < cut or list(blocks) != sorted(set(blocks)):
                raise ValueError(f"exit_blocks {blocks} must rise, from the cut at {cut} on")
        return self

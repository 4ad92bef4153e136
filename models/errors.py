"""Every error that the packages raise, by whose fault it is.

    IsthmusError
    ├── CallerError             the input or the request is wrong; trying again unchanged cannot help
    │   ├── InvalidInput        an image, argument or message that cannot be used
    │   │   ├── ContextExceeded     a prompt that leaves no room for an answer in the model's context
    │   │   └── InvalidGrammar      a grammar or a JSON schema that no answer can be held to
    │   ├── BundleError         a bundle on disk is missing, changed, of another version or inconsistent
    │   ├── ContextGone         the service no longer holds this session's KV cache: open it again
    │   ├── PayloadCorrupt      checksum, truncation or symbols that the tables cannot produce
    │   ├── PayloadTooLarge     over a cap, whether met when encoding or when receiving
    │   ├── OverBudget          the device's budgets allow no more to be sent
    │   ├── AgentClosed         a request after `close()`
    │   └── AnswerCancelled     an answer that its caller gave up while it waited
    ├── LinkError               the link failed; trying again later can help
    │   ├── LinkDown            no connection, or it broke
    │   └── DeadlineExceeded    the reply did not arrive, or could not have arrived, in time
    └── ServiceError            the service failed
        ├── Overloaded          a bounded queue or memory is full
        ├── Draining            the service is shutting down
        ├── EngineFault         the engine that computes for it failed, or answered what cannot be right
        ├── EngineDown          the engine that computes for the service does not answer; another replica may
        └── PeerError           this service cannot serve this device; another replica may
            ├── InvalidReply    it sent a reply that cannot be right
            └── Refused         it refuses every request of this device, until Describe says otherwise
                ├── UnknownBundle       it does not hold this fingerprint
                ├── Unauthenticated     it does not know who this device is
                └── UnsupportedVersion  it speaks another wire version

Each message states what was wrong, what was expected and where; none contains a path of the server or a secret.
"""

from __future__ import annotations


class IsthmusError(Exception):
    """Root of the tree."""


class CallerError(IsthmusError):
    """The input or the request is at fault."""


class InvalidInput(CallerError):
    """An image, argument or message that cannot be used."""


class ContextExceeded(InvalidInput):
    """A prompt that leaves no room for an answer in the model's context."""


class InvalidGrammar(InvalidInput):
    """A grammar or a JSON schema that no answer can be held to."""


class BundleError(CallerError):
    """A bundle on disk is missing, changed, of another version or inconsistent."""


class ContextGone(CallerError):
    """The service does not hold the KV cache of this session, or not of these tokens: open it again from token 0."""


class PayloadCorrupt(CallerError):
    """A payload whose checksum, length or symbols are wrong."""


class PayloadTooLarge(CallerError):
    """A payload over its cap."""


class OverBudget(CallerError):
    """The budgets of this device allow no more to be sent."""


class AgentClosed(CallerError):
    """The agent, or its link to the cloud, was closed before this request."""


class AnswerCancelled(CallerError):
    """The caller gave an answer up while it waited for the device's model."""


class LinkError(IsthmusError):
    """The link between device and cloud is at fault."""


class LinkDown(LinkError):
    """No connection, or it broke before the reply arrived."""


class DeadlineExceeded(LinkError):
    """The deadline passed before the reply arrived."""


class ServiceError(IsthmusError):
    """The service is at fault."""


class Overloaded(ServiceError):
    """A bounded queue or the memory is full. In `retry_s` seconds there may be room; 0 where that is not known."""

    def __init__(self, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class Draining(ServiceError):
    """The service is shutting down and accepts no new work."""


class EngineFault(ServiceError):
    """The engine that computes for the service failed on a request, or answered what cannot be right."""


class EngineDown(ServiceError):
    """The engine that computes for the service does not answer, or has lost what it computed; another replica may."""


class PeerError(ServiceError):
    """This service cannot serve this device; another replica may."""


class InvalidReply(PeerError):
    """A reply that cannot be right: wrong counts, values that are not probabilities, ids outside the vocabulary."""


class Refused(PeerError):
    """The service refuses every request of this device, so that none is sent until Describe says otherwise."""


class UnknownBundle(Refused):
    """The service does not hold the bundle of this fingerprint."""


class Unauthenticated(Refused):
    """The service does not know who this device is: a token is missing or wrong."""


class UnsupportedVersion(Refused):
    """The message was written for another wire version."""

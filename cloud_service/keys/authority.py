"""Certificates of a small authority: of the service, and of devices, whose names are SPIFFE IDs. Touches no file."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.models.errors import InvalidInput

DOMAIN = "isthmus"  # of SPIFFE IDs: spiffe://isthmus/device/NAME
SERVICE_ID = f"spiffe://{DOMAIN}/service"
AUTHORITY_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(minutes=5)  # of devices whose clocks are behind
USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def digest(self) -> str:
        """SHA-256 of the certificate's DER form, by which it is revoked."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


def load_pair(certificate_pem: bytes, key_pem: bytes) -> Pair:
    """Raises InvalidInput for a key that is not one of this authority's kind."""
    key = load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput("the authority's key is of another kind than `cloud-service keys` makes")
    return Pair(x509.load_pem_x509_certificate(certificate_pem), key)


def new_authority() -> Pair:
    """A new authority, which signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Isthmus authority")])
    builder = begin(name, name, key, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def issue_service(authority: Pair, hosts: Sequence[str], days: int) -> Pair:
    """For a service that devices reach by these names and addresses. It may also check its own health with it."""
    names = [*map(host_name, hosts), x509.UniformResourceIdentifier(SERVICE_ID)]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return issue(authority, hosts[0], names, both, days)


def issue_device(authority: Pair, name: str, days: int) -> Pair:
    """For one device."""
    uri = x509.UniformResourceIdentifier(device_id(name))
    return issue(authority, name, [uri], [ExtendedKeyUsageOID.CLIENT_AUTH], days)


def issue(
    authority: Pair, name: str, names: Sequence[x509.GeneralName], purposes: Sequence[x509.ObjectIdentifier], days: int
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    builder = begin(subject, authority.certificate.subject, key, days)
    own_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(purposes), False),
        (x509.SubjectAlternativeName(names), False),
        (own_key, False),
    ):
        builder = builder.add_extension(extension, critical)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{each: each in names for each in USAGES})


def device_id(name: str) -> str:
    """The SPIFFE ID of a device."""
    return f"spiffe://{DOMAIN}/device/{name}"


def host_name(host: str) -> x509.GeneralName:
    """Raises InvalidInput for what is neither a name nor an address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise InvalidInput(f"{host[:60]!a} is neither a host name nor an IP address") from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a service's certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]

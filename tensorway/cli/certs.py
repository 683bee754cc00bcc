"""`tensorway certs`: a local authority and the certificates of a mesh's members.

For a desk, a test and a small mesh. Where an authority exists (cert-manager, Vault, SPIRE), let it issue: what a certificate must say is in
docs/security.md.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tensorway.errors import FailedPrecondition, InvalidRequest
from tensorway.tls import DEFAULT_DOMAIN, ROLES

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

certs_app = typer.Typer(
    rich_markup_mode="markdown", no_args_is_help=True, help="A local authority, and certificates of a mesh's members (docs/security.md)."
)

_CA: Final = "ca"
_CA_DAYS: Final = 3650
#: Clocks of members differ; a certificate is valid from a little before it was made.
_EARLIER: Final = datetime.timedelta(minutes=5)

Folder = Annotated[Path, typer.Argument(help="Folder of the authority and the certificates.")]


@certs_app.command("create")
def create(
    folder: Folder = Path("certs"),
    host: Annotated[list[str] | None, typer.Option(help="Name or address under which clients reach gateways; repeat for several.")] = None,
    role: Annotated[list[str] | None, typer.Option(help=f"Only these roles; default: {', '.join(ROLES)}.")] = None,
    domain: Annotated[str, typer.Option(help="The setting tls_domain of the mesh.")] = DEFAULT_DOMAIN,
    days: Annotated[float, typer.Option(min=0.0, help="How long the members' certificates are valid.")] = 90.0,
) -> None:
    """Make an authority where FOLDER has none, and a new certificate for every role: FOLDER/ROLE.pem and FOLDER/ROLE.key.

    Run it again to renew: members take the new files without a restart.

    Example: `tensorway certs create certs --host gateway.example.com`
    """
    from rich.console import Console

    chosen = tuple(role or ROLES)
    if unknown := sorted(set(chosen) - set(ROLES)):
        raise InvalidRequest(f"--role {unknown[0]!r}: must be one of {', '.join(ROLES)}", field="role")
    hosts = tuple(host or ("localhost", "127.0.0.1", "::1"))
    authority = Authority.open_or_make(folder, domain)
    for name in chosen:
        authority.issue(name, hosts if name == "gateway" else (), datetime.timedelta(days=days))
    console = Console()
    console.print(f"{folder}/ca.pem signs: {', '.join(f'{name}.{domain}' for name in chosen)}, for {days:g} days.")
    console.print("Members: --tls-cert, --tls-key and --tls-ca. Clients trust ca.pem. Keep ca.key where no service runs.")


class Authority:
    """A certificate authority in a folder: `ca.pem`, and `ca.key`, which only its owner reads."""

    def __init__(self, folder: Path, domain: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._folder = folder
        self._domain = domain
        self._certificate = certificate
        self._key = key

    @classmethod
    def open_or_make(cls, folder: Path, domain: str = DEFAULT_DOMAIN) -> Authority:
        """The folder's authority, or a new one. Raises FailedPrecondition where its files do not serve."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        folder.mkdir(parents=True, exist_ok=True)
        path, key_path = folder / f"{_CA}.pem", folder / f"{_CA}.key"
        if not path.exists():
            return cls._make(folder, domain)
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise FailedPrecondition(f"{folder} holds an authority that cannot be read: {error}; choose another folder") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FailedPrecondition(f"{key_path} is no key of this command's making; let its own authority issue the certificates")
        return cls(folder, domain, certificate, key)

    @classmethod
    def _make(cls, folder: Path, domain: str) -> Authority:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {domain}")])
        builder = _builder(name, name, key, datetime.timedelta(days=_CA_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(is_authority=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        certificate = _signed(builder, key)
        _write(folder, _CA, certificate, key)
        return cls(folder, domain, certificate, key)

    def issue(self, role: str, hosts: tuple[str, ...], valid: datetime.timedelta, name: str = "") -> tuple[Path, Path]:
        """A certificate of `role`, for clients and servers, with its key: `NAME.pem` and `NAME.key`, the role's name where none is given.
        Both take the place of what was there, each at once."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        own = f"{role}.{self._domain}"
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, own)])
        names: list[x509.GeneralName] = [x509.DNSName(own), x509.UniformResourceIdentifier(f"spiffe://{self._domain}/{role}")]
        names += [_general_name(host) for host in hosts]
        builder = _builder(subject, self._certificate.subject, key, valid)
        uses = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        for extension, is_critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True), (_usage(is_authority=False), True),
            (x509.ExtendedKeyUsage(uses), False), (x509.SubjectAlternativeName(names), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
        ):
            builder = builder.add_extension(extension, critical=is_critical)
        return _write(self._folder, name or role, _signed(builder, self._key), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    # A certificate that is to have ended already (a test's) begins before it ends.
    begins = min(now, now + valid) - _EARLIER
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(now + valid)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives.hashes import SHA256

    return builder.sign(key, SHA256())


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    contents = (
        (key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600),
        (path, certificate.public_bytes(Encoding.PEM), 0o644),
    )
    for target, content, mode in contents:
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        fresh.replace(target)
    return path, key_path

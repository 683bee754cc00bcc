"""TLS between real servers and channels: who gets in, who is believed, and certificates that change while both run."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import tensorway.tls
from tensorway.cli.certs import Authority
from tensorway.deadline import Deadline
from tensorway.errors import PermissionDenied, TensorwayError, Unavailable
from tensorway.tls import GATEWAY, ORCHESTRATOR, WORKER, ChannelTls, MeshTls, TlsFiles
from tensorway.transport import AsyncChannel, BlockingChannel, LinkServer, create_link_client, create_server
from tensorway.transport.port import Call, Exchange, ServerOptions, Stream

from .conftest import IMPLEMENTATIONS, STREAM, TIMEOUT_S, UNARY, soon

DAY = datetime.timedelta(days=1)
#: Who may call the test's own methods.
CALLERS = {
    "test.Service": frozenset({GATEWAY}), "test.Service/Stream": frozenset({WORKER}), "tensorway.v1.LinkService": frozenset({GATEWAY}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of one authority, and of a strange one that signs the same names."""
    folder = tmp_path_factory.mktemp("certs")
    for name in ("own", "strange"):
        authority = Authority.open_or_make(folder / name)
        for role in (GATEWAY, ORCHESTRATOR, WORKER):
            authority.issue(role, (), DAY)
        authority.issue(ORCHESTRATOR, (), -DAY, name="expired-orchestrator")
        authority.issue(GATEWAY, (), -DAY, name="expired-gateway")
    return folder


def files(folder: Path, name: str, ca: str = "own", signer: str = "own") -> TlsFiles:
    return TlsFiles(cert=str(folder / signer / f"{name}.pem"), key=str(folder / signer / f"{name}.key"), ca=str(folder / ca / "ca.pem"))


def copied(folder: Path, to: Path, name: str, signer: str = "own") -> None:
    """Puts a certificate and its authority where a process looks for its own."""
    to.mkdir(exist_ok=True)
    for source, target in (("ca.pem", "ca.pem"), (f"{name}.pem", "cert.pem"), (f"{name}.key", "cert.key")):
        shutil.copyfile(folder / signer / source, to / f".{target}")
        (to / f".{target}").replace(to / target)


class Bench:
    """A server with TLS, and what is opened to it."""

    def __init__(self, stack: AsyncExitStack, implementation: str) -> None:
        self._stack = stack
        self._implementation = implementation
        self.names: list[tuple[str, ...]] = []
        self.endpoint = ""

    async def serve(self, own: TlsFiles, *, callers: bool = True) -> None:
        tls = MeshTls(own).serve(CALLERS)
        if not callers:
            tls = tensorway.tls.ServerTls(own)
        server = create_server(ServerOptions("127.0.0.1:0", self._implementation, tls=tls))
        server.add_unary(UNARY, self._echo)
        server.add_stream(STREAM, self._stream)
        links = LinkServer(self._exchange)
        links.attach(server)
        self.endpoint = await server.start()
        self._stack.push_async_callback(server.stop, 0.0)
        self._stack.push_async_callback(links.close)

    async def call(self, tls: ChannelTls | None, method: str = UNARY) -> bytes:
        channel = AsyncChannel(self.endpoint, tls=tls)
        try:
            return (await channel.unary(method, b"hello", TIMEOUT_S)).response
        finally:
            await channel.close()

    async def _echo(self, request: bytes, call: Call) -> bytes:
        self.names.append(call.peer_names)
        return request

    async def _stream(self, stream: Stream) -> None:
        await stream.write(b"in")

    def _exchange(self, exchange: Exchange) -> None:
        exchange.reply(exchange.head, ())


@pytest.fixture(params=IMPLEMENTATIONS)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(stack, request.param)


async def test_members_of_a_mesh_believe_each_other(bench: Bench, folder: Path) -> None:
    await bench.serve(files(folder, ORCHESTRATOR))
    assert await bench.call(MeshTls(files(folder, GATEWAY)).dial(ORCHESTRATOR)) == b"hello"
    (names,) = bench.names
    assert set(names) == {"gateway.tensorway.internal", "spiffe://tensorway.internal/gateway"}


@pytest.mark.parametrize(
    ("shown", "why"),
    [("none", "no certificate"), ("strange", "another authority's"), ("expired-gateway", "expired"), ("clear", "no TLS at all")],
)
async def test_a_caller_that_is_not_believed_gets_nowhere(bench: Bench, folder: Path, shown: str, why: str) -> None:
    await bench.serve(files(folder, ORCHESTRATOR))
    name = f"orchestrator.{tensorway.tls.DEFAULT_DOMAIN}"
    tls: ChannelTls | None = ChannelTls(TlsFiles(ca=str(folder / "own" / "ca.pem")), name)
    if shown == "strange":
        tls = ChannelTls(files(folder, GATEWAY, signer="strange"), name)
    elif shown == "expired-gateway":
        tls = ChannelTls(files(folder, shown), name)
    elif shown == "clear":
        tls = None
    with pytest.raises(Unavailable):
        await bench.call(tls)
    assert bench.names == [], why


@pytest.mark.parametrize("own", ["strange", "expired-orchestrator", "worker"])
async def test_a_server_that_is_not_believed_hears_nothing(bench: Bench, folder: Path, own: str) -> None:
    """Another authority's, an expired one, and a right one of a member that is no orchestrator."""
    signer = "strange" if own == "strange" else "own"
    await bench.serve(files(folder, ORCHESTRATOR if own == "strange" else own, signer=signer), callers=False)
    with pytest.raises(Unavailable):
        await bench.call(MeshTls(files(folder, GATEWAY)).dial(ORCHESTRATOR))
    assert bench.names == []


async def test_a_member_calls_only_what_is_for_its_role(bench: Bench, folder: Path) -> None:
    await bench.serve(files(folder, ORCHESTRATOR))
    worker = MeshTls(files(folder, WORKER)).dial(ORCHESTRATOR)
    with pytest.raises(PermissionDenied, match=r"is for gateway.tensorway.internal, and .* is of .*worker.tensorway.internal"):
        await bench.call(worker)
    assert bench.names == []
    for role, may in ((WORKER, True), (GATEWAY, False)):
        channel = AsyncChannel(bench.endpoint, tls=MeshTls(files(folder, role)).dial(ORCHESTRATOR))
        stream = channel.stream(STREAM)
        try:
            if may:
                assert await stream.read() == b"in"
            else:
                with pytest.raises(PermissionDenied):
                    await stream.read()
        finally:
            await stream.cancel()
            await channel.close()


async def test_links_show_and_check_certificates(bench: Bench, folder: Path) -> None:
    await bench.serve(files(folder, ORCHESTRATOR))
    for role, reaches in ((GATEWAY, True), (WORKER, False)):
        link = create_link_client(bench.endpoint, may_be_local=False, tls=MeshTls(files(folder, role)).dial(ORCHESTRATOR))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(link.run())
            if reaches:
                await link.wait_connected(Deadline.after(TIMEOUT_S))
                assert (await link.call(b"head", (), Deadline.after(TIMEOUT_S))).head == b"head"
            else:
                with pytest.raises(Unavailable, match="is for gateway"):
                    await link.wait_connected(Deadline.after(2.0))
            running.cancel()


async def test_blocking_channels_do_the_same(bench: Bench, folder: Path) -> None:
    await bench.serve(files(folder, ORCHESTRATOR))
    for role, expected in ((GATEWAY, None), (WORKER, PermissionDenied)):
        channel = BlockingChannel(bench.endpoint, tls=MeshTls(files(folder, role)).dial(ORCHESTRATOR))
        try:
            await asyncio.to_thread(channel.unary, UNARY, b"x", TIMEOUT_S)
        except TensorwayError as error:
            assert type(error) is expected
        else:
            assert expected is None
        finally:
            await asyncio.to_thread(channel.close)


async def test_a_whole_mesh_moves_to_another_authority_without_a_restart(
    bench: Bench, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and client keep running while their files become another authority's; a caller with the old ones is then refused."""
    monkeypatch.setattr(tensorway.tls, "_LOOK_S", 0.0)
    server, client = tmp_path / "server", tmp_path / "client"
    copied(folder, server, ORCHESTRATOR)
    copied(folder, client, GATEWAY)
    await bench.serve(_in(server))
    own = _in(client)
    channel = AsyncChannel(bench.endpoint, tls=MeshTls(own).dial(ORCHESTRATOR))
    stays = AsyncChannel(bench.endpoint, tls=MeshTls(files(folder, GATEWAY)).dial(ORCHESTRATOR))
    try:
        await channel.unary(UNARY, b"before", TIMEOUT_S)
        await stays.unary(UNARY, b"before", TIMEOUT_S)
        first = await asyncio.to_thread(_shown, bench.endpoint)
        copied(folder, server, ORCHESTRATOR, signer="strange")
        copied(folder, client, GATEWAY, signer="strange")
        assert (await channel.unary(UNARY, b"after", TIMEOUT_S)).response == b"after"
        assert await asyncio.to_thread(_shown, bench.endpoint) != first
        # Who has a connection keeps it; a new one needs the new certificates.
        assert (await stays.unary(UNARY, b"kept", TIMEOUT_S)).response == b"kept"
        with pytest.raises(Unavailable):
            await bench.call(MeshTls(files(folder, GATEWAY)).dial(ORCHESTRATOR))
        copied(folder, client, GATEWAY)
        with pytest.raises(Unavailable):
            await channel.unary(UNARY, b"back", TIMEOUT_S)
    finally:
        await soon(channel.close())
        await soon(stays.close())


async def test_files_that_do_not_fit_together_wait_until_they_do(
    bench: Bench, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal writes one file after the other."""
    monkeypatch.setattr(tensorway.tls, "_LOOK_S", 0.0)
    copied(folder, tmp_path, ORCHESTRATOR)
    await bench.serve(_in(tmp_path))
    dial = MeshTls(files(folder, GATEWAY)).dial(ORCHESTRATOR)
    first = await asyncio.to_thread(_shown, bench.endpoint)
    Authority.open_or_make(folder / "own").issue(ORCHESTRATOR, (), DAY, name="renewed")
    (tmp_path / "cert.pem").write_bytes((folder / "own" / "renewed.pem").read_bytes())
    assert await bench.call(dial) == b"hello"
    assert await asyncio.to_thread(_shown, bench.endpoint) == first
    assert len([line for line in caplog.messages if "is not the key of the certificate" in line]) == 1
    (tmp_path / "cert.key").write_bytes((folder / "own" / "renewed.key").read_bytes())
    assert await bench.call(dial) == b"hello"
    assert await asyncio.to_thread(_shown, bench.endpoint) != first
    (tmp_path / "cert.key").unlink()
    assert await bench.call(dial) == b"hello"


def _in(folder: Path) -> TlsFiles:
    return TlsFiles(cert=str(folder / "cert.pem"), key=str(folder / "cert.key"), ca=str(folder / "ca.pem"))


def _shown(endpoint: str) -> str:
    """The certificate that the server shows to a new connection."""
    host, _, port = endpoint.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=TIMEOUT_S)

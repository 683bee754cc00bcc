"""front-proxy-tls.yaml before a gateway that speaks TLS itself, with the certificates that `tensorway certs` makes."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

from tensorway.cli.local_mesh import LocalMesh, MemberPlan, flags_of
from tests.deploy.certificates import Authority
from tests.deploy.envoy import rendered, running_envoy
from tests.deploy.test_envoy_registry import following


async def output_of(*command: str | Path) -> str:
    """What a command prints, which must succeed."""
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, (output, errors)
    return output.decode()


async def test_envoy_speaks_mtls_with_a_gateway(tmp_path: Path) -> None:
    certs, registry_url = tmp_path / "certs", f"directory:{tmp_path / 'registry'}"
    await output_of(Path(sys.executable).parent / "tensorway", "certs", "create", certs)
    folder = tmp_path / "envoy"
    tls = Authority.made().write(tmp_path / "tls", "front", "127.0.0.1")
    shutil.copy(tls / "ca.crt", tls / "front-ca.crt")
    for source, target in (("operator.pem", "tls.crt"), ("operator.key", "tls.key"), ("ca.pem", "ca.crt")):
        shutil.copy(certs / source, tls / target)
    config = rendered(folder, "front-proxy-tls.yaml", tls=tls)
    async with LocalMesh(tmp_path / "logs", grace_s=20) as mesh:
        for service in ("orchestrator", "gateway"):
            flags = {
                "registry": registry_url, "listen": "127.0.0.1:0", "ops_listen": "off", "tls_ca": certs / "ca.pem",
                "tls_cert": certs / f"{service}.pem", "tls_key": certs / f"{service}.key",
            }
            await mesh.start_member(MemberPlan(service, service, flags_of(flags)))
        try:
            async with following(registry_url, folder / "gateways.json"), running_envoy(config) as envoy:
                # Healthy: Envoy has asked over mTLS, and the gateway is linked to its orchestrator.
                await envoy.wait_healthy("gateways", 1)
                url = f"https://{envoy.endpoint}/v2/health/ready"
                answer = await output_of("curl", "-sS", "--fail-with-body", "--cacert", tls / "front-ca.crt", url)
                assert json.loads(answer) == {"ready": True}
        except BaseException:
            for path in sorted(mesh.log_dir.glob("*.log")):
                print(f"== {path.name}\n{path.read_text()[-3000:]}")
            raise

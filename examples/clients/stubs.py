"""Makes stubs of Tensorway's protos for another language: `make stubs LANG=go`, or `python examples/clients/stubs.py go --out DIR`.

What it needs besides `protoc` is named when it is missing, with the command that brings it. For C# and Rust it writes a project whose own
build makes the stubs, as is usual there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROTOS: Final = Path(__file__).resolve().parents[2] / "protos"
#: What a client calls. The other files are the mesh's own.
FILES: Final = tuple(f"tensorway/v1/{name}.proto" for name in ("tensor", "ops", "inference", "model", "mesh"))
#: Only some languages need the code of these; elsewhere a package of gRPC's brings it.
IMPORTED: Final = ("google/api/annotations.proto", "google/api/http.proto")
#: In the error details of every failed call.
DETAILS: Final = ("google/rpc/status.proto", "google/rpc/error_details.proto")
#: Where the Go packages of all files come to lie.
GO_PACKAGE: Final = "tensorway/v1"


class Missing(Exception):
    """A tool that is not there, and how to get it."""


@dataclass(frozen=True, slots=True)
class Language:
    """How one language's stubs are made, into a folder."""

    make: Callable[[Path], None]
    #: What the folder then holds.
    what: str


def includes() -> tuple[str, ...]:
    """Folders of protos: ours, and google's, which come with the Python package googleapis-common-protos."""
    import google.api

    return (str(PROTOS), str(Path(next(iter(google.api.__path__))).parents[1]))


def tool(name: str, command: str) -> str:
    """Where a tool lies. Raises Missing."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not on PATH; on Debian: {command}" if command.startswith("apt") else f"{name} is not on PATH: {command}")
    return found


def protoc(arguments: Sequence[str], files: Sequence[str]) -> None:
    """Runs protoc on `files`."""
    compiler = tool("protoc", "apt-get install protobuf-compiler")
    subprocess.run([compiler, *(f"-I{folder}" for folder in includes()), *arguments, *files], check=True)


def make_cpp(out: Path) -> None:
    plugin = tool("grpc_cpp_plugin", "apt-get install protobuf-compiler-grpc libgrpc++-dev libprotobuf-dev")
    protoc([f"--cpp_out={out}"], (*FILES, *IMPORTED, *DETAILS))
    protoc([f"--grpc_out={out}", f"--plugin=protoc-gen-grpc={plugin}"], FILES[1:])


def make_go(out: Path) -> None:
    for name, module in (("protoc-gen-go", "protobuf"), ("protoc-gen-go-grpc", "grpc")):
        tool(name, f"go install google.golang.org/{module}/cmd/{name}@latest")
    packages = ",".join(f"M{file}={GO_PACKAGE}" for file in FILES)
    protoc([f"--go_out={packages}:{out}", f"--go-grpc_out={packages}:{out}"], FILES)


def make_java(out: Path) -> None:
    plugin = tool("grpc_java_plugin", "apt-get install protobuf-compiler-grpc-java-plugin")
    protoc([f"--java_out={out}", f"--grpc_out={out}", f"--plugin=protoc-gen-grpc={plugin}"], FILES)


def make_ruby(out: Path) -> None:
    plugin = tool("grpc_ruby_plugin", "apt-get install protobuf-compiler-grpc")
    protoc([f"--ruby_out={out}", f"--grpc_out={out}", f"--plugin=protoc-gen-grpc={plugin}"], FILES)


def make_node(out: Path) -> None:
    """TypeScript types of the messages and clients; the code itself is read from the protos when a program starts."""
    _copy_protos(out / "protos")
    generator = Path("node_modules/.bin/proto-loader-gen-types")
    found = shutil.which("proto-loader-gen-types") or (str(generator.resolve()) if generator.exists() else None)
    if found is None:
        raise Missing("proto-loader-gen-types is not there: npm install @grpc/grpc-js @grpc/proto-loader, in this folder")
    words = ["--grpcLib=@grpc/grpc-js", "--keepCase", "--longs=String", "--enums=String", "--defaults", "--oneofs"]
    subprocess.run([found, *FILES[1:], *words, f"--outDir={out}", f"--includeDirs={(out / 'protos').resolve()}"], check=True)


def make_csharp(out: Path) -> None:
    _copy_protos(out / "protos")
    (out / "Tensorway.Client.csproj").write_text(_CSPROJ, encoding="utf-8")


def make_rust(out: Path) -> None:
    _copy_protos(out / "protos")
    (out / "src").mkdir(exist_ok=True)
    (out / "Cargo.toml").write_text(_CARGO, encoding="utf-8")
    (out / "build.rs").write_text(_BUILD_RS.replace("FILES", ", ".join(f'"protos/{file}"' for file in FILES[1:])), encoding="utf-8")
    (out / "src" / "lib.rs").write_text(_LIB_RS, encoding="utf-8")


LANGUAGES: Final = {
    "cpp": Language(make_cpp, "*.pb.h, *.grpc.pb.h and their sources"),
    "csharp": Language(make_csharp, "Tensorway.Client.csproj: `dotnet build` makes the stubs (package Grpc.Tools)"),
    "go": Language(make_go, f"the package {GO_PACKAGE}"),
    "java": Language(make_java, "classes in the package tensorway.v1"),
    "node": Language(make_node, "TypeScript types, and the protos that @grpc/proto-loader reads at run time"),
    "ruby": Language(make_ruby, "*_pb.rb and *_services_pb.rb"),
    "rust": Language(make_rust, "a crate whose build.rs makes the stubs with tonic (needs protoc)"),
}
LANGUAGES["typescript"] = LANGUAGES["node"]


def _copy_protos(to: Path) -> None:
    """Our protos, and those of google that they import."""
    for folder in includes():
        for file in (*FILES, *IMPORTED, *DETAILS):
            source = Path(folder) / file
            if source.exists():
                (to / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, to / file)


_CSPROJ: Final = """<Project Sdk="Microsoft.NET.Sdk">
  <PropertyGroup>
    <TargetFramework>net8.0</TargetFramework>
    <Nullable>enable</Nullable>
  </PropertyGroup>
  <ItemGroup>
    <PackageReference Include="Google.Protobuf" Version="3.*" />
    <PackageReference Include="Grpc.Net.Client" Version="2.*" />
    <PackageReference Include="Grpc.StatusProto" Version="2.*" />
    <PackageReference Include="Grpc.Tools" Version="2.*" PrivateAssets="All" />
    <Protobuf Include="protos/tensorway/**/*.proto" ProtoRoot="protos" GrpcServices="Client" />
    <Protobuf Include="protos/google/api/*.proto" ProtoRoot="protos" GrpcServices="None" />
  </ItemGroup>
</Project>
"""
_CARGO: Final = """[package]
name = "tensorway-client"
version = "0.1.0"
edition = "2021"

[dependencies]
prost = "0.13"
tonic = { version = "0.12", features = ["tls"] }

[build-dependencies]
tonic-build = "0.12"
"""
_BUILD_RS: Final = """fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_build::configure().build_server(false).compile_protos(&[FILES], &["protos"])?;
    Ok(())
}
"""
_LIB_RS: Final = """pub mod google {
    pub mod api {
        tonic::include_proto!("google.api");
    }
}
pub mod tensorway {
    pub mod v1 {
        tonic::include_proto!("tensorway.v1");
    }
}
"""


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("language", choices=sorted(LANGUAGES), metavar="LANG", help=", ".join(sorted(LANGUAGES)))
    parser.add_argument("--out", type=Path, default=None, help="folder to make; default: build/stubs/LANG")
    arguments = parser.parse_args()
    out = arguments.out or Path("build") / "stubs" / arguments.language
    out.mkdir(parents=True, exist_ok=True)
    language = LANGUAGES[arguments.language]
    try:
        language.make(out)
    except Missing as error:
        print(f"stubs: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"stubs: {Path(error.cmd[0]).name} failed with status {error.returncode}; see above", file=sys.stderr)
        return 1
    print(f"{os.path.relpath(out)}: {language.what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

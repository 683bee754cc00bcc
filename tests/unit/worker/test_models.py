"""The ready models with their real weights: right answers, and the same ones in a batch."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageOps
from worker_wire import MODELS, InProcess, Sent, answered, as_torch, tensor

from tensorway.errors import InvalidRequest
from tensorway.fetch import fetch_files
from tensorway.model_directory import load_directory
from tensorway.tensors import DataType, Tensor, decode_bytes, encode_bytes

pytestmark = pytest.mark.models


@cache
def model(name: str) -> InProcess:
    return InProcess(MODELS / name)


def texts(*rows: str | bytes) -> Sent:
    data = encode_bytes([row if isinstance(row, bytes) else row.encode() for row in rows])
    return Sent([Tensor("text", DataType.BYTES, (len(rows),), data)])


def embedding(outcome: object) -> torch.Tensor:
    return as_torch(answered(outcome)["embedding"], torch.float32)  # type: ignore[arg-type]


_SENTENCES = [
    texts("A cat sits on the mat."),
    texts("A kitten is sitting on a rug.", "Quarterly revenue fell by three per cent."),
    texts(""),
    texts("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 40),
]


def test_minilm_batched_equals_unbatched() -> None:
    minilm = model("minilm")
    batched = [embedding(one) for one in minilm.batch(_SENTENCES)]
    for one, alone in zip(batched, minilm.alone(_SENTENCES), strict=True):
        assert (one - embedding(alone)).abs().max() < 1e-5
        assert torch.allclose(one.norm(dim=1), torch.ones(len(one)), atol=1e-5)


def test_minilm_knows_what_is_alike() -> None:
    cat, others = (embedding(one) for one in model("minilm").batch(_SENTENCES[:2]))
    likeness = (cat @ others.T)[0]
    assert likeness[0] > 0.5 > 0.2 > likeness[1]


def test_minilm_refuses_what_is_not_utf8_alone() -> None:
    good, bad, too = model("minilm").batch([texts("fine"), texts("fine", b"\xff\xfe"), texts("fine")])
    assert isinstance(bad, InvalidRequest)
    assert bad.field == "inputs.text[1]"
    assert (embedding(good) - embedding(too)).abs().max() < 1e-5


def test_minilm_takes_no_rows() -> None:
    none, one = model("minilm").batch([texts(), texts("fine")])
    assert embedding(none).shape == (0, 384)
    assert (embedding(one) - embedding(model("minilm").batch([texts("fine")])[0])).abs().max() < 1e-5
    assert embedding(model("minilm").batch([texts()])[0]).shape == (0, 384)


def test_minilm_ids_is_minilm_without_its_tokeniser() -> None:
    minilm, ids = model("minilm"), model("minilm-ids")
    requests = []
    for request in _SENTENCES:
        rows = numpy.array(decode_bytes(request.inputs[0].data), dtype=object)
        values = minilm.engine.preprocess({"text": rows}, {})
        requests.append(Sent([tensor(name, torch.as_tensor(value), DataType.INT64) for name, value in values.items()]))
    for by_ids, by_text in zip(ids.batch(requests), minilm.batch(_SENTENCES), strict=True):
        assert (embedding(by_ids) - embedding(by_text)).abs().max() < 1e-5


def audio(rows: int, seed: int) -> Sent:
    generator = torch.Generator().manual_seed(seed)
    return Sent([tensor("audio", torch.randn((rows, 512), generator=generator) * 0.3, DataType.FP32)])


def test_silero_batched_equals_unbatched() -> None:
    silero = model("silero-vad")
    requests = [audio(1, 1), audio(3, 2), audio(1, 3), audio(2, 4)]
    first, again, alone = silero.batch(requests), silero.batch(requests), silero.alone(requests)
    for one, two, three in zip(first, again, alone, strict=True):
        # Nothing is carried from step to step: the second time gives the very same bytes.
        assert answered(one)["speech_probability"] == answered(two)["speech_probability"]
        got, expected = (as_torch(answered(x)["speech_probability"], torch.float32) for x in (one, three))
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


def test_silero_hears_no_speech_in_silence() -> None:
    (outcome,) = model("silero-vad").batch([Sent([tensor("audio", torch.zeros(2, 512), DataType.FP32)])])
    assert as_torch(answered(outcome)["speech_probability"], torch.float32).max() < 0.3


_PICTURES = """
name: pictures
engine: python
inputs: [{name: x, dtype: FP32, shape: [rows]}]
outputs: [{name: x, dtype: FP32, shape: [rows]}]
files:
  - path: china.jpg
    source: pypi://scikit-learn==1.9.1/sklearn/datasets/images/china.jpg
    sha256: 8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29
  - path: flower.jpg
    source: pypi://scikit-learn==1.9.1/sklearn/datasets/images/flower.jpg
    sha256: a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638
"""
#: ImageNet classes of the two photographs: a palace, a daisy.
_PALACE, _DAISY = 698, 985


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real photographs."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "model.yaml").write_text(_PICTURES)
    fetch_files(load_directory(folder), lambda progress: None)
    return folder / "files"


@pytest.fixture
def daisy(photographs: Path) -> Image.Image:
    with Image.open(photographs / "flower.jpg") as image:
        return image.convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def images(*rows: bytes) -> Sent:
    return Sent([Tensor("image", DataType.BYTES, (len(rows),), encode_bytes(rows))])


def classes(outcome: object) -> list[int]:
    values: list[int] = as_torch(answered(outcome)["class_id"], torch.int64).tolist()  # type: ignore[arg-type]
    return values


def probabilities(outcome: object) -> torch.Tensor:
    return as_torch(answered(outcome)["probability"], torch.float32)  # type: ignore[arg-type]


def test_efficientnet_knows_photographs(photographs: Path) -> None:
    files = [(photographs / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    (outcome,) = model("efficientnet-lite0").batch([images(*files)])
    assert classes(outcome) == [_PALACE, _DAISY]
    assert probabilities(outcome).min() > 0.25


def test_efficientnet_sees_the_same_in_every_format(daisy: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    turned = daisy.transpose(Image.Transpose.ROTATE_90)
    rows = [
        encoded(daisy, "PNG"),
        encoded(daisy, "WEBP", lossless=True),
        encoded(daisy.convert("RGBA"), "PNG"),
        encoded(turned, "PNG", exif=exif),
        encoded(daisy, "JPEG", quality=98),
        encoded(daisy.convert("CMYK"), "JPEG", quality=98),
        encoded(daisy.quantize(256), "PNG"),
    ]
    (outcome,) = model("efficientnet-lite0").batch([images(*rows)])
    assert classes(outcome) == [_DAISY] * len(rows)
    seen = probabilities(outcome)
    assert (seen[1:4] - seen[0]).abs().max() < 1e-5
    assert (seen - seen[0]).abs().max() < 0.1
    # Without the orientation it is another picture.
    (upset,) = model("efficientnet-lite0").batch([images(encoded(turned, "PNG"))])
    assert (probabilities(upset) - seen[0]).abs().min() > 1e-3


@pytest.mark.parametrize("mode", ["LA", "I;16"])
def test_efficientnet_takes_grey_pictures(mode: str, daisy: Image.Image) -> None:
    grey = ImageOps.grayscale(daisy)
    picture = Image.fromarray(numpy.asarray(grey).astype(numpy.uint16) * 256) if mode == "I;16" else grey.convert(mode)
    (outcome,) = model("efficientnet-lite0").batch([images(encoded(picture, "PNG"), encoded(grey, "PNG"))])
    assert classes(outcome) == [_DAISY, _DAISY]
    assert (probabilities(outcome)[0] - probabilities(outcome)[1]).abs() < 1e-5


def test_efficientnet_batched_equals_unbatched(daisy: Image.Image) -> None:
    requests = [
        images(encoded(daisy, "JPEG")),
        images(encoded(daisy.resize((90, 500)), "PNG"), encoded(daisy.rotate(30), "JPEG")),
        images(encoded(daisy.crop((0, 0, 224, 300)), "WEBP")),
    ]
    efficientnet = model("efficientnet-lite0")
    for one, alone in zip(efficientnet.batch(requests), efficientnet.alone(requests), strict=True):
        assert classes(one) == classes(alone)
        assert torch.allclose(probabilities(one), probabilities(alone), atol=1e-5)


def test_efficientnet_refuses_a_broken_picture_alone(daisy: Image.Image) -> None:
    good = encoded(daisy, "JPEG")
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    for row, broken in enumerate((b"", b"no picture", good[: len(good) // 2], bomb, encoded(daisy, "GIF"))):
        fine, refused, too = model("efficientnet-lite0").batch([images(good), images(*[good] * row, broken), images(good)])
        assert isinstance(refused, InvalidRequest), row
        assert refused.field == f"inputs.image[{row}]"
        assert f"row {row} of image" in refused.message
        assert classes(fine) == classes(too) == [_DAISY]


def test_resnet50_batched_equals_unbatched() -> None:
    resnet = model("resnet50")
    generator = torch.Generator().manual_seed(1)
    requests = [Sent([tensor("pixel_values", torch.randn((rows, 3, 224, 224), generator=generator), DataType.FP32)]) for rows in (1, 2)]
    for one, alone in zip(resnet.batch(requests), resnet.alone(requests), strict=True):
        got, expected = (as_torch(answered(x)["logits"], torch.float32) for x in (one, alone))
        assert got.shape[1] == 1000 and torch.allclose(got, expected, atol=1e-4, rtol=1e-4)

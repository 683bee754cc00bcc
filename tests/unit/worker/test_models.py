"""The ready models with their real weights: right answers, and the same ones in a batch."""

from __future__ import annotations

import io
from functools import cache

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from tensorway.errors import InvalidRequest
from tensorway.tensors import DataType, Tensor, encode_bytes
from worker_wire import MODELS, InProcess, Sent, answered, as_torch, tensor

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
    assert torch.equal(embedding(good), embedding(too))


def test_minilm_takes_no_rows() -> None:
    none, one = model("minilm").batch([texts(), texts("fine")])
    assert embedding(none).shape == (0, 384)
    assert (embedding(one) - embedding(model("minilm").batch([texts("fine")])[0])).abs().max() < 1e-5
    assert embedding(model("minilm").batch([texts()])[0]).shape == (0, 384)


def test_minilm_ids_is_minilm_without_its_tokeniser() -> None:
    minilm, ids = model("minilm"), model("minilm-ids")
    requests = []
    for request in _SENTENCES:
        rows = [element for element in request.inputs[0].data and _rows(request)]
        values = minilm.engine.preprocess({"text": numpy.array(rows, dtype=object)}, {})
        requests.append(Sent([tensor(name, torch.as_tensor(value), DataType.INT64) for name, value in values.items()]))
    for by_ids, by_text in zip(ids.batch(requests), minilm.batch(_SENTENCES), strict=True):
        assert (embedding(by_ids) - embedding(by_text)).abs().max() < 1e-5


def _rows(request: Sent) -> list[bytes]:
    from tensorway.tensors import decode_bytes

    return decode_bytes(request.inputs[0].data)


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


def daisy() -> Image.Image:
    """A photograph-like picture is not needed for plumbing: a bright disc on green has one stable class."""
    size = 400
    grid = numpy.indices((size, size)).astype(numpy.float32)
    radius = numpy.hypot(grid[0] - size / 2, grid[1] - size / 2)
    angle = numpy.arctan2(grid[0] - size / 2, grid[1] - size / 2)
    picture = numpy.zeros((size, size, 3), numpy.uint8)
    picture[:] = (40, 90, 30)
    petals = (radius < 70 + 90 * numpy.abs(numpy.cos(6 * angle))) & (radius > 30)
    picture[petals] = (250, 250, 245)
    picture[radius <= 45] = (240, 190, 20)
    picture[: size // 3, : size // 3] //= 2
    return Image.fromarray(picture)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def images(*rows: bytes) -> Sent:
    return Sent([Tensor("image", DataType.BYTES, (len(rows),), encode_bytes(rows))])


def classes(outcome: object) -> list[int]:
    values: list[int] = as_torch(answered(outcome)["class_id"], torch.int64).tolist()  # type: ignore[arg-type]
    return values


def test_efficientnet_sees_a_daisy_in_every_format() -> None:
    picture = daisy()
    rotated = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    rows = [
        encoded(picture, "PNG"),
        encoded(picture, "JPEG", quality=95),
        encoded(picture, "WEBP", lossless=True),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture.convert("CMYK"), "JPEG", quality=95),
        encoded(rotated, "JPEG", quality=95, exif=exif),
        encoded(picture.quantize(64), "PNG"),
    ]
    (outcome,) = model("efficientnet-lite0").batch([images(*rows)])
    assert classes(outcome) == [985] * len(rows)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_efficientnet_takes_grey_pictures(mode: str) -> None:
    grey = ImageOps.grayscale(daisy())
    if mode == "I;16":
        picture = Image.fromarray(numpy.asarray(grey).astype(numpy.uint16) * 257)
    else:
        picture = grey.convert(mode)
    efficientnet = model("efficientnet-lite0")
    (outcome,) = efficientnet.batch([images(encoded(picture, "PNG"))])
    (expected,) = efficientnet.batch([images(encoded(grey.convert("1") if mode == "1" else grey, "PNG"))])
    assert classes(outcome) == classes(expected)


def test_efficientnet_batched_equals_unbatched() -> None:
    picture = daisy()
    requests = [
        images(encoded(picture, "JPEG")),
        images(encoded(picture.resize((90, 500)), "PNG"), encoded(picture.rotate(30), "JPEG")),
        images(encoded(picture.crop((0, 0, 224, 300)), "WEBP")),
    ]
    efficientnet = model("efficientnet-lite0")
    for one, alone in zip(efficientnet.batch(requests), efficientnet.alone(requests), strict=True):
        assert classes(one) == classes(alone)
        got, expected = (as_torch(answered(x)["probability"], torch.float32) for x in (one, alone))
        assert torch.allclose(got, expected, atol=1e-5)


def test_efficientnet_refuses_a_broken_picture_alone() -> None:
    good = encoded(daisy(), "JPEG")
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    gif = encoded(daisy(), "GIF")
    for row, broken in enumerate((b"", b"no picture", good[: len(good) // 2], bomb, gif)):
        fine, refused, too = model("efficientnet-lite0").batch([images(good), images(*[good] * row, broken), images(good)])
        assert isinstance(refused, InvalidRequest), row
        assert refused.field == f"inputs.image[{row}]"
        assert f"row {row} of image" in refused.message
        assert classes(fine) == classes(too) == [985]


def test_resnet50_batched_equals_unbatched() -> None:
    resnet = model("resnet50")
    generator = torch.Generator().manual_seed(1)
    requests = [Sent([tensor("pixel_values", torch.randn((rows, 3, 224, 224), generator=generator), DataType.FP32)]) for rows in (1, 2)]
    for one, alone in zip(resnet.batch(requests), resnet.alone(requests), strict=True):
        got, expected = (as_torch(answered(x)["logits"], torch.float32) for x in (one, alone))
        assert got.shape[1] == 1000 and torch.allclose(got, expected, atol=1e-4, rtol=1e-4)

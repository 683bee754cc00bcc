"""ImageNet classes of encoded pictures: decoded and resized per request, classified
per batch by efficientnet-lite-pytorch."""

import importlib
import io
import sys

import numpy
import torch
from PIL import Image, ImageOps

from tensorway.model import Inputs, InvalidInput, Model, ModelContext, Outputs, Parameters

SIZE = 224
#: Share of the crop that the network was trained on: the short side is resized to SIZE + 32, then the middle is cut out.
CROP_PADDING = 32
#: The lite networks were trained on (pixel - 127) / 128. The package's README shows the constants of the other EfficientNets instead;
#: with those these weights are less sure of the same photographs.
MEAN = 127.0
STD = 128.0
FORMATS = ("JPEG", "PNG", "WEBP")


class EfficientNetLite0(Model):
    """`image` BYTES [rows] -> `class_id` INT64 [rows], `probability` FP32 [rows]."""

    # Pillow lets go of the interpreter while it decodes and resizes.
    preprocess_threads = 2

    def load(self, context: ModelContext) -> None:
        self.max_pixels = int(context.settings.get("max_pixels", 50_000_000))
        package = context.file("efficientnet_lite_pytorch/__init__.py").parent
        sys.path.insert(0, str(package.parent))
        try:
            network = importlib.import_module(package.name).EfficientNet
        finally:
            sys.path.remove(str(package.parent))
        self.network = network.from_name("efficientnet-lite0")
        self.network.load_state_dict(context.load_weights(str(context.settings["weights"])))
        self.network.eval().requires_grad_(False).to(context.device)

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        """Encoded pictures -> `pixels` UINT8 [rows, 3, 224, 224]."""
        images = inputs["image"]
        pixels = numpy.empty((len(images), 3, SIZE, SIZE), numpy.uint8)
        for row, encoded in enumerate(images):
            try:
                pixels[row] = self.decode(encoded).transpose(2, 0, 1)
            except InvalidInput:
                raise
            except Exception as error:
                # Pillow's decoders raise many kinds of errors for broken files: OSError, SyntaxError, ValueError, struct.error, ...
                raise InvalidInput(f"row {row} of image cannot be decoded: {error}", field=f"inputs.image[{row}]") from error
        return {"pixels": torch.from_numpy(pixels)}

    def decode(self, encoded: bytes) -> numpy.ndarray:
        """One upright RGB picture, uint8 [224, 224, 3]."""
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            # The header tells the size; nothing has been decoded yet.
            if width * height > self.max_pixels:
                raise ValueError(f"{width} x {height} pixels are more than {self.max_pixels}")
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; other formats ignore this.
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
            image = ImageOps.exif_transpose(image)
            return numpy.asarray(cropped(as_rgb(image)))

    def forward(self, inputs: Inputs) -> Outputs:
        pixels = (inputs["pixels"].to(torch.float32) - MEAN) / STD
        probabilities = torch.softmax(self.network(pixels), dim=1)
        best = probabilities.max(dim=1)
        return {"class_id": best.indices, "probability": best.values}

    def example(self, rows: int) -> Inputs:
        return {"pixels": torch.zeros((rows, 3, SIZE, SIZE), dtype=torch.uint8)}


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; what is transparent shows white behind it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(behind, image).convert("RGB")
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    return image.convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    """The middle square, resized to SIZE with the margin that the network was trained on."""
    side = SIZE / (SIZE + CROP_PADDING) * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))

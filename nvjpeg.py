"""NVIDIA's JPEG engines, by ctypes: nvJPEG's batched decoder, on the current stream.

torchvision.io.decode_jpeg has the same library and the same pixels, but one decoder a process. For
each image nvJPEG launches small kernels, and beside training each waits for large ones: with a
decoder for each thread these waits overlap. Only what the engines decode; the caller has another
way for the rest. https://docs.nvidia.com/cuda/nvjpeg/
"""

import ctypes
import re
from collections import defaultdict, deque

import torch

HARDWARE, RGB = 3, 3  # nvjpegBackend_t, nvjpegOutputFormat_t: planes
INT = ctypes.c_int


class Image(ctypes.Structure):
    """nvjpegImage_t."""
    _fields_ = [("channel", ctypes.c_void_p * 4), ("pitch", ctypes.c_size_t * 4)]


IDLE = defaultdict(deque)  # of each device: decoders that no thread is using


def decode(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Files uint8 [bytes] on the host -> RGB uint8 [3, height, width] on the device. The files must
    stay until the current stream is through. Raises RuntimeError if one of them is refused, or
    where there is no engine; any thread may call it."""
    try:
        decoder = IDLE[device].pop()
    except IndexError:
        decoder = Decoder(device)
    try:
        return decoder.decode(files)
    finally:
        IDLE[device].append(decoder)


class Decoder:
    """Raises RuntimeError where there is no library or no engine."""

    def __init__(self, device: torch.device):
        import torchvision.io  # noqa: F401  brings the library along
        self.device = device
        with open("/proc/self/maps") as maps:
            found = re.search(r"/\S*libnvjpeg\S*", maps.read())
        if not found:
            raise RuntimeError("torchvision has no nvJPEG")
        self.library = ctypes.CDLL(found[0])
        self.handle, self.state, self.parsed = (ctypes.c_void_p() for _ in range(3))
        with torch.cuda.device(device):
            self.call("nvjpegCreateEx", HARDWARE, None, None, 0, ctypes.byref(self.handle))
            self.call("nvjpegJpegStateCreate", self.handle, ctypes.byref(self.state))
            self.call("nvjpegJpegStreamCreate", self.handle, ctypes.byref(self.parsed))

    def call(self, name: str, *arguments) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")

    def size(self, file: torch.Tensor) -> tuple[int, int]:
        """(height, width), by the header. Raises RuntimeError for what no engine decodes."""
        data, length, answer = ctypes.c_void_p(file.data_ptr()), ctypes.c_size_t(len(file)), INT(-1)
        self.call("nvjpegJpegStreamParseHeader", self.handle, data, length, self.parsed)
        self.call("nvjpegDecodeBatchedSupported", self.handle, self.parsed, ctypes.byref(answer))
        if answer.value:
            raise RuntimeError("the JPEG engines do not decode this file")
        width, height = INT(), INT()
        self.call("nvjpegJpegStreamGetFrameDimensions", self.parsed, ctypes.byref(width),
                  ctypes.byref(height))
        return height.value, width.value

    def decode(self, files: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `decode` above does, by this one."""
        n, source_hw = len(files), list(map(self.size, files))
        sizes = [3 * h * w for h, w in source_hw]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        pictures = [x.view(3, *hw) for x, hw in zip(memory.split(sizes), source_hw)]
        images = (Image * n)()
        for image, picture in zip(images, pictures):
            start, plane, width = picture.data_ptr(), picture.stride(0), picture.shape[2]
            image.channel[:3] = [start, start + plane, start + 2 * plane]
            image.pitch[:3] = [width] * 3
        addresses = (ctypes.c_void_p * n)(*(file.data_ptr() for file in files))
        lengths = (ctypes.c_size_t * n)(*map(len, files))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("nvjpegDecodeBatchedInitialize", self.handle, self.state, n, 1, RGB)
        self.call("nvjpegDecodeBatched", self.handle, self.state, addresses, lengths, images,
                  stream)
        return pictures

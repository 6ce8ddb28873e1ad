"""Bytes as they lie on the disk to UTF-8 text: decompressed under limits, other encodings with a mark transcoded."""

from __future__ import annotations

import codecs
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from dpo_assets.feedback.sources import FileRefused, Limits

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UNPACK = {GZIP: "gunzip", ZSTD: "unzstd"}  # What unpacks it by hand.
MARK_INSIDE = "byte_order_mark_inside"  # The flag of files that were put together.
_FEED = 64 * 1024
_ZSTD_FEED = 1024  # Four bytes of zstd can stand for 128 KiB, and its decompressor gives all at once.
_ZSTD_WINDOW = 2**27
_DAMAGED = "dpo_assets.damaged"
# UTF-32 first: its little-endian mark begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class _Chunks(io.RawIOBase):
    """A raw stream of what a generator yields, so that the standard buffered reader can sit on it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        view = memoryview(buffer)
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _buffered(chunks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Chunks(chunks), buffer_size=_FEED)


def decompressed(handle: BinaryIO, magic: bytes, limits: Limits) -> io.BufferedReader:
    """The content of a gzip or zstd file.

    Reading raises FileRefused: `truncated_file`, `damaged_file` or `decompression_bomb`.
    """
    chunks = _gunzip(handle) if magic == GZIP else _unzstd(handle)
    return _buffered(_capped(chunks, UNPACK[magic], limits))


def _capped(chunks: Iterator[bytes], unpack: str, limits: Limits) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limits.unpacked_bytes:
            raise unpacked_too_large(f"more than {limits.unpacked_bytes} bytes", "max_unpacked_gib", unpack)
        yield chunk


def unpacked_too_large(holds: str, setting: str, unpack: str) -> FileRefused:
    """Of a small file that holds more than the recipe lets one cost, with the ways on."""
    return FileRefused(
        "decompression_bomb",
        f"unpacked it holds {holds}: where that is meant, raise `feedback.{setting}`, or unpack it yourself "
        f"({unpack}): a file that is as large on the disk as it reads has no such bound",
    )


class _Decompressor(Protocol):
    eof: bool
    unused_data: bytes


def _gunzip(handle: BinaryIO) -> Iterator[bytes]:
    feed = handle.read(_FEED)
    while feed:
        member = zlib.decompressobj(wbits=31)
        try:
            while not member.eof:
                if not feed and not (feed := handle.read(_FEED)):
                    raise FileRefused("truncated_file", "the gzip file ends in the middle: fetch it again")
                if out := member.decompress(feed, _FEED):
                    yield out
                feed = member.unconsumed_tail
        except zlib.error as error:
            raise FileRefused("damaged_file", f"not a sound gzip file: {error}") from None
        feed = (member.unused_data or handle.read(_FEED)).lstrip(b"\0")  # Padding is allowed behind a member.
        while not feed and (more := handle.read(_FEED)):
            feed = more.lstrip(b"\0")


def _unzstd(handle: BinaryIO) -> Iterator[bytes]:
    zstandard = zstd_module()
    feed = handle.read(_ZSTD_FEED)
    while feed:
        frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        try:
            while not frame.eof:
                if not feed and not (feed := handle.read(_ZSTD_FEED)):
                    raise FileRefused("truncated_file", "the zstd file ends in the middle: fetch it again")
                if out := frame.decompress(feed):
                    yield out
                feed = b""
        except zstandard.ZstdError as error:
            raise FileRefused("damaged_file", f"not a sound zstd file: {error}") from None
        feed = frame.unused_data or handle.read(_ZSTD_FEED)


def zstd_module() -> Any:
    """The package that reads zstd.

    Raises:
        FileRefused: `needs_package` when it is not installed.
    """
    try:
        import zstandard
    except ImportError:
        message = "zstd needs a package that is not installed: pip install zstandard, or compress with gzip instead"
        raise FileRefused("needs_package", message) from None
    return zstandard


def as_utf8(stream: io.BufferedReader, flags: Counter[str]) -> io.BufferedReader:
    """The text of a stream as UTF-8 without a byte order mark.

    UTF-16 and UTF-32 are told by their mark and transcoded. What is no text there, a lone surrogate or half a
    character at the end, comes out as bytes that are not UTF-8 either, so that only its row is refused.

    Raises:
        FileRefused: `unmarked_encoding` for UTF-16 or UTF-32 without a mark.
    """
    head = stream.peek(4)[:4]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            stream.read(len(mark))
            flags[f"transcoded_from_{encoding.replace('-', '_')}"] = 1
            return _buffered(_transcoded(stream, encoding))
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        flags["byte_order_mark"] = 1
    elif len(head) == 4 and (guess := _unmarked(head)):
        message = f"it looks like {guess} without a byte order mark: convert it with iconv -f {guess} -t UTF-8"
        raise FileRefused("unmarked_encoding", message)
    return stream


def _unmarked(head: bytes) -> str | None:
    """JSON and CSV begin with two ASCII characters, so the zeros among four bytes tell the encoding (RFC 4627, 3)."""
    zeros = (head[0] == 0, head[1] == 0, head[2] == 0, head[3] == 0)
    return {
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
    }.get(zeros)


def _transcoded(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    codecs.register_error(_DAMAGED, _as_surrogate)
    decoder = codecs.getincrementaldecoder(encoding)(_DAMAGED)
    while chunk := stream.read1(_FEED):
        if text := decoder.decode(chunk):
            yield text.encode("utf-8", "surrogatepass")
    if text := decoder.decode(b"", final=True):
        yield text.encode("utf-8", "surrogatepass")


def _as_surrogate(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


def with_line_feeds(stream: io.BufferedReader, flags: Counter[str]) -> io.BufferedReader:
    """The stream itself, or with line feeds where its lines end in carriage returns only."""
    head = stream.peek(_FEED)
    if b"\n" in head or b"\r" not in head:
        return stream
    flags["carriage_returns_as_line_ends"] = 1
    return _buffered(chunk.replace(b"\r", b"\n") for chunk in iter(lambda: stream.read1(_FEED), b""))

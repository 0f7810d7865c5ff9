"""Floor 1: how a weight is stored, read and written; one look-up for plain, sharded and quantized weights."""

from lightning_oft.codecs.base import Codec, PlainCodec, codec_of, parameter_of, register_codec
from lightning_oft.codecs.dtensor import cut_like, is_scattered, is_sharded, local_part, reshard, whole
from lightning_oft.codecs.packed import PackedCodec, packed_codec

__all__ = ["Codec", "PackedCodec", "PlainCodec", "codec_of", "cut_like", "is_scattered", "is_sharded", "local_part",
           "packed_codec", "parameter_of", "register_codec", "reshard", "whole"]  # fmt: skip

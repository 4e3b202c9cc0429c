"""A convolutional autoencoder around a vector quantizer: the VQGAN family."""

from te_quant.autoencoder.coders import build_decoder, build_encoder
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.autoencoder.model import AutoencoderOutput, VQAutoencoder
from te_quant.autoencoder.padding import pad_to_divisor
from te_quant.autoencoder.tiling import TiledAutoencoder
from te_quant.contract import Encoding, EquivarianceContract

__all__ = [
    "AutoencoderConfig",
    "AutoencoderOutput",
    "Encoding",
    "EquivarianceContract",
    "TiledAutoencoder",
    "VQAutoencoder",
    "build_decoder",
    "build_encoder",
    "pad_to_divisor",
]

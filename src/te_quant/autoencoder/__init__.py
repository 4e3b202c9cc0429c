"""A convolutional autoencoder around a vector quantizer: the VQGAN family."""

from te_quant.autoencoder.coders import build_decoder, build_encoder
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.autoencoder.model import AutoencoderOutput, VQAutoencoder
from te_quant.contract import Encoding, EquivarianceContract

__all__ = [
    "AutoencoderConfig",
    "AutoencoderOutput",
    "Encoding",
    "EquivarianceContract",
    "VQAutoencoder",
    "build_decoder",
    "build_encoder",
]

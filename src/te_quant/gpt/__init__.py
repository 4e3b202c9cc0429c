"""A small GPT over segments with their own vocabularies, such as captions and image tokens."""

from te_quant.gpt.config import GPTConfig, Segment
from te_quant.gpt.former_names import with_present_names
from te_quant.gpt.model import GPT, KeyValueCache
from te_quant.gpt.sampling import guided_logits

__all__ = ["GPT", "GPTConfig", "KeyValueCache", "Segment", "guided_logits", "with_present_names"]

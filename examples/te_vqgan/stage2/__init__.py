"""Stage 2: a GPT over captions and tokens, its training and evaluation."""

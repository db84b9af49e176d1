"""Training LoRAs on a frozen base model: packed rows of tokens, their loss, the optimiser, few-shot runs."""

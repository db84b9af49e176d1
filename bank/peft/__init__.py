"""Meta-LoRAs as PEFT adapters, in and out."""

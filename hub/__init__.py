"""Other people's files: config.json and model families, safetensors, PEFT adapters, rows of data sets."""

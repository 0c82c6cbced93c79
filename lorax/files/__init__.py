"""Reading and writing files: safetensors, outputs that are never half written, pictures, TOML, long paths."""

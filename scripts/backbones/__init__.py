"""The demonstration backbones: small Transformers of four arrangements that the project pre-trains itself."""

"""How near the estimate of `inarch check` is to what a real step keeps: the demonstration backbone and ViT-B/16.

    .venv/bin/python bench/memory.py [--batch-size 4]

The estimate is made on a copy without weights; the measurement counts what autograd saves in a real forward pass and
what AdamW holds after a real step. ViT-B/16 has random weights, which keep as many bytes as others. Prints a row for
each model and adapter; ends with 1 where an estimate is more than 15 % off.
"""

import argparse

from transformers import ViTConfig

import inarch
from inarch.cli.check import made_batch
from inarch.cli.skeleton import skeleton, with_own_weights

ADAPTERS = ("seq_bn", "double_seq_bn", "par_bn", "lora", "ia3", "compacter", "prefix_tuning")
LIMIT = 0.15


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    size = parser.parse_args().batch_size
    is_near = True
    for name, label in (("demo", "demo"), ("vit", "ViT-B/16")):
        for adapter in ADAPTERS:
            found = []
            for model in (skeleton(name), with_own_weights(name)):
                assert name == "demo" or is_base(model.config)
                found.append(inarch.check(model, adapter, example_inputs=made_batch(model, size)).memory)
            estimated, measured = found
            pairs = [(estimated.activations, measured.activations), (estimated.optimizer, measured.optimizer)]
            off = max(abs(guess / truth - 1) for guess, truth in pairs)
            is_near &= off <= LIMIT
            shown = ", ".join(f"{guess / 2**20:.1f} of {truth / 2**20:.1f} MiB" for guess, truth in pairs)
            print(f"{label:9} {adapter:14} estimated {shown}: {off:.1%} off", flush=True)
    raise SystemExit(not is_near)


def is_base(config: ViTConfig) -> bool:
    """Whether this is the ViT of 12 layers, 768 wide, on patches of 16."""
    return (config.num_hidden_layers, config.hidden_size, config.patch_size, config.image_size) == (12, 768, 16, 224)


if __name__ == "__main__":
    main()

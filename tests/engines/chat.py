"""A small model with a tokenizer, as a folder that a server takes: `python -m tests.engines.chat FOLDER`."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.export.models import transformers


def main(folder):
    """A Qwen3-MoE of random weights, and a tokenizer of bytes."""
    words = {word: number for number, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(words),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        eos_token_id=words["<end>"],
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="500KB")


if __name__ == "__main__":
    main(sys.argv[1])

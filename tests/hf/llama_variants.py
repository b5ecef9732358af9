"""The kinds of LLaMA that every test of the way out walks through, as LlamaConfig's keys."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "head_dim": {"num_key_value_heads": 2, "head_dim": 24},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "theta": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
}

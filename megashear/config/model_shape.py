"""Shape of a LLaMA model, with its parameter count and FLOPs.

One class describes sources and targets. Field names follow megatron-core where it has one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of rotary frequencies (Hugging Face `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Sizes and position encoding of a LLaMA model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head (q = H / G); 1 is multi-head attention."""
        return self.num_heads // self.num_query_groups

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: q, k, v, o, gate, up, down and two norms."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_query_groups)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, if untied, of the output layer; without padding rows."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def parameters(self) -> int:
        """Total parameters including embeddings (the count used by the scaling law of reference losses)."""
        return self.embedding_parameters() + self.num_layers * self.layer_parameters() + self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward FLOPs per token: 6 per weight of a matrix product, half for causal attention."""
        products = (
            self.num_layers * (self.layer_parameters() - 2 * self.hidden_size) + self.vocab_size * self.hidden_size
        )
        attention = self.num_layers * sequence_length * self.num_heads * self.head_dim
        return 6 * products + 6 * attention

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding as stored under tensor parallelism: the next multiple of `tensor_parallel`."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

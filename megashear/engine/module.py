"""The base of a model chunk: what megatron-core's schedules and reductions ask of a module."""

from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class StageModule(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """A module that runs as part of a pipeline; its first and last chunk may hold copies of one tied embedding."""

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, config: TransformerConfig, pre_process: bool, post_process: bool, tied: bool, vp_stage: int | None
    ) -> None:
        """pre_process, post_process: whether this chunk embeds tokens, computes logits. vp_stage: its number among
        the rank's chunks.
        """
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = tied
        self.input_tensor: Tensor | None = None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.share_embeddings_and_output_weights

    def set_input_tensor(self, tensors: list[Tensor | None] | Tensor | None) -> None:
        """Take the previous stage's activations (called by the schedules)."""
        self.input_tensor = tensors[0] if isinstance(tensors, list) else tensors

    def embedding_weight(self) -> Tensor | None:
        """This chunk's copy of the tied embedding; to be given by the model."""
        raise NotImplementedError

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The same under the name that megatron-core's reduction between first and last stage asks for."""
        return self.embedding_weight()

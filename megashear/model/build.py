"""A model on this rank: its chunks of a LLaMA under a layout, filled. Read next: `llama.py`, `load.py`."""

from megashear.config.shape import ModelShape
from megashear.engine.layout import Layout
from megashear.engine.parallel import CoreConfig
from megashear.engine.pipeline import build_chunks
from megashear.model.llama import Llama
from megashear.model.load import TensorSource, load_weights


def filled_chunks(
    shape: ModelShape,
    core: CoreConfig,
    layout: Layout,
    source: TensorSource,
    mask_embedding: bool = True,
    recompute: bool = False,
) -> list[Llama]:
    """This rank's chunks, their weights from `source`. mask_embedding, recompute: as `Llama` takes them."""

    def build(layers: range, pre: bool, post: bool, stage: int | None) -> Llama:
        return Llama(shape, core, layout, layers, pre, post, mask_embedding, recompute, vp_stage=stage)

    chunks = build_chunks(shape.num_layers, layout, build)
    for chunk in chunks:
        load_weights(chunk, source)
    return chunks

"""Text corpora for character language models, and the windows cut from them."""

from ember_ext.paper.data.batches import every_batch, random_batch
from ember_ext.paper.data.corpus import Corpus, CorpusError, Vocabulary, load_text

__all__ = ["Corpus", "CorpusError", "Vocabulary", "every_batch", "load_text", "random_batch"]

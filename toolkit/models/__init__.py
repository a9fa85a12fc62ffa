"""Pose encoders and the translator around a HuggingFace backbone: a seq2seq model or a language model.

Its import registers the translator with transformers' ``Auto`` classes; users write ``import toolkit.auto``. It knows
nothing of training.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

from toolkit.models.configuration import PoseTranslatorConfig
from toolkit.models.processor import PoseFeatureExtractor, PoseProcessor
from toolkit.models.translator import PoseTranslator, PoseTranslatorOutput

AutoConfig.register(PoseTranslatorConfig.model_type, PoseTranslatorConfig, exist_ok=True)
AutoModel.register(PoseTranslatorConfig, PoseTranslator, exist_ok=True)
AutoFeatureExtractor.register(PoseTranslatorConfig, PoseFeatureExtractor, exist_ok=True)
AutoProcessor.register(PoseTranslatorConfig, PoseProcessor, exist_ok=True)

__all__ = ["PoseFeatureExtractor", "PoseProcessor", "PoseTranslator", "PoseTranslatorConfig", "PoseTranslatorOutput"]

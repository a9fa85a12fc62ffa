"""``import toolkit.auto`` registers the translator with transformers: ``AutoModel`` and ``AutoProcessor`` load it."""

from toolkit.models import PoseProcessor, PoseTranslator, PoseTranslatorConfig

__all__ = ["PoseProcessor", "PoseTranslator", "PoseTranslatorConfig"]

"""SemFormer: weakly supervised semantic segmentation from image-level labels, stage by stage."""

__version__ = "0.1.0"

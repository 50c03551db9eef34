"""SemFormer: weakly supervised semantic segmentation from image-level labels, stage by stage."""

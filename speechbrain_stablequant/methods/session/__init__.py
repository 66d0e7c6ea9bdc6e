"""What all methods share: one recognizer, its calibration and its search set.

Independent of any toolkit: protocols describe the recognizer and the trainer.
"""

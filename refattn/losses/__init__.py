"""Losses: each forward returns a number and residuals, its backward turns the number's cotangent into that of the predictions."""
from .cross_entropy import bits, cross_entropy_backward, cross_entropy_forward
from .ctc import ctc_backward, ctc_beam_decode, ctc_forward, ctc_greedy_decode, phoneme_error_rate

__all__ = ["bits", "cross_entropy_backward", "cross_entropy_forward", "ctc_backward", "ctc_beam_decode", "ctc_forward", "ctc_greedy_decode",
           "phoneme_error_rate"]
